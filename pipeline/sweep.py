"""An experiment's cells: every combination of its axes and seeds, as configs with their stages. Pure; no ray, no torch.

The combinations are drawn here and not by the tuner, so that `plan` knows them before anything runs and a sweep that is
run again has the same cells. Cells that come to the same stages (the full model at every ratio and seed) are one.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from overfill.config import Method
from overfill.errors import UserError
from overfill.shapes import ModelShape, PrunedWidths
from pipeline.config import ExperimentConfig, RangeConfig, SweepConfig
from pipeline.config_io import is_under, validate, with_value
from pipeline.fingerprint import fingerprint
from pipeline.graph import (
    TRAINED_AS,
    WITHOUT_STUDENT,
    cell_stages,
    cell_widths,
    ratio_label,
    released_shape,
    teacher_shape,
)
from pipeline.stage import Stage

if TYPE_CHECKING:
    from pipeline.store import Store

LEAVES = ("evaluate", "tasks", "benchmark")
"""Stages whose results make a cell's row, in the order in which they are run."""
OWN_SECTIONS: dict[Method, str] = {"lora": "distill.lora", "released": "released"}
"""Method -> the section that describes it, and that counts for no other."""


@dataclass(frozen=True)
class Cell:
    """One configuration of a sweep."""

    index: int
    label: str
    """For people: `small · 0.75 · overfill · seed 0`."""
    axes: dict[str, Any]
    """Dotted path -> value, as this cell has it."""
    config: ExperimentConfig
    method: Method
    teacher: str
    ratio: float
    """Share of channels that was asked to be removed; the mean of both widths' where they differ; 0.0 without a student."""
    seed: int | None
    """Seed of distillation; None for methods that train nothing, so that nothing is drawn."""
    shape: ModelShape
    """The full model's shape."""
    widths: PrunedWidths | None
    """The student's widths; None for methods without a student."""
    decodes: ModelShape
    """Shape of the model that writes: the full model, the student, or the released model."""
    stages: tuple[Stage, ...]
    """In topological order."""

    @property
    def identity(self) -> str:
        """Identity of what the cell ends in."""
        return fingerprint([stage.identity for stage in self.leaves])

    @property
    def leaves(self) -> tuple[Stage, ...]:
        """The stages whose results make the cell's row: accuracy and latency."""
        return tuple(stage for stage in self.stages if stage.name in LEAVES)

    def stage(self, name: str) -> Stage | None:
        """The cell's stage of that name, if it has one."""
        return next((stage for stage in self.stages if stage.name == name), None)


def to_build(cell: Cell, leaves: Sequence[str], store: Store) -> list[Stage]:
    """What a cell wants built to have its leaves of these names: those that are not there, and what was altered."""
    others = {leaf.identity for leaf in cell.leaves if leaf.name not in leaves}
    stages = [stage for stage in cell.stages if stage.identity not in others]
    return [s for s in stages if store.is_altered(s) or (s.name in leaves and store.record(s) is None)]


def expand(config: ExperimentConfig, where: str) -> list[Cell]:
    """The cells of an experiment, in the order of its axes (the last axis varies fastest), equal ones once.

    `where` names the file in errors. Raises UserError for an axis whose path or value does not fit."""
    cells: dict[str, Cell] = {}
    for axes, cell_config in cell_configs(config, where):
        cell = _cell(len(cells), axes, cell_config)
        cells.setdefault(cell.identity, cell)
    _refuse_idle_sections(config, list(cells.values()), where)
    return list(cells.values())


def outline(config: ExperimentConfig, where: str) -> list[Cell]:
    """The cells without their stages: what can be said of them where the corpus' files are not, equal ones repeated."""
    cells = [_cell(number, *drawn, staged=False) for number, drawn in enumerate(cell_configs(config, where))]
    _refuse_idle_sections(config, cells, where)
    return cells


def cell_configs(config: ExperimentConfig, where: str) -> Iterator[tuple[dict[str, Any], ExperimentConfig]]:
    """(axes, config) of every combination of axes and seeds. Raises UserError as `expand` does."""
    for axes in combinations(config.sweep):
        values = config.model_dump(mode="python", exclude_unset=True)
        values.pop("sweep", None)
        for path, value in axes.items():
            values = with_value(values, path, value, f"{where}: sweep.axes.{path}")
        for seed in _seeds(config):
            here = f"{where}: in the cell {_describe(axes)}"
            yield axes, validate(ExperimentConfig, {**values, "seed": seed}, here)


def _refuse_idle_sections(config: ExperimentConfig, cells: Sequence[Cell], where: str) -> None:
    """Raise UserError for a section of one method's that no cell has: what it says would change nothing."""
    written = {"lora": config.distill.lora is not None, "released": config.released is not None}
    axis = config.sweep.axes.get("distill.method", ())  # a random search may have drawn none of a method that it could
    named = {cell.method for cell in cells} | (set() if isinstance(axis, RangeConfig) else set(axis))
    for method, section in OWN_SECTIONS.items():
        if written[method] and method not in named:
            raise UserError(
                f"{where}: `{section}` is for the method `{method}`, which no cell has; name it in `distill.method` or on "
                "its axis, or remove the section"
            )


def _seeds(config: ExperimentConfig) -> tuple[int, ...]:
    return config.sweep.seeds if "seeds" in config.sweep.model_fields_set else (config.seed,)


def combinations(sweep: SweepConfig) -> Iterator[dict[str, Any]]:
    """Dotted path -> value for every combination of the grid, or for `samples` random ones."""
    if sweep.search == "grid":
        paths = list(sweep.axes)
        for values in itertools.product(*(sweep.axes[path] for path in paths)):
            yield dict(zip(paths, values, strict=True))
        return
    source = random.Random(sweep.seed)  # noqa: S311 - a search, no secret
    for _ in range(sweep.samples):
        yield {path: _draw(values, source) for path, values in sweep.axes.items()}


def _draw(values: tuple[Any, ...] | RangeConfig, source: random.Random) -> Any:
    if not isinstance(values, RangeConfig):
        return source.choice(values)
    if values.log_uniform is not None:
        low, high = values.log_uniform
        return float(f"{math.exp(source.uniform(math.log(low), math.log(high))):.4g}")
    assert values.uniform is not None  # one of the two is there, by validation
    return round(source.uniform(*values.uniform), 4)


def _cell(index: int, axes: Mapping[str, Any], config: ExperimentConfig, staged: bool = True) -> Cell:
    method, teacher = config.distill.method, config.teacher.label
    shape = teacher_shape(config)
    widths = None if method in WITHOUT_STUDENT else cell_widths(config, shape)
    seed = config.seed if method in TRAINED_AS else None
    counting = {path: value for path, value in axes.items() if _counts(path, method)}
    return Cell(
        index=index,
        label=_label(config, widths, seed, counting),
        axes=counting,
        config=config,
        method=method,
        teacher=teacher,
        ratio=0.0 if widths is None else round((widths.hidden_requested + widths.intermediate_requested) / 2, 4),
        seed=seed,
        shape=shape,
        widths=widths,
        decodes=_decoding_shape(config, shape, widths),
        stages=tuple(cell_stages(config, shape)) if staged else (),
    )


def _label(config: ExperimentConfig, widths: PrunedWidths | None, seed: int | None, axes: Mapping[str, Any]) -> str:
    method, parts = config.distill.method, [config.teacher.label]
    if method == "full":
        return " · ".join([*parts, method])
    if method == "released" and config.released is not None:
        parts += [method, config.released.label]
    if widths is not None:
        parts += [ratio_label(widths), method]
    return " · ".join([*parts, *_other_axes(axes), *([] if seed is None else [f"seed {seed}"])])


def _decoding_shape(config: ExperimentConfig, full: ModelShape, widths: PrunedWidths | None) -> ModelShape:
    if widths is not None:
        return full.pruned(widths.hidden, widths.intermediate)
    return released_shape(config) if config.distill.method == "released" else full


def _counts(path: str, method: Method) -> bool:
    """Whether an axis changes anything for a method: neither do sections of other methods, nor a student for none."""
    for owner, section in OWN_SECTIONS.items():
        if is_under(path, section):
            return method == owner
    if is_under(path, "distill") and path != "distill.method":
        return method in TRAINED_AS
    return method not in WITHOUT_STUDENT or not any(is_under(path, section) for section in ("prune", "calibrate"))


def _other_axes(axes: Mapping[str, Any]) -> list[str]:
    """The axes that teacher, ratio, method and the released model's name do not tell already: `learning_rate 0.001`."""
    told = ("teacher", "prune", "distill.method", "released")
    return [f"{path.split('.')[-1]} {_plain(value)}" for path, value in axes.items() if not path.startswith(told)]


def _plain(value: Any) -> str:
    """An axis' value for a label: `kl 1, kv 3` for a section."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _describe(axes: Mapping[str, Any]) -> str:
    return ", ".join(f"{path}={value}" for path, value in axes.items()) or "of this file"
