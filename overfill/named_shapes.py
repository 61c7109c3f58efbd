"""Shapes of published models by name, so that a latency can be measured without their weights. No torch.

The values are those of each model's `config.json`; where the base and the instruction-tuned model differ (positions of
Qwen2.5), the base model's. Token ids are left out: nothing is tokenised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from overfill.config import PruneConfig
from overfill.errors import UserError
from overfill.shapes import ModelShape, PrunedWidths, resolve_widths


def _llama(hidden: int, intermediate: int, layers: int, heads: int, head_dim: int, tied: bool, factor: float) -> Any:
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": factor, "low_freq_factor": 1.0}
    return {
        **_common("llama", hidden, intermediate, layers, heads, 8, 128_256, tied, 131_072, 1e-5),
        "head_dim": head_dim,
        "rope_parameters": {**rope, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    }


def _qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, tied: bool, positions: int, words: int
) -> Any:
    return {
        **_common("qwen2", hidden, intermediate, layers, heads, kv_heads, words, tied, positions, 1e-6),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "use_sliding_window": False,
    }


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> Any:
    return {
        **_common("qwen3", hidden, intermediate, layers, heads, 8, 151_936, tied, 40_960, 1e-6),
        "head_dim": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "use_sliding_window": False,
    }


def _common(
    model_type: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    tied: bool,
    positions: int,
    epsilon: float,
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": positions,
        "rms_norm_eps": epsilon,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 64, tied=True, factor=32.0),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 128, tied=True, factor=32.0),
    "llama-3.1-8b": _llama(4096, 14_336, 32, 32, 128, tied=False, factor=8.0),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, tied=True, positions=32_768, words=151_936),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, tied=True, positions=131_072, words=151_936),
    "qwen2.5-3b": _qwen2(2048, 11_008, 36, 16, 2, tied=True, positions=32_768, words=151_936),
    "qwen2.5-7b": _qwen2(3584, 18_944, 28, 28, 4, tied=False, positions=131_072, words=152_064),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12_288, 36, 32, tied=False),
    "mistral-7b-v0.3": {
        **_common("mistral", 4096, 14_336, 32, 32, 8, 32_768, False, 32_768, 1e-5),
        "head_dim": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "sliding_window": None,
    },
}
"""Name -> fields of the `transformers` config."""


@dataclass(frozen=True)
class NamedShape:
    """A model and perhaps a student of it, in numbers."""

    name: str
    config: dict[str, Any]
    """Fields of the full model's `transformers` config."""
    full: ModelShape
    widths: PrunedWidths | None
    """The student's widths; None: no student."""

    @property
    def student(self) -> ModelShape | None:
        """The student's shape."""
        return None if self.widths is None else self.full.pruned(self.widths.hidden, self.widths.intermediate)


def named_shape(text: str, where: str = "--shape") -> NamedShape:
    """`llama-3.2-3b:0.45` is the 3B model and a student without about 45 % of either width; without `:0.45` no student.

    Raises UserError for an unknown name and for a ratio that is not a number from 0 up to below 1.
    """
    name, colon, ratio = text.strip().partition(":")
    if name not in SHAPES:
        raise UserError(f"{where}: {name!r} is not known; known: {', '.join(SHAPES)}")
    full = ModelShape.from_config(SHAPES[name], name)
    if not colon:
        return NamedShape(name, SHAPES[name], full, None)
    try:
        share = float(ratio)
    except ValueError:
        share = -1.0
    if not 0.0 <= share < 1.0:
        raise UserError(f"{where}: the ratio {ratio!r} is no number from 0 up to below 1; for example {name}:0.45")
    widths = resolve_widths(full, PruneConfig(hidden=share, intermediate=share), where)
    return NamedShape(name, SHAPES[name], full, widths)
