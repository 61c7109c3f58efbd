"""`overfill generate`: a prompt through a two-stage model, its answer streamed to the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from overfill.dial import EXACT, dial
from overfill.errors import UserError
from pipeline.objects.places import full_model_place, local_place
from pipeline.stages.folders import model_folder, tokenizer_folder
from pipeline.whole import verify_model


@dataclass(frozen=True)
class Sampling:
    """How the answer is chosen."""

    max_new_tokens: int
    temperature: float
    """0 decodes greedily."""
    top_p: float
    seed: int
    refresh: str
    """A setting of `overfill.dial`."""

    def options(self) -> dict[str, Any]:
        """Options of `generate`. Raises UserError for a refresh that is none."""
        asked = dial(self.refresh)
        again = {"exact": True} if asked == EXACT else {"refresh": asked}
        if self.temperature > 0:
            return {**again, "do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return {**again, "do_sample": False}


def answer(
    model: str, prompt: str, full: str | None, chat: bool, sampling: Sampling, device: str, decoder: str
) -> None:
    """Print the answer as it is written. Raises UserError for a folder that is no student and a prompt that is empty."""
    folder, options = model_folder(local_place(model)), sampling.options()
    if not prompt:
        raise UserError('the prompt is empty; give a text, for example: overfill generate FOLDER "sort: dbca"')
    verify_model(folder)
    import torch
    from transformers import AutoTokenizer, TextStreamer

    from overfill.two_stage import TwoStageForCausalLM

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no such device on this machine; leave it out to run on the CPU")
    full = full_model_place(folder, full)
    two_stage = TwoStageForCausalLM.from_pretrained(folder, full=full, device=device, decoder=decoder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(folder))
    torch.manual_seed(sampling.seed)
    ids = torch.tensor([prompt_ids(tokenizer, prompt, chat)])
    two_stage.generate(
        ids,
        attention_mask=torch.ones_like(ids),  # an end of turn within a chat may be the padding token too
        max_new_tokens=sampling.max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **options,
    )


def prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Token ids of a prompt, as training had them: through the chat template, up to where the answer begins.

    Raises UserError when there is no template."""
    if not chat:
        return tokenizer(prompt)["input_ids"]
    if tokenizer.chat_template is None:
        raise UserError(f"--chat: the tokenizer of {tokenizer.name_or_path} has no chat template; give --no-chat")
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
