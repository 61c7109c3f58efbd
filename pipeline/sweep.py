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

from overfill.shapes import ModelShape, PrunedWidths
from pipeline.config import ExperimentConfig, RangeConfig, SweepConfig
from pipeline.config_io import validate, with_value
from pipeline.fingerprint import fingerprint
from pipeline.graph import cell_stages, cell_widths, ratio_label, teacher_shape
from pipeline.stage import Stage

if TYPE_CHECKING:
    from pipeline.store import Store

LEAVES = ("evaluate", "tasks", "benchmark")
"""Stages whose results make a cell's row, in the order in which they are run."""


@dataclass(frozen=True)
class Cell:
    """One configuration of a sweep."""

    index: int
    label: str
    """For people: `small · 0.75 · overfill · seed 0`."""
    axes: dict[str, Any]
    """Dotted path -> value, as this cell has it."""
    config: ExperimentConfig
    method: str
    teacher: str
    ratio: float
    """Share of channels that was asked to be removed; the mean of both widths' where they differ; 0.0 for `full`."""
    seed: int | None
    """Seed of distillation; None for `full`, which nothing is drawn for."""
    shape: ModelShape
    """The full model's shape."""
    widths: PrunedWidths | None
    """The student's widths; None for `full`."""
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
    return list(cells.values())


def outline(config: ExperimentConfig, where: str) -> list[Cell]:
    """The cells without their stages: what can be said of them where the corpus' files are not, equal ones repeated."""
    return [_cell(number, *drawn, staged=False) for number, drawn in enumerate(cell_configs(config, where))]


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
    widths = None if method == "full" else cell_widths(config, shape)
    parts = [teacher] if widths is None else [teacher, ratio_label(widths)]
    parts += [method] if widths is None else [method, *_other_axes(axes), f"seed {config.seed}"]
    ratio = 0.0 if widths is None else round((widths.hidden_requested + widths.intermediate_requested) / 2, 4)
    return Cell(
        index=index,
        label=" · ".join(parts),
        axes=dict(axes),
        config=config,
        method=method,
        teacher=teacher,
        ratio=ratio,
        seed=None if widths is None else config.seed,
        shape=shape,
        widths=widths,
        stages=tuple(cell_stages(config, shape)) if staged else (),
    )


def _other_axes(axes: Mapping[str, Any]) -> list[str]:
    """The axes that teacher, ratio and method do not tell already, as `learning_rate 0.001`."""
    told = ("teacher", "prune", "distill.method")
    return [f"{path.split('.')[-1]} {_plain(value)}" for path, value in axes.items() if not path.startswith(told)]


def _plain(value: Any) -> str:
    """An axis' value for a label: `kl 1, kv 3` for a section."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _describe(axes: Mapping[str, Any]) -> str:
    return ", ".join(f"{path}={value}" for path, value in axes.items()) or "of this file"
