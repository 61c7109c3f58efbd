"""Token shards -> the batches of one worker, from any step on, through Ray Data.

Ray Data has no training iterator that can be resumed (ray#37633), so nothing is resumed here: the data set is the steps
from the first wanted one on, and a read task turns step numbers into token ids (`pipeline.training.datasource`). Batch
k is thereby a function of (shards, seed, k) alone (`pipeline.corpus.order`), whatever ran before and on however many
workers; the order of blocks is kept, and the reader checks that the step it gets is the one it expects.

Every worker streams its own rows. Tasks ask for a small share of a CPU, one at a time, so that workers that hold the
CPUs and wait for data cannot starve the tasks that make the data. Several small steps share a block, so that Ray's cost
per task (about 10 ms) is paid once for many of them: a step of 2,048 tokens is waited for 0.4 ms, and reading it in the
worker itself would take 1.2 ms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.corpus.order import EMPTY_SLOT, BatchOrder
from pipeline.corpus.shards import INDEX_NAME, TokenRow, TokenShards
from pipeline.stage import Located, here

TOKENS_PER_BLOCK = 131_072
MOST_STEPS_PER_BLOCK = 64
MOST_BLOCKS = 4096
"""Ray Data plans all tasks of a run before the first one starts, about 0.3 ms for each."""

Row = tuple[NDArray[np.int32], NDArray[np.int32]]


@dataclass(frozen=True)
class StreamPlan:
    """Which rows a worker gets at each step."""

    folder: Path | Located
    """Token shards."""
    sequences_per_batch: int
    """Samples of a global batch."""
    seed: int
    """Seed of the order."""
    steps: int
    """The stream ends before this step."""
    workers: int
    micro_batch: int
    rank: int

    def order(self) -> BatchOrder:
        """The order of the samples."""
        return _opened(self.folder, self.sequences_per_batch, self.seed)[1]

    @property
    def steps_per_block(self) -> int:
        """Steps that a task reads at once."""
        order = self.order()
        tokens = self.sequences_per_batch * float(order.lengths.mean()) / self.workers
        return max(1, min(MOST_STEPS_PER_BLOCK, int(TOKENS_PER_BLOCK / tokens)), -(-self.steps // MOST_BLOCKS))


@dataclass(frozen=True)
class StepRows:
    """One worker's part of one global batch."""

    step: int
    samples: list[NDArray[np.int64]]
    """Per micro-batch the sample number in each slot, -1 for an empty one."""
    rows: list[list[Row | None]]
    """Per micro-batch (prompt ids, response ids) of each slot, None for an empty one."""


def read_step(plan: StreamPlan, step: int) -> StepRows:
    """Read a step's rows from the shards, in this process."""
    shards, order = _opened(plan.folder, plan.sequences_per_batch, plan.seed)
    samples = order.slots(step, plan.workers, plan.micro_batch, plan.rank)
    rows: list[list[Row | None]] = []
    for slots in samples:
        found = iter(shards.read(slots[slots != EMPTY_SLOT]))
        rows.append([None if slot == EMPTY_SLOT else ids_of(next(found)) for slot in slots])
    return StepRows(step, samples, rows)


def stream_steps(plan: StreamPlan, first: int) -> Iterator[StepRows]:
    """The steps `first`, `first + 1`, ... up to `plan.steps`, read ahead by Ray Data tasks.

    Raises RuntimeError when a step comes out of turn."""
    if first >= plan.steps:
        return
    from pipeline.training.datasource import stream_blocks

    expected = first
    starts = range(first, plan.steps, plan.steps_per_block)
    for table in stream_blocks([partial(read_block, plan, start) for start in starts]):
        for step in _unpack(table, plan.micro_batch):
            if step.step != expected:
                raise RuntimeError(f"the data stream yielded step {step.step} where step {expected} was due")
            yield step
            expected += 1
    if expected != plan.steps:
        raise RuntimeError(f"the data stream ended before step {expected} of {plan.steps}")


def read_block(plan: StreamPlan, start: int) -> list[pa.Table]:
    """A block: the steps from `start` on, as one table with a row per slot (a list of one, as Ray Data wants it)."""
    _forget_replaced(plan.folder)
    end = min(plan.steps, start + plan.steps_per_block)
    return [_pack([read_step(plan, step) for step in range(start, end)])]


def _pack(steps: list[StepRows]) -> pa.Table:
    empty = np.empty(0, np.int32)
    slots = [slot for step in steps for micro in step.rows for slot in micro]
    count = [sum(len(micro) for micro in step.rows) for step in steps]
    return pa.table(
        {
            "step": np.repeat([step.step for step in steps], count),
            "sample": np.concatenate([samples for step in steps for samples in step.samples]),
            "prompt": _lists([empty if slot is None else slot[0] for slot in slots]),
            "response": _lists([empty if slot is None else slot[1] for slot in slots]),
        }
    )


def _unpack(table: pa.Table, micro_batch: int) -> Iterator[StepRows]:
    numbers = table.column("step").to_numpy()
    samples = table.column("sample").to_numpy()
    prompts, responses = _arrays(table.column("prompt")), _arrays(table.column("response"))
    for step, start in zip(*np.unique(numbers, return_index=True), strict=True):
        end = int(np.searchsorted(numbers, step, side="right"))
        rows: list[Row | None] = [
            None if samples[i] == EMPTY_SLOT else (prompts[i], responses[i]) for i in range(int(start), end)
        ]
        parts = range(0, end - int(start), micro_batch)
        yield StepRows(
            step=int(step),
            samples=[samples[int(start) + part : int(start) + part + micro_batch] for part in parts],
            rows=[rows[part : part + micro_batch] for part in parts],
        )


def _lists(arrays: list[NDArray[np.int32]]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))


def _arrays(column: pa.ChunkedArray) -> list[NDArray[np.int32]]:
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):
        lists = pa.concat_arrays(lists.chunks)
    # A copy: torch wants arrays that it could write to, and Ray's shared memory is read-only.
    values, offsets = lists.values.to_numpy().copy(), lists.offsets.to_numpy()
    return [values[start:end] for start, end in pairwise(offsets)]


def ids_of(row: TokenRow) -> Row:
    """A row's ids as arrays of their own."""
    return (row.prompt.copy(), row.response.copy())


@lru_cache(maxsize=2)
def _opened(folder: Path | Located, sequences_per_batch: int, seed: int) -> tuple[TokenShards, BatchOrder]:
    place = here(folder)
    _versions[folder] = (place, _version(place))
    shards = TokenShards.open(place)
    return shards, BatchOrder(shards.prompt_lengths, shards.response_lengths, sequences_per_batch, seed)


Version = tuple[int, int] | None
_versions: dict[Path | Located, tuple[Path, Version]] = {}
"""Where shards that this process has opened lie, and which they were."""


def _version(place: Path) -> Version:
    try:
        found = (place / INDEX_NAME).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _forget_replaced(folder: Path | Located) -> None:
    """Forget shards that were damaged and built anew since this process opened them: Ray keeps the processes of its
    tasks, and in those the old files, set aside, go on being read."""
    place, opened = _versions.get(folder, (None, None))
    if place is not None and _version(place) not in (opened, None):
        _opened.cache_clear()
