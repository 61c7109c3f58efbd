"""Shapes of models as numbers: legal widths, parameters, bytes, floating-point operations. No torch.

A `ModelShape` is read from the `config.json` of a `transformers` model, so a plan can be made for a model that is not
on this machine. Legal widths: hidden channels are a multiple of lcm(attention heads, quantum), because `transformers`
refuses a Llama whose hidden size the heads do not divide and because kernels want aligned rows; intermediate channels
are a multiple of the quantum. The quantum is 64, less for narrow models (a sixteenth of the width, as a power of two).

Operations follow the usual count: a multiply-add is two, a matrix of n weights costs 2 n per token, attention adds
4 x heads x head dim x context per layer and token, training is three times the forward pass (four with recomputation).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from overfill.config import PruneConfig, Width
from overfill.errors import UserError

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
LARGEST_QUANTUM = 64
LARGEST_SIZE = 10**15
"""Upper bound of a size: beyond any model, and products of several are still floats."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer in numbers. Widths in channels, `max_positions` in tokens."""

    architecture: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    attention_bias: bool = False
    """Biases of the query, key and value projections."""
    output_bias: bool = False
    """Bias of the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    max_positions: int = 2048
    sliding_window: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
        """Read a `transformers` config.

        Raises UserError for an architecture outside `ARCHITECTURES`, a missing field, a size that is none."""
        if not isinstance(config, Mapping):
            raise UserError(f"{where}: not a mapping of fields; a transformers config.json is one")
        architecture = config.get("model_type")
        if architecture not in ARCHITECTURES:
            raise UserError(f"{where}: model_type {architecture!r} is not supported; known: {', '.join(ARCHITECTURES)}")
        hidden, heads = _size(config, "hidden_size", where), _size(config, "num_attention_heads", where)
        bias = bool(config.get("attention_bias", False))
        return cls(
            architecture=str(architecture),
            hidden=hidden,
            intermediate=_size(config, "intermediate_size", where),
            layers=_size(config, "num_hidden_layers", where),
            heads=heads,
            kv_heads=_size(config, "num_key_value_heads", where, heads),
            head_dim=_size(config, "head_dim", where, hidden // heads),
            vocabulary=_size(config, "vocab_size", where),
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=architecture == "qwen2" or bias,
            output_bias=architecture in ("llama", "qwen3") and bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=architecture == "qwen3",
            max_positions=_size(config, "max_position_embeddings", where, 2048),
            sliding_window=_sliding_window(config, where),
        )

    def parameters(self) -> int:
        """All parameters; a tied embedding counts once."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * self._layer_parameters() + self.hidden

    def matrix_parameters(self) -> int:
        """Weights that every decoded token multiplies with: all layers and the output head, not the look-up."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = 2 * self.hidden * queries + 2 * self.hidden * keys + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.vocabulary * self.hidden

    def _layer_parameters(self) -> int:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        total = 2 * self.hidden * queries + 2 * self.hidden * keys + 3 * self.hidden * self.intermediate
        total += 2 * self.hidden  # the two norms
        total += (queries + 2 * keys) if self.attention_bias else 0
        total += self.hidden if self.output_bias else 0
        total += (2 * self.intermediate + self.hidden) if self.mlp_bias else 0
        return total + (2 * self.head_dim if self.qk_norm else 0)

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of all weights in `dtype` (a key of `BYTES`)."""
        return self.parameters() * BYTES[dtype]

    def decode_bytes(self, dtype: str, context: int, batch: int = 1) -> int:
        """Bytes that one decode step must read: every matrix once, and each row's KV cache of `context` tokens."""
        return self.matrix_parameters() * BYTES[dtype] + batch * context * self.kv_bytes_per_token(dtype)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of keys and values that one token adds to the cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BYTES[dtype]

    def forward_flops(self, tokens: float, context: float) -> float:
        """Floating-point operations of a forward pass over `tokens` tokens that attend to `context` tokens each."""
        attention = 4 * self.layers * self.heads * self.head_dim * context
        return tokens * (2 * self.matrix_parameters() + attention)

    def pruned(self, hidden: int, intermediate: int) -> ModelShape:
        """The student's shape: other widths, the same KV geometry."""
        return replace(self, hidden=hidden, intermediate=intermediate)


@dataclass(frozen=True)
class PrunedWidths:
    """What a `PruneConfig` means for one model: legal widths, and how far they are from what was asked."""

    hidden: int
    """Hidden channels kept."""
    intermediate: int
    """Intermediate channels kept in every layer."""
    hidden_requested: float
    """Share of hidden channels that was asked to be removed."""
    intermediate_requested: float
    """Share of intermediate channels that was asked to be removed."""
    hidden_effective: float
    """Share of hidden channels that is removed."""
    intermediate_effective: float
    """Share of intermediate channels that is removed."""
    ratio_effective: float
    """Share of all parameters that is removed."""


def quantum(width: int) -> int:
    """The alignment of a width: a power of two, at most 64, about a sixteenth of the width."""
    return min(LARGEST_QUANTUM, 1 << max(0, (width // 16).bit_length() - 1))


def resolve_widths(shape: ModelShape, prune: PruneConfig, where: str = "prune") -> PrunedWidths:
    """Legal widths for a request: the nearest legal width to the requested one, ties upwards; 0.0 keeps all channels.

    Raises UserError when a width exceeds the model's, or when a target parameter count cannot be met within 25 %."""
    if prune.parameters is not None:
        return _widths_for_parameters(shape, prune.parameters, where)
    hidden = _legal(prune.hidden, shape.hidden, math.lcm(shape.heads, quantum(shape.hidden)), f"{where}.hidden")
    intermediate = _legal(prune.intermediate, shape.intermediate, quantum(shape.intermediate), f"{where}.intermediate")
    asked_hidden, asked_intermediate = (
        _share(prune.hidden, shape.hidden),
        _share(prune.intermediate, shape.intermediate),
    )
    return widths_of(shape, hidden, intermediate, asked_hidden, asked_intermediate)


def widths_of(
    shape: ModelShape, hidden: int, intermediate: int, hidden_requested: float, intermediate_requested: float
) -> PrunedWidths:
    """Widths that were resolved before, with their shares; the requested ones as shares to remove."""
    return PrunedWidths(
        hidden=hidden,
        intermediate=intermediate,
        hidden_requested=hidden_requested,
        intermediate_requested=intermediate_requested,
        hidden_effective=1 - hidden / shape.hidden,
        intermediate_effective=1 - intermediate / shape.intermediate,
        ratio_effective=1 - shape.pruned(hidden, intermediate).parameters() / shape.parameters(),
    )


def _share(asked: Width, full: int) -> float:
    return asked if isinstance(asked, float) else 1 - asked / full


def _legal(asked: Width, full: int, multiple: int, where: str) -> int:
    if asked == 0.0 or asked == full:
        return full
    if isinstance(asked, int) and asked > full:
        raise UserError(f"{where}: {asked} channels is more than the model's {full}; give at most {full}")
    wanted = asked if isinstance(asked, int) else full * (1 - asked)
    return min(full, max(multiple, math.floor(wanted / multiple + 0.5) * multiple))


def _widths_for_parameters(shape: ModelShape, target: int, where: str) -> PrunedWidths:
    if target > shape.parameters():
        raise UserError(f"{where}.parameters: {target} is more than the model's {shape.parameters()}")
    candidates = (
        resolve_widths(shape, PruneConfig(hidden=step / 1000, intermediate=step / 1000), where) for step in range(1000)
    )
    best = min(candidates, key=lambda w: abs(shape.pruned(w.hidden, w.intermediate).parameters() - target))
    reached = shape.pruned(best.hidden, best.intermediate).parameters()
    if abs(reached - target) > 0.25 * target:
        raise UserError(f"{where}.parameters: {target} cannot be reached; the nearest legal shape has {reached}")
    return best


def _size(config: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    """A size of a config: a whole number from 1 on. Left out or null, it is the default."""
    value = default if config.get(name) in (None, 0) and default is not None else config.get(name)
    if value is None:
        raise UserError(f"{where}: field '{name}' is missing; a transformers config.json has it")
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_SIZE:
        raise UserError(f"{where}: {name} = {value!r} is no size; give a whole number, 1 or more")
    return value


def _sliding_window(config: Mapping[str, Any], where: str) -> int | None:
    """The window in tokens, if one is in use; Qwen configs carry the number beside a switch that is off."""
    if not config.get("use_sliding_window", config.get("model_type") == "mistral"):
        return None
    return _size(config, "sliding_window", where) if config.get("sliding_window") else None
