"""Settings of the method: widths, calibration, losses. Frozen, strict, and free of torch.

Each model refuses unknown keys and never edits what the author wrote: what is derived is a function of the config,
not a validator that changes it, so that the config that is hashed is the config that was typed.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator


def _width(value: object) -> int | float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, int) and value >= 1:
            return value
        if 0.0 <= value < 1.0:
            return float(value)
    raise ValueError("a width is a share to remove (0.0 up to below 1.0) or a whole number of channels to keep")


Width = Annotated[int | float, BeforeValidator(_width)]
"""A share of the channels to remove (a float, 0.0 up to below 1.0) or a number of channels to keep (an integer)."""

Method = Literal[
    "full", "overfill", "assisted", "pruned", "lora", "untrained", "untrained-overfill", "scratch", "released"
]
"""What is measured:

- `full`: the full model itself.
- `overfill`: the full model prefills, the student decodes.
- `assisted`: the student of `overfill` drafts, the full model verifies every token: the full model's own text, sooner.
- `pruned`: the student alone, trained on the same tokens.
- `lora`: as `pruned`, but only low-rank adapters are trained, and merged into the student afterwards.
- `untrained`, `untrained-overfill`: the student as it was cut, alone and on the full model's cache.
- `scratch`: the student's shape from a random start, alone, trained on the same tokens.
- `released`: another model that somebody has published, alone."""

Training = Literal["overfill", "pruned", "scratch", "lora"]
"""The ways to train a student."""

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""A linear layer of a decoder layer, by its name in `transformers`."""


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


class LoraConfig(Frozen):
    """Low-rank adapters (arXiv 2106.09685): to each target's weight W is added (alpha / rank) B A, and only A and B,
    of `rank` rows and columns, are trained."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the update of a weight; more learns more and costs more."""
    alpha: Annotated[float, Field(gt=0.0)] = 32.0
    """Scale of the update, divided by the rank."""
    targets: tuple[Projection, ...] = get_args(Projection)
    """Linear layers that get adapters, in every decoder layer."""
    learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    """Peak learning rate of the adapters; empty takes that of the other methods, which is low for adapters: the paper
    trains them with 2e-4."""

    @field_validator("targets")
    @classmethod
    def _each_once(cls, value: tuple[Projection, ...]) -> tuple[Projection, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError("needs at least one linear layer, each once")
        return value


def default_loss(method: Method) -> LossConfig:
    """The loss of a method when the experiment names none: KL for all, plus KV match 3 for `overfill`'s student."""
    return LossConfig(kl=1.0, kv=3.0) if method in ("overfill", "assisted") else LossConfig(kl=1.0)
