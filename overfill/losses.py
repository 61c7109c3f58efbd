"""Losses over the vocabulary and over the KV cache, as sums over tokens.

Every loss is a sum and a count, never a mean: sums of micro-batches and workers add up, and the mean is taken once.
Sums are in fp32 whatever the models' dtype.

- KL, forward: T^2 * sum_v p log(p / q), p and q the softmax of the full model's and the student's logits / T. The
  factor T^2 keeps the gradient's scale when T changes (Hinton et al., arXiv 1503.02531, section 2). Forward KL alone is
  the best of the losses that Minitron compares (arXiv 2407.14679, table 12).
- CE: -log q(token) at temperature 1; the negative log-likelihood of the corpus.
- KV match, per token: mean over layers of 1/2 (|k_s - k_t|^2 / E|k_t|^2 + |v_s - v_t|^2 / E|v_t|^2), the norms over
  KV heads and head dim, k_s and k_t the student's and the full model's states of the same response token. E is the full
  model's second moment, measured once in calibration, so the term stays a sum over tokens.

Logits over the vocabulary are the largest tensors of distillation (4,096 tokens x 128,256 x fp32 = 2.1 GB, several
times over). `vocabulary_losses` therefore splits the tokens into a fixed number of chunks and recomputes each chunk's
logits in the backward pass, so that only one chunk's exist at a time. The number is fixed, not the size, and an empty
chunk is computed too: under ZeRO-3 every call of a head gathers its weights from all workers, so all workers must make
the same calls whatever their token counts.

Letters: N tokens, d the student's width, D the full model's, V vocabulary, B batch, R response, L layers, H KV heads,
K head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from overfill.config import LossConfig

Head = Callable[[Tensor], Tensor]
"""Hidden states [..., width] -> logits [..., V]; call the module, never its weight (ZeRO-3 gathers in the call)."""

KVStates = Sequence[tuple[Tensor, Tensor]]
"""Per layer keys and values, each [B, H, R, K]."""


@dataclass(frozen=True)
class VocabularyLosses:
    """Sums over tokens, scalars in fp32."""

    total: Tensor
    """Weighted sum of the terms, to differentiate."""
    kl: Tensor
    """Scaled forward KL, without gradient; 0 without a full model."""
    ce: Tensor
    """Cross-entropy, without gradient."""


def forward_kl(full_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(full || student) per token, [..., V] -> [...] in fp32."""
    return _kl(_log_softmax(full_logits, temperature), _log_softmax(student_logits, temperature), temperature)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log q(target) per token, [N, V] and [N] -> [N] in fp32."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def vocabulary_losses(
    student_head: Head,
    student_hidden: Tensor,
    targets: Tensor,
    loss: LossConfig,
    *,
    full_head: Head | None = None,
    full_hidden: Tensor | None = None,
    chunks: int = 8,
) -> VocabularyLosses:
    """KL and CE of `student_hidden` [N, d] against `full_hidden` [N, D] and `targets` [N], in exactly `chunks` pieces.

    Gradients reach the student only. Without `full_head` and `full_hidden` the KL is 0. N may be 0. A term of weight 0
    is measured and not trained.
    """
    if chunks < 1:
        raise ValueError(f"chunks is {chunks}: it must be at least 1")
    if (full_head is None) != (full_hidden is None):
        raise ValueError("the full model's head and its hidden states come together")
    parts = torch.tensor_split(full_hidden, chunks) if full_hidden is not None else [None] * chunks

    def terms(student_part: Tensor, target_part: Tensor, full_part: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        logits = student_head(student_part)
        log_q = _log_softmax(logits, 1.0)
        ce = -log_q.gather(1, target_part[:, None]).sum()
        kl = ce.new_zeros(())
        total = loss.ce * ce if loss.ce > 0 else kl
        if full_head is not None and full_part is not None:
            with torch.no_grad():
                log_p = _log_softmax(full_head(full_part), loss.temperature)
            if loss.temperature != 1.0:
                log_q = _log_softmax(logits, loss.temperature)
            kl = _kl(log_p, log_q, loss.temperature).sum()
            total = total + loss.kl * kl if loss.kl > 0 else total
        # Detached, so that the graph of a term that is only measured is freed at once: kept in the result, what the
        # backward pass recomputes for it would stay in memory for all chunks together.
        return total, kl.detach(), ce.detach()

    total = kl = ce = torch.zeros((), device=student_hidden.device)
    pieces = zip(torch.tensor_split(student_hidden, chunks), torch.tensor_split(targets, chunks), parts, strict=True)
    for student_part, target_part, full_part in pieces:
        chunk_total, chunk_kl, chunk_ce = checkpoint(terms, student_part, target_part, full_part, use_reentrant=False)
        total, kl, ce = total + chunk_total, kl + chunk_kl, ce + chunk_ce
    return VocabularyLosses(total=total, kl=kl, ce=ce)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities in fp32; no division, hence no copy, at temperature 1."""
    logits = logits.float()
    return F.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def _kl(log_p: Tensor, log_q: Tensor, temperature: float) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * temperature**2


def kv_match(student: KVStates, full: KVStates, second_moment: Tensor, mask: Tensor) -> Tensor:
    """Sum over the tokens of `mask` [B, R] of the KV match (see above), a scalar in fp32.

    Args:
        second_moment: [L, 2], E|k|^2 and E|v|^2 per token of the full model, summed over KV heads and head dim.
    """
    if second_moment.shape != (len(student), 2) or len(student) != len(full):
        raise ValueError(
            f"{len(student)} student layers, {len(full)} full layers, second moments {tuple(second_moment.shape)}: "
            "expected one row of two moments per layer"
        )
    weight = 0.5 / len(student) / second_moment.to(mask.device, torch.float32)
    total = torch.zeros((), device=mask.device)
    for layer, (student_states, full_states) in enumerate(zip(student, full, strict=True)):
        for kind in (0, 1):
            difference = student_states[kind].float() - full_states[kind].detach().float()
            # Masked before it is squared: padding may hold anything, and neither it nor its gradient may leak.
            difference = difference.where(mask[:, None, :, None], 0.0)
            total = total + weight[layer, kind] * difference.square().sum()
    return total
