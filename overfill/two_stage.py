"""The two-stage model: the full model prefills, the student decodes (OverFill, arXiv 2508.08446).

    model = TwoStageForCausalLM.from_pretrained("students/llama-3.2-3b_0.45")
    model.generate(**tokenizer(prompts, padding=True, return_tensors="pt"), max_new_tokens=256)

Prompt and response meet where inference meets them: the full model reads up to and including the generation prompt and
yields the first token; that token is the first that the student reads.

Letters: B batch, P prompt, R response, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from overfill.batch import PromptResponseBatch
from overfill.checkpoint import full_model_folder, load_full_model, load_student, read_manifest
from overfill.decode_loop import TwoStageOutput
from overfill.engine import DecodeState, Engine
from overfill.generation import generate


class TwoStageForCausalLM(nn.Module):
    """A full model and a student that share a KV geometry.

    Args:
        decoder: how the student reads one token at a time: `eager`, `compiled`, `auto`; see `overfill.reader`.

    Raises:
        UserError: the student cannot continue the full model's cache, or cannot be compiled here.
    """

    def __init__(self, full: PreTrainedModel, student: PreTrainedModel, decoder: str = "eager") -> None:
        super().__init__()
        self.full = full
        self.student = student
        self.engine = Engine(full, student, decoder)

    @classmethod
    def from_pretrained(
        cls,
        student_folder: str | Path,
        full: str | Path | PreTrainedModel | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        attention: str | None = None,
        decoder: str = "eager",
    ) -> TwoStageForCausalLM:
        """Load a student folder and the full model that its manifest names.

        Args:
            full: where the full model lies if not where the manifest says: a folder, a hub id, or a loaded model (which
                is taken at its word; a folder's weights must be those that the student was cut from).
            dtype: of both models; None: as stored.
            attention: implementation in both models by its `transformers` name ("sdpa", "eager"), for what trains or
                calls them; generation and scoring always attend through `overfill.attention`.
            decoder: `eager`, `compiled`, or `auto`: compiled where that is possible.

        Raises:
            UserError: not a student folder, or the full model cannot be found or does not fit.
        """
        folder = Path(student_folder)
        student = load_student(folder, dtype=dtype, device=device, attention=attention)
        if not isinstance(full, PreTrainedModel):
            location = None if full is None else full_model_folder(full)
            manifest = read_manifest(folder)
            full = load_full_model(manifest, location=location, dtype=dtype, device=device, attention=attention)
        return cls(full.eval(), student.eval(), decoder)

    @property
    def device(self) -> torch.device:
        """Where tokens come out."""
        return self.engine.device

    def prefill(self, prompt_ids: Tensor, prompt_mask: Tensor, room: int) -> tuple[Tensor, DecodeState]:
        """The full model reads left-padded prompts [B, P]: logits [B, V] of the first token, and its cache with room
        for so many tokens more."""
        return self.engine.prefill(prompt_ids, prompt_mask, room)

    def decode_one(self, state: DecodeState, tokens: Tensor) -> Tensor:
        """The student reads one token per row [B], in place on the state: logits [B, V] of the next."""
        return self.engine.decode_one(state, tokens)

    def forward(self, batch: PromptResponseBatch) -> Tensor:
        """Logits [B, R, V] of the responses under teacher forcing: the first token's by the full model, the others' by
        the student. Without gradients; `overfill.distillation` trains, `overfill.scoring` needs less memory."""
        first, state = self.prefill(batch.prompt_ids, batch.prompt_mask, batch.response_width)
        hidden = self.engine.decode_given(state, batch.response_ids[:, :-1].to(self.device))
        with torch.no_grad():
            return torch.cat([first[:, None], self.engine.decode_head(hidden)], dim=1)

    def generate(self, inputs: Tensor | None = None, **options: Any) -> Tensor | TwoStageOutput:
        """Continue prompts; takes what `transformers`' `generate` takes. See `overfill.generation.generate`."""
        return generate(self.engine, inputs, **options)
