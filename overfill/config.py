"""Settings of the method: widths, calibration, losses. Frozen, strict, and free of torch.

Each model refuses unknown keys and never edits what the author wrote: what is derived is a function of the config,
not a validator that changes it, so that the config that is hashed is the config that was typed.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _width(value: object) -> int | float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, int) and value >= 1:
            return value
        if 0.0 <= value < 1.0:
            return float(value)
    raise ValueError("a width is a share to remove (0.0 up to below 1.0) or a whole number of channels to keep")


Width = Annotated[int | float, BeforeValidator(_width)]
"""A share of the channels to remove (a float, 0.0 up to below 1.0) or a number of channels to keep (an integer)."""

Method = Literal["overfill", "pruned", "scratch", "full"]
"""`overfill`: the full model prefills, the student decodes. `pruned`: the student alone, trained on the same tokens.
`scratch`: the student's shape from a random start. `full`: the full model itself, untrained by us."""


class Frozen(BaseModel):
    """Base of every config: immutable, unknown keys refused, field docstrings shown in the JSON schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class PruneConfig(Frozen):
    """How narrow the student is. Widths are rounded to legal ones (`overfill.shapes.resolve_widths`)."""

    hidden: Width = 0.0
    """Hidden (residual) channels: share removed (0.45) or number kept (1728). 0.0 keeps all."""
    intermediate: Width = 0.0
    """Intermediate (MLP) channels of every layer: share removed or number kept. 0.0 keeps all."""
    parameters: Annotated[int, Field(strict=True, ge=1)] | None = None
    """Target number of parameters instead of widths: one ratio for both widths is searched that comes closest."""

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> PruneConfig:
        if self.parameters is not None and (self.hidden != 0.0 or self.intermediate != 0.0):
            raise ValueError("give either `parameters` or the widths `hidden` and `intermediate`, not both")
        return self


class ImportanceConfig(Frozen):
    """Calibration: channel importance after Minitron (arXiv 2407.14679, section 2.2)."""

    samples: Annotated[int, Field(ge=1, le=10**15)] = 512
    """Training samples that the full model reads; rankings settle after a few hundred."""
    across: Literal["l2", "mean"] = "l2"
    """How per-sample means of |activation| are aggregated across samples."""


class LossConfig(Frozen):
    """Weights of the training loss. Each term is a mean over response tokens; at least one weight is above 0."""

    kl: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the forward KL divergence from the full model's next-token distribution."""
    kv: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the KV match: the student's keys and values on response tokens against the full model's."""
    ce: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the cross-entropy against the corpus' tokens."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Softmax temperature of both distributions in the KL term (the term is scaled by its square)."""

    @model_validator(mode="after")
    def _some_weight(self) -> LossConfig:
        if self.kl == 0.0 and self.kv == 0.0 and self.ce == 0.0:
            raise ValueError("every weight is 0, so nothing would be trained; set `kl`, `kv` or `ce` above 0")
        return self


def default_loss(method: Method) -> LossConfig:
    """The loss of a method when the experiment names none: KL for all, plus KV match 3 for `overfill`."""
    return LossConfig(kl=1.0, kv=3.0) if method == "overfill" else LossConfig(kl=1.0)
