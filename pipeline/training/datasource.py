"""A Ray Data source whose blocks are what given functions return: one read task per function, in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import ray.data
from ray.data import DataContext, ExecutionResources
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipeline.submission.fitting import CPUS_PER_TASK

TASKS_AT_ONCE = 1
"""One is enough: a task reads a block in a fraction of the time that training on it takes."""
BLOCKS_AHEAD = 2
BYTES_IN_FLIGHT = 64 * 2**20


Read = Callable[[], list[pa.Table]]


class BlockDatasource(Datasource):
    """What `reads` return, in order; each is called once, in a task."""

    def __init__(self, reads: Sequence[Read]) -> None:
        super().__init__()
        self._reads = reads

    def estimate_inmemory_data_size(self) -> int | None:
        """Bytes; unknown, and of no use, because the number of blocks is fixed."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """One task per function, whatever `parallelism` Ray would like."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(read, unknown) for read in self._reads]


def stream_blocks(reads: Sequence[Read]) -> Iterator[pa.Table]:
    """The blocks of `reads`, in order, read ahead by Ray tasks."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=BYTES_IN_FLIGHT)
    blocks = ray.data.read_datasource(
        BlockDatasource(reads), num_cpus=CPUS_PER_TASK, concurrency=TASKS_AT_ONCE, override_num_blocks=len(reads)
    )
    yield from blocks.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=BLOCKS_AHEAD)
