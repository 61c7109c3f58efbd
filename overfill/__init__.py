"""OverFill (arXiv 2508.08446): a full model reads the prompt, a width-pruned copy of it writes the answer.

The names below load on first use, so that `import overfill` and reading a config load no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from overfill.config import ImportanceConfig, LossConfig, PruneConfig
    from overfill.errors import UserError
    from overfill.shapes import ModelShape, PrunedWidths, resolve_widths
    from overfill.two_stage import TwoStageForCausalLM

_HOME = {
    "ImportanceConfig": "overfill.config",
    "LossConfig": "overfill.config",
    "ModelShape": "overfill.shapes",
    "PruneConfig": "overfill.config",
    "PrunedWidths": "overfill.shapes",
    "TwoStageForCausalLM": "overfill.two_stage",
    "UserError": "overfill.errors",
    "resolve_widths": "overfill.shapes",
}

__all__ = [
    "ImportanceConfig",
    "LossConfig",
    "ModelShape",
    "PruneConfig",
    "PrunedWidths",
    "TwoStageForCausalLM",
    "UserError",
    "resolve_widths",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'overfill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
