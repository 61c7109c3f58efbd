"""The samples behind the numbers: every cell's score on every sample of every task, read from the store.

A task whose score is no number per sample (perplexity, BLEU over a corpus) has nothing to pair or to resample: it is in
the rows, and in no comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from pipeline.harness.results import task_scores
from pipeline.reporting.resampling import Scores
from pipeline.reporting.rows import file_of

if TYPE_CHECKING:
    from pipeline.store import Store
    from pipeline.sweep import Cell

HELD_OUT = "exact_match"
"""The task that every evaluated cell has: exact match on the held-out part of the corpus."""

CellScores = Mapping[str, Mapping[str, Scores]]
"""{identity of the cell: {task: {sample: score}}} of every cell that is evaluated."""


def read_scores(cells: Iterable[Cell], store: Store) -> dict[str, dict[str, Scores]]:
    """The scores of every cell that is evaluated."""
    found: dict[str, dict[str, Scores]] = {}
    for cell in cells:
        if cell.identity in found:
            continue
        held_out = _held_out(cell, store)
        own: dict[str, Scores] = {**({} if held_out is None else {HELD_OUT: held_out}), **task_scores(cell, store)}
        if own:
            found[cell.identity] = own
    return found


def _held_out(cell: Cell, store: Store) -> Scores | None:
    import pyarrow.parquet as parquet

    path = file_of(cell, store, "evaluate", "samples.parquet")
    if path is None:
        return None
    # Not read_table: that loads pyarrow.dataset, which loads pandas, which takes longer than everything else here.
    with parquet.ParquetFile(path) as file:
        table = file.read(columns=["sample", "correct"]).to_pydict()
    return dict(zip(table["sample"], map(float, table["correct"]), strict=True))
