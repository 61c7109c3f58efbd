"""Models with random weights, made in seconds: a latency depends on shapes, not on what the weights say.

A block of normal numbers is drawn once and tiled over every matrix. Its length is a prime, so that the rows of a matrix
are shifts of one another and not copies, and writing memory is all that a 3 B model costs. Matrices have variance
1 / columns and those that write to the residual stream are scaled down with depth, so activations and logits stay of
order one.

Drafting is another matter: what `exact` gains depends on how often the student says what the full model says. Channels
therefore fade, from the first to the last by a factor of e^8, and the student is cut from the full model by
`overfill.surgery` with the first channels kept. At a ratio of 0.45 it chooses the full model's token in 80 to 90 % of
places (shape of Qwen3 0.6B, random prompts), at 0.6 in about 70 %. The measured acceptance rate stands beside the time;
it is that of these models and says nothing about trained ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from overfill.importance import ImportanceScores
from overfill.shapes import ModelShape, PrunedWidths
from overfill.surgery import empty_model, prune

BLOCK = 1_048_573
"""Random numbers that are drawn: the largest prime below 2^20."""
RESIDUAL = ("o_proj.weight", "down_proj.weight")
"""Matrices whose output is added to the residual stream."""
FADE = 8.0
"""The first channel is e^FADE as large as the last, both in the residual stream and within the MLP."""


@torch.no_grad()
def random_model(
    config: Mapping[str, Any], dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> PreTrainedModel:
    """A model of a `transformers` config (its fields, `model_type` among them), in evaluation mode and frozen.

    The same seed gives the same weights; the global random state is left as it was. Nothing is fetched. Norms are one
    and biases zero. Raises UserError for an architecture that is not supported.
    """
    shape = ModelShape.from_config(config)
    fields = {name: value for name, value in config.items() if name != "model_type"}
    model = empty_model(AutoConfig.for_model(shape.architecture, **fields), dtype)
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed))
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(float(name.endswith("norm.weight")))
            continue
        scale = 1 / math.sqrt(parameter.shape[1])
        if name.endswith(RESIDUAL):
            scale /= math.sqrt(2 * shape.layers)
        _tile(parameter, (block * scale).to(dtype))
        if name.endswith(RESIDUAL):
            parameter.mul_(_fade(shape.hidden, dtype)[:, None])
        if name.endswith(("embed_tokens.weight", "down_proj.weight")):
            parameter.mul_(_fade(parameter.shape[1], dtype))
    return model.to(torch.device(device)).eval().requires_grad_(False)


def related_student(full: PreTrainedModel, widths: PrunedWidths) -> PreTrainedModel:
    """The student that keeps the first channels of a model that `random_model` made; frozen, in evaluation mode."""
    shape = ModelShape.from_config(full.config.to_dict())
    # Of equal scores the lower channel is kept.
    scores = ImportanceScores(
        hidden=torch.zeros(shape.hidden, dtype=torch.float64),
        intermediate=torch.zeros(shape.layers, shape.intermediate, dtype=torch.float64),
        kv_second_moment=torch.ones(shape.layers, 2, dtype=torch.float64),
        samples=1,
        tokens=1,
    )
    student, _ = prune(full, scores, widths)
    # The channels cut hold next to nothing, but a norm divides by the mean over those that are left.
    for name, parameter in student.named_parameters():
        if name.endswith(("layernorm.weight", "model.norm.weight")):
            parameter.data.mul_(math.sqrt(shape.hidden / widths.hidden))
    return student.requires_grad_(False)


def _fade(channels: int, dtype: torch.dtype) -> Tensor:
    """Falling factors [channels] with a mean square of one."""
    falling = torch.exp(-FADE * torch.arange(channels) / channels)
    return (falling / falling.square().mean().sqrt()).to(dtype)


def _tile(target: Tensor, block: Tensor) -> None:
    """Fill a contiguous tensor with copies of a block, the last one cut off."""
    flat = target.view(-1)
    whole = flat.numel() // len(block)
    flat[: whole * len(block)].view(whole, len(block)).copy_(block.expand(whole, -1))
    flat[whole * len(block) :].copy_(block[: flat.numel() - whole * len(block)])
