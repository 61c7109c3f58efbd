"""Which parameters a supported model has, and along which axes they may be cut. No torch.

One table for all architectures: a parameter is a name and, per dimension of its tensor, the axis that it runs along.
Width pruning (OverFill, arXiv 2508.08446, section 3; after Minitron, arXiv 2407.14679) removes hidden channels, the
same ones everywhere because the residual stream is shared, and intermediate channels, chosen per layer. All other axes
stay whole; above all `KEYS`, the rows of the key and value projections (KV heads x head dim), because the student
attends to a cache that the full model wrote. A tensor is cut along an axis if and only if the table says `HIDDEN` or
`INTERMEDIATE` there, so the KV geometry cannot change without a change of this table.

Source: the modules of `transformers.models.{llama,mistral,qwen2,qwen3}`. Linear weights are [out, in].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from overfill.errors import UserError
from overfill.shapes import ModelShape


class Axis(StrEnum):
    """What a dimension of a parameter counts."""

    HIDDEN = "hidden"
    """Channels of the residual stream: cut, the same channels in every layer."""
    INTERMEDIATE = "intermediate"
    """Channels between the MLP's matrices: cut, layer by layer."""
    QUERIES = "queries"
    """Query heads x head dim: whole."""
    KEYS = "keys"
    """KV heads x head dim: whole; the geometry of the cache."""
    HEAD = "head"
    """Head dim: whole."""
    VOCABULARY = "vocabulary"
    """Tokens: whole."""


CUT = frozenset({Axis.HIDDEN, Axis.INTERMEDIATE})

Axes = tuple[Axis, ...]
Condition = Callable[[ModelShape], bool]


def _always(shape: ModelShape) -> bool:
    return True


@dataclass(frozen=True)
class ParameterRule:
    """One row of the table; `present` says for which models the parameter exists."""

    axes: Axes
    present: Condition = _always


_OUTER: Mapping[str, ParameterRule] = {
    "model.embed_tokens.weight": ParameterRule((Axis.VOCABULARY, Axis.HIDDEN)),
    "model.norm.weight": ParameterRule((Axis.HIDDEN,)),
    # Tied, the output head is the embedding itself and no parameter of its own.
    "lm_head.weight": ParameterRule((Axis.VOCABULARY, Axis.HIDDEN), lambda shape: not shape.tied),
}

_LAYER: Mapping[str, ParameterRule] = {
    "input_layernorm.weight": ParameterRule((Axis.HIDDEN,)),
    "self_attn.q_proj.weight": ParameterRule((Axis.QUERIES, Axis.HIDDEN)),
    "self_attn.q_proj.bias": ParameterRule((Axis.QUERIES,), lambda shape: shape.attention_bias),
    "self_attn.k_proj.weight": ParameterRule((Axis.KEYS, Axis.HIDDEN)),
    "self_attn.k_proj.bias": ParameterRule((Axis.KEYS,), lambda shape: shape.attention_bias),
    "self_attn.v_proj.weight": ParameterRule((Axis.KEYS, Axis.HIDDEN)),
    "self_attn.v_proj.bias": ParameterRule((Axis.KEYS,), lambda shape: shape.attention_bias),
    "self_attn.q_norm.weight": ParameterRule((Axis.HEAD,), lambda shape: shape.qk_norm),
    "self_attn.k_norm.weight": ParameterRule((Axis.HEAD,), lambda shape: shape.qk_norm),
    "self_attn.o_proj.weight": ParameterRule((Axis.HIDDEN, Axis.QUERIES)),
    "self_attn.o_proj.bias": ParameterRule((Axis.HIDDEN,), lambda shape: shape.output_bias),
    "post_attention_layernorm.weight": ParameterRule((Axis.HIDDEN,)),
    "mlp.gate_proj.weight": ParameterRule((Axis.INTERMEDIATE, Axis.HIDDEN)),
    "mlp.gate_proj.bias": ParameterRule((Axis.INTERMEDIATE,), lambda shape: shape.mlp_bias),
    "mlp.up_proj.weight": ParameterRule((Axis.INTERMEDIATE, Axis.HIDDEN)),
    "mlp.up_proj.bias": ParameterRule((Axis.INTERMEDIATE,), lambda shape: shape.mlp_bias),
    "mlp.down_proj.weight": ParameterRule((Axis.HIDDEN, Axis.INTERMEDIATE)),
    "mlp.down_proj.bias": ParameterRule((Axis.HIDDEN,), lambda shape: shape.mlp_bias),
}


@dataclass(frozen=True)
class Architecture:
    """Where an architecture departs from the table that all share."""

    name: str
    attention_bias: bool | None
    """Biases of the query, key and value projections; None: the config's `attention_bias` says."""
    output_bias: bool | None
    """Bias of the attention's output projection; None: as `attention_bias` of the config."""
    mlp_bias: bool | None
    """Biases of the MLP; None: the config's `mlp_bias` says."""
    qk_norm: bool
    """An RMS norm over the head dim on queries and keys."""
    default_window: int | None
    """Sliding window, in tokens, of a config that does not mention one."""


ARCHITECTURES: Mapping[str, Architecture] = {
    row.name: row
    for row in (
        Architecture("llama", attention_bias=None, output_bias=None, mlp_bias=None, qk_norm=False, default_window=None),
        Architecture(
            "mistral", attention_bias=False, output_bias=False, mlp_bias=False, qk_norm=False, default_window=4096
        ),
        Architecture(
            "qwen2", attention_bias=True, output_bias=False, mlp_bias=False, qk_norm=False, default_window=None
        ),
        Architecture("qwen3", attention_bias=None, output_bias=None, mlp_bias=False, qk_norm=True, default_window=None),
    )
}


@dataclass(frozen=True)
class Parameter:
    """One tensor of one model."""

    name: str
    axes: Axes
    shape: tuple[int, ...]
    layer: int | None
    """Layer that it belongs to; None for the embedding, the last norm and the output head."""


def checked_shape(config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
    """The shape of a model that can be cut, from its `transformers` config.

    Raises UserError for an architecture outside `ARCHITECTURES`, a multi-modal model, a sliding window, quantised
    weights, heads that do not divide.
    """
    for part in ("vision_config", "audio_config", "text_config"):
        if config.get(part):
            raise UserError(f"{where}: {part} marks a multi-modal model; give a text model ({_known()})")
    name = config.get("model_type")
    if name not in ARCHITECTURES:
        raise UserError(f"{where}: model_type {name!r} is not supported; known: {_known()}")
    if config.get("quantization_config"):
        raise UserError(f"{where}: quantised weights cannot be cut; give the model in bf16 or fp32")
    row = ARCHITECTURES[name]
    window = _window(config, row)
    if window is not None:
        raise UserError(
            f"{where}: sliding_window {window} is not supported, the student reads the whole prompt's cache; "
            "give a model with full attention in every layer"
        )
    shape = _with_switches(ModelShape.from_config(config, where), config, row)
    if shape.heads % shape.kv_heads:
        raise UserError(f"{where}: num_key_value_heads {shape.kv_heads} does not divide the {shape.heads} heads")
    return shape


def parameters(shape: ModelShape) -> dict[str, Parameter]:
    """Every parameter of a model of this shape by its name in `transformers`, embedding first, layer by layer."""
    sizes = axis_sizes(shape)

    def rows(table: Mapping[str, ParameterRule], prefix: str, layer: int | None) -> dict[str, Parameter]:
        return {
            prefix + name: Parameter(prefix + name, rule.axes, tuple(sizes[axis] for axis in rule.axes), layer)
            for name, rule in table.items()
            if rule.present(shape)
        }

    outer = rows(_OUTER, "", None)
    embedding = {"model.embed_tokens.weight": outer.pop("model.embed_tokens.weight")}
    layers = [rows(_LAYER, f"model.layers.{layer}.", layer) for layer in range(shape.layers)]
    return {name: parameter for part in (embedding, *layers, outer) for name, parameter in part.items()}


def axis_sizes(shape: ModelShape) -> dict[Axis, int]:
    """The length of every axis."""
    return {
        Axis.HIDDEN: shape.hidden,
        Axis.INTERMEDIATE: shape.intermediate,
        Axis.QUERIES: shape.heads * shape.head_dim,
        Axis.KEYS: shape.kv_heads * shape.head_dim,
        Axis.HEAD: shape.head_dim,
        Axis.VOCABULARY: shape.vocabulary,
    }


def same_cache_geometry(one: ModelShape, other: ModelShape) -> bool:
    """Whether a model of shape `one` can continue on a cache that a model of shape `other` wrote."""
    return (one.layers, one.kv_heads, one.head_dim) == (other.layers, other.kv_heads, other.head_dim)


def is_derived(name: str) -> bool:
    """Whether a stored tensor is a buffer that old checkpoints carry and `transformers` computes from the config."""
    return name.endswith("rotary_emb.inv_freq")


def _known() -> str:
    return ", ".join(ARCHITECTURES)


def _window(config: Mapping[str, Any], row: Architecture) -> int | None:
    """The sliding window in tokens if any layer uses one. Qwen configs carry a number beside a switch that is off."""
    window = config.get("sliding_window", row.default_window)
    if "sliding_attention" in (config.get("layer_types") or ()):
        return int(window or 0)
    switched_on = config.get("use_sliding_window", row.name == "mistral")
    return int(window) if switched_on and window else None


def _with_switches(shape: ModelShape, config: Mapping[str, Any], row: Architecture) -> ModelShape:
    def switch(fixed: bool | None, key: str) -> bool:
        return bool(config.get(key, False)) if fixed is None else fixed

    return replace(
        shape,
        attention_bias=switch(row.attention_bias, "attention_bias"),
        output_bias=switch(row.output_bias, "attention_bias"),
        mlp_bias=switch(row.mlp_bias, "mlp_bias"),
        qk_norm=row.qk_norm,
    )
