"""Distillation: what the full model says about a batch, and what the student loses against it.

One pass of the full model over prompt and response yields everything: the prompt's keys and values (the cache that the
student continues), the response's (the KV match), and the hidden states that predict the response (the KL). Logits are
computed from the latter piece by piece (`overfill.losses`).

What the student reads, and what it must predict, with a response y1..yR:

- `overfill`: y1..y(R-1) on the full model's prompt cache, targets y2..yR. The first token is the full model's own, at
  inference as in training (OverFill, arXiv 2508.08446, section 3.2).
- `pruned`, `scratch`: prompt and response by itself, targets y1..yR.
- `pretrain`: as `pruned`, without a full model; prompt tokens may be targets too.

`DistillationModel` is the module that a training engine wraps. Everything inside is done by calling submodules, in an
order and number that depend on the configuration alone, so ZeRO-3 workers with different tokens stay in step. A batch
of dummy rows yields zeros that are connected to every parameter.

Letters: B batch, P prompt, R response, L layers, H KV heads, K head dim, D full width, d pruned width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from overfill.batch import PromptResponseBatch
from overfill.config import LossConfig
from overfill.kv_cache import PrefixCache
from overfill.losses import Head, KVStates, kv_match, vocabulary_losses

TrainingMethod = Literal["overfill", "pruned", "scratch", "pretrain"]

LossTerms = dict[str, tuple[Tensor, Tensor]]
"""Name -> (sum over tokens, number of tokens): fp32 and int64 scalars. `loss` is the weighted sum to differentiate,
`ce` is always there, `kl` and `kv` where their weight is above 0."""


@dataclass(frozen=True)
class TeacherPass:
    """What one forward pass of the full model leaves behind. No gradients."""

    states: KVStates
    """Per layer keys and values [B, H, P + R - 1, K], keys rotated."""
    hidden: Tensor
    """[B, R, D]: final hidden states at the positions that predict y1..yR."""
    prompt_width: int
    """P."""

    def prompt_states(self) -> KVStates:
        """Per layer keys and values [B, H, P, K] of the prompt."""
        return [(k[:, :, : self.prompt_width], v[:, :, : self.prompt_width]) for k, v in self.states]

    def response_states(self) -> KVStates:
        """Per layer keys and values [B, H, R - 1, K] of y1..y(R-1)."""
        return [(k[:, :, self.prompt_width :], v[:, :, self.prompt_width :]) for k, v in self.states]


def teacher_pass(full: PreTrainedModel, batch: PromptResponseBatch) -> TeacherPass:
    """Run the full model once over prompt and response, without logits and without a graph."""
    # Without a config the cache keeps all states of sliding layers too: the KV match needs each token's.
    cache = DynamicCache()
    with torch.no_grad():
        hidden = full.base_model(
            input_ids=batch.read_ids,
            attention_mask=batch.read_mask,
            position_ids=batch.read_positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
    states = [(layer.keys, layer.values) for layer in cache.layers]
    return TeacherPass(states, hidden[:, batch.prompt_width - 1 :], batch.prompt_width)


class TeacherModel(nn.Module):
    """The full model as a module whose forward is `teacher_pass`, for an engine that shards it (ZeRO-3)."""

    def __init__(self, full: PreTrainedModel) -> None:
        super().__init__()
        self.full = full

    def forward(self, batch: PromptResponseBatch) -> TeacherPass:
        """See `teacher_pass`."""
        return teacher_pass(self.full, batch)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        return self.full.get_output_embeddings()(hidden)


@dataclass(frozen=True)
class _Reading:
    """What the student made of a batch: which states predict which tokens, and the states that it cached."""

    hidden: Tensor
    """[B, T, d]."""
    targets: Tensor
    """[B, T]."""
    target_mask: Tensor
    """[B, T]."""
    full_hidden: Tensor | None
    """[B, T, D]: the full model's states at the same positions."""
    states: KVStates | None
    """Per layer the student's own keys and values [B, H, R - 1, K] of y1..y(R-1)."""


class DistillationModel(nn.Module):
    """A student and its training losses."""

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__()
        self.student = student

    def enable_activation_checkpointing(self) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations; the gradients are the same.

        `transformers` takes the cache away from checkpointed layers because a growing cache would grow twice.
        `PrefixCache` does not grow, so the layers may keep it.
        """
        self.student.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        for module in self.student.modules():
            if hasattr(module, "_can_checkpoint_with_cache"):
                module._can_checkpoint_with_cache = True

    def forward(
        self,
        batch: PromptResponseBatch,
        teacher: TeacherPass | None,
        full_head: Head | None,
        method: TrainingMethod,
        loss: LossConfig,
        kv_second_moment: Tensor | None = None,
        chunks: int = 8,
        prompt_targets: bool = False,
    ) -> LossTerms:
        """Losses of one micro-batch as sums over its target tokens.

        Args:
            teacher: of the same batch; None only where nothing needs it (`pretrain`, or plain CE of the student alone).
            full_head: the full model's hidden states [N, D] -> logits [N, V]; needed if `loss.kl` is above 0.
            kv_second_moment: [L, 2] from calibration; needed if `loss.kv` is above 0.
            chunks: pieces in which logits are computed; memory against calls, never the result.
            prompt_targets: `pretrain` only: learn the prompt's tokens too.

        Raises:
            ValueError: a weight is above 0 and what its term needs is missing.
        """
        _check_inputs(teacher, full_head, method, loss, kv_second_moment, prompt_targets)
        if method == "overfill":
            assert teacher is not None
            reading = self._continue_full_model(batch, teacher, keep_states=loss.kv > 0)
        else:
            reading = self._read_alone(batch, teacher, keep_states=loss.kv > 0, prompt_targets=prompt_targets)
        return self._losses(batch, reading, teacher, full_head, loss, kv_second_moment, chunks)

    def _continue_full_model(self, batch: PromptResponseBatch, teacher: TeacherPass, *, keep_states: bool) -> _Reading:
        keys, values = zip(*teacher.prompt_states(), strict=True)
        cache = PrefixCache(keys, values, keep_new=keep_states)
        hidden = self.student.base_model(
            input_ids=batch.response_ids[:, :-1],
            attention_mask=batch.read_mask,
            position_ids=batch.response_positions[:, :-1],
            past_key_values=cache,
            use_cache=False,
        ).last_hidden_state
        return _Reading(
            hidden=hidden,
            targets=batch.response_ids[:, 1:],
            target_mask=batch.response_mask[:, 1:],
            full_hidden=teacher.hidden[:, 1:],
            states=cache.new_states() if keep_states else None,
        )

    def _read_alone(
        self, batch: PromptResponseBatch, teacher: TeacherPass | None, *, keep_states: bool, prompt_targets: bool
    ) -> _Reading:
        prompt = batch.prompt_width
        like = next(self.student.parameters())
        cache = PrefixCache.empty(self.student.config, len(batch.prompt_ids), like) if keep_states else None
        hidden = self.student.base_model(
            input_ids=batch.read_ids,
            attention_mask=batch.read_mask,
            position_ids=batch.read_positions,
            past_key_values=cache,
            use_cache=False,
        ).last_hidden_state
        states = [(k[:, :, prompt:], v[:, :, prompt:]) for k, v in cache.new_states()] if cache is not None else None
        if prompt_targets:
            targets = torch.cat([batch.prompt_ids[:, 1:], batch.response_ids], dim=1)
            # A prompt token is a target if the token before it is real too.
            mask = torch.cat([batch.prompt_mask[:, 1:] & batch.prompt_mask[:, :-1], batch.response_mask], dim=1)
            real_rows = batch.response_mask.any(1, keepdim=True)
            return _Reading(hidden, targets, mask & real_rows, None, states)
        full_hidden = teacher.hidden if teacher is not None else None
        return _Reading(hidden[:, prompt - 1 :], batch.response_ids, batch.response_mask, full_hidden, states)

    def _losses(
        self,
        batch: PromptResponseBatch,
        reading: _Reading,
        teacher: TeacherPass | None,
        full_head: Head | None,
        loss: LossConfig,
        kv_second_moment: Tensor | None,
        chunks: int,
    ) -> LossTerms:
        with_kl = loss.kl > 0 and reading.full_hidden is not None
        mask = reading.target_mask
        sums = vocabulary_losses(
            self.student.get_output_embeddings(),
            reading.hidden[mask],
            reading.targets[mask],
            loss,
            full_head=full_head if with_kl else None,
            full_hidden=reading.full_hidden[mask] if with_kl and reading.full_hidden is not None else None,
            chunks=chunks,
        )
        tokens = mask.sum()
        terms: LossTerms = {"ce": (sums.ce, tokens)}
        total = sums.total
        if with_kl:
            terms["kl"] = (sums.kl, tokens)
        if reading.states is not None and teacher is not None and kv_second_moment is not None:
            # A token whose successor is real was read for a purpose; the last one's states serve nobody.
            read = batch.response_mask[:, 1:]
            kv = kv_match(reading.states, teacher.response_states(), kv_second_moment, read)
            total = total + loss.kv * kv
            terms["kv"] = (kv.detach(), read.sum())
        terms["loss"] = (total, tokens)
        return terms


def _check_inputs(
    teacher: TeacherPass | None,
    full_head: Head | None,
    method: TrainingMethod,
    loss: LossConfig,
    kv_second_moment: Tensor | None,
    prompt_targets: bool,
) -> None:
    """Say which input a configuration lacks. `pretrain` has no teacher, so only its CE can have a weight."""
    if method == "pretrain":
        if teacher is not None or loss.kl > 0 or loss.kv > 0:
            raise ValueError("pretrain has no full model: pass teacher=None and LossConfig(kl=0, kv=0, ce=1)")
        return
    if prompt_targets:
        raise ValueError(f"prompt_targets is for pretrain; {method} learns responses only")
    if method == "overfill" and teacher is None:
        raise ValueError("overfill continues the full model's cache: pass its teacher_pass")
    if loss.kl > 0 and (teacher is None or full_head is None):
        raise ValueError("the KL term needs the full model's pass and its head")
    if loss.kv > 0 and (teacher is None or kv_second_moment is None):
        raise ValueError("the KV match needs the full model's pass and kv_second_moment from calibration")
