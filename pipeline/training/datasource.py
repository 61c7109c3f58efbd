"""A Ray Data source whose rows are the steps of a training run: one read task per block of consecutive steps."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pyarrow as pa
import ray.data
from ray.data import DataContext, ExecutionResources
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipeline.training.stream import StreamPlan, read_block

CPUS_PER_TASK = 0.05
TASKS_AT_ONCE = 1
"""One is enough: a task reads a block in a fraction of the time that training on it takes."""
BLOCKS_AHEAD = 2
BYTES_IN_FLIGHT = 64 * 2**20


class StepDatasource(Datasource):
    """The steps `first` ... `plan.steps - 1` of one worker, in order."""

    def __init__(self, plan: StreamPlan, first: int) -> None:
        super().__init__()
        self._plan = plan
        self._starts = range(first, plan.steps, plan.steps_per_block)

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._starts)

    def estimate_inmemory_data_size(self) -> int | None:
        """Bytes; unknown, and of no use, because the number of blocks is fixed."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """One task per block, whatever `parallelism` Ray would like."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(read_block, self._plan, start), unknown) for start in self._starts]


def stream_blocks(plan: StreamPlan, first: int) -> Iterator[pa.Table]:
    """The blocks from step `first` on, in order, read ahead by Ray tasks."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=BYTES_IN_FLIGHT)
    source = StepDatasource(plan, first)
    blocks = ray.data.read_datasource(
        source, num_cpus=CPUS_PER_TASK, concurrency=TASKS_AT_ONCE, override_num_blocks=len(source)
    )
    yield from blocks.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=BLOCKS_AHEAD)
