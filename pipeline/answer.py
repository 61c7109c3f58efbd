"""`overfill generate`: a prompt through a two-stage model, its answer streamed to the terminal."""

from __future__ import annotations

from pathlib import Path

from overfill.errors import UserError
from pipeline.stages.folders import model_folder, tokenizer_folder


def answer(
    model: str,
    prompt: str,
    full: str | None,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    device: str,
) -> None:
    """Print the answer as it is written. Raises UserError for a folder that is no student and a prompt that is empty."""
    folder = model_folder(Path(model).expanduser())
    if not prompt:
        raise UserError('the prompt is empty; give a text, for example: overfill generate FOLDER "sort: dbca"')
    import torch
    from transformers import AutoTokenizer, TextStreamer

    from overfill.two_stage import TwoStageForCausalLM

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no such device on this machine; leave it out to run on the CPU")
    two_stage = TwoStageForCausalLM.from_pretrained(folder, full=full, device=device)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(folder))
    torch.manual_seed(seed)
    two_stage.generate(
        torch.tensor([prompt_ids(tokenizer, prompt, chat)]),
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **(
            {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
        ),
    )


def prompt_ids(tokenizer: object, prompt: str, chat: bool) -> list[int]:
    """Token ids of a prompt, as training had them: through the chat template, up to where the answer begins."""
    if not chat:
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
