"""Token shards: the corpus after tokenisation, in an order that never changes.

A folder holds `part-00000.parquet` ... with columns (sample int64, prompt list<int32>, response list<int32>, reference
string) and `index.parquet` with (sample int64, shard int32, row int32, prompt_length int32, response_length int32),
both in sample order, so that sample i is row i of the index. The index alone decides the order of training
(`pipeline.corpus.order`); token ids are read only for the rows that are asked for.

Reading. A batch is a random set of rows. Row groups are small (64 rows), so that one row costs one short read from a
memory-mapped file, and decoded groups stay in a cache bounded in bytes: a small corpus is soon read from memory alone,
a large one never fills it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from overfill.errors import UserError

SAMPLES_PER_SHARD = 65_536
SAMPLES_PER_GROUP = 64
CACHE_BYTES = 128 * 2**20
INDEX_NAME = "index.parquet"
_INDEX_GROUP = 65_536
_OPEN_FILES = 16

SHARD_SCHEMA = pa.schema(
    [
        pa.field("sample", pa.int64(), nullable=False),
        pa.field("prompt", pa.list_(pa.int32()), nullable=False),
        pa.field("response", pa.list_(pa.int32()), nullable=False),
        pa.field("reference", pa.string(), nullable=False),
    ]
)
INDEX_SCHEMA = pa.schema(
    [
        pa.field("sample", pa.int64(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("prompt_length", pa.int32(), nullable=False),
        pa.field("response_length", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class TokenRow:
    """One sample. The arrays are views of a cache: do not write to them."""

    sample: int
    prompt: NDArray[np.int32]
    """[P] token ids up to and including the generation prompt."""
    response: NDArray[np.int32]
    """[R] token ids of the answer up to and including the end-of-turn token."""
    reference: str
    """The answer as text."""


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"part-{shard:05d}.parquet"


class ShardWriter:
    """Writes samples in the order they come; the bytes depend on the samples alone, not on how they were batched.

    A context manager: leaving it writes the last shard and the index. What an exception leaves behind has no index and
    cannot be opened.
    """

    def __init__(self, folder: Path, samples_per_shard: int = SAMPLES_PER_SHARD) -> None:
        if samples_per_shard % SAMPLES_PER_GROUP:
            raise ValueError(f"samples_per_shard {samples_per_shard} is no multiple of {SAMPLES_PER_GROUP}")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.samples = 0
        self.prompt_tokens = 0
        self.response_tokens = 0
        self._per_shard = samples_per_shard
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self._shard: pq.ParquetWriter | None = None
        self._written = 0
        self._index = pq.ParquetWriter(folder / f"{INDEX_NAME}.unfinished", INDEX_SCHEMA, compression="lz4")
        self._index_pending: list[pa.Table] = []

    def write(self, table: pa.Table) -> None:
        """Append rows with columns prompt, response, reference (others are left out)."""
        if table.num_rows == 0:
            return
        columns = [
            table.column(name).cast(SHARD_SCHEMA.field(name).type) for name in ("prompt", "response", "reference")
        ]
        sample = pa.array(np.arange(self.samples, self.samples + table.num_rows))
        self._pending.append(pa.table([sample, *columns], schema=SHARD_SCHEMA))
        self._pending_rows += table.num_rows
        self.samples += table.num_rows
        while self._pending_rows >= SAMPLES_PER_GROUP:
            self._write_group(SAMPLES_PER_GROUP)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._pending_rows:
            self._write_group(self._pending_rows)
        if self._shard is not None:
            self._shard.close()
        if error is None:
            self._write_index(force=True)
        self._index.close()
        if error is None:
            (self.folder / f"{INDEX_NAME}.unfinished").rename(self.folder / INDEX_NAME)

    def _write_group(self, rows: int) -> None:
        pending = pa.concat_tables(self._pending)
        group, rest = pending.slice(0, rows).combine_chunks(), pending.slice(rows)
        self._pending, self._pending_rows = [rest] if rest.num_rows else [], rest.num_rows
        shard, row = divmod(self._written, self._per_shard)
        if row == 0:
            if self._shard is not None:
                self._shard.close()
            self._shard = pq.ParquetWriter(
                shard_path(self.folder, shard), SHARD_SCHEMA, compression="lz4", use_dictionary=False
            )
        assert self._shard is not None
        self._shard.write_table(group, row_group_size=rows)
        self._written += rows
        self._note_in_index(group, shard, row)

    def _note_in_index(self, group: pa.Table, shard: int, row: int) -> None:
        prompt_lengths = list_lengths(group.column("prompt"))
        response_lengths = list_lengths(group.column("response"))
        self.prompt_tokens += int(prompt_lengths.sum())
        self.response_tokens += int(response_lengths.sum())
        self._index_pending.append(
            pa.table(
                [
                    group.column("sample"),
                    pa.array(np.full(group.num_rows, shard, np.int32)),
                    pa.array(np.arange(row, row + group.num_rows, dtype=np.int32)),
                    pa.array(prompt_lengths),
                    pa.array(response_lengths),
                ],
                schema=INDEX_SCHEMA,
            )
        )
        self._write_index(force=False)

    def _write_index(self, force: bool) -> None:
        if force or len(self._index_pending) * SAMPLES_PER_GROUP >= _INDEX_GROUP:
            if self._index_pending:
                self._index.write_table(pa.concat_tables(self._index_pending).combine_chunks())
            self._index_pending = []


def list_lengths(column: pa.ChunkedArray) -> NDArray[np.int32]:
    """[rows] number of elements in each list of a column."""
    lengths = pa.compute.list_value_length(column)  # pyright: ignore[reportAttributeAccessIssue]
    return lengths.to_numpy().astype(np.int32)


@dataclass(frozen=True)
class _Group:
    """A decoded row group: flat ids and the offsets at which each row begins."""

    prompt: NDArray[np.int32]
    prompt_offsets: NDArray[np.int32]
    response: NDArray[np.int32]
    response_offsets: NDArray[np.int32]
    reference: pa.Array
    bytes: int

    def row(self, sample: int, row: int) -> TokenRow:
        return TokenRow(
            sample=sample,
            prompt=self.prompt[self.prompt_offsets[row] : self.prompt_offsets[row + 1]],
            response=self.response[self.response_offsets[row] : self.response_offsets[row + 1]],
            reference=self.reference[row].as_py(),
        )


class TokenShards:
    """Random access to the samples of a folder of token shards. Thread-safe; pickles as its folder."""

    def __init__(self, folder: Path, index: pa.Table, cache_bytes: int) -> None:
        self.folder = folder
        self.prompt_lengths: NDArray[np.int32] = index.column("prompt_length").to_numpy()
        self.response_lengths: NDArray[np.int32] = index.column("response_length").to_numpy()
        self._shard: NDArray[np.int32] = index.column("shard").to_numpy()
        self._row: NDArray[np.int32] = index.column("row").to_numpy()
        self._cache_bytes = cache_bytes
        self._cached = 0
        self._groups: OrderedDict[tuple[int, int], _Group] = OrderedDict()
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: Path | str, cache_bytes: int = CACHE_BYTES) -> TokenShards:
        """Open the shards of a folder; reads the index only.

        Raises:
            UserError: there is no complete set of shards in the folder.
        """
        folder = Path(folder)
        if not (folder / INDEX_NAME).is_file():
            raise UserError(f"{folder}: no token shards here ({INDEX_NAME} is missing); run the data stage again")
        return cls(folder, pq.read_table(folder / INDEX_NAME), cache_bytes)

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __reduce__(self) -> tuple[object, tuple[Path, int]]:
        return (TokenShards.open, (self.folder, self._cache_bytes))

    @property
    def lengths(self) -> NDArray[np.int32]:
        """[samples] prompt + response length in tokens."""
        return self.prompt_lengths + self.response_lengths

    def read(self, samples: NDArray[np.integer] | Sequence[int]) -> list[TokenRow]:
        """The rows of the given samples, in the order given.

        Raises:
            IndexError: a sample number outside [0, len(self)).
        """
        numbers = np.asarray(samples, dtype=np.int64)
        if numbers.size and not (numbers.min() >= 0 and numbers.max() < len(self)):
            raise IndexError(f"sample numbers must be in [0, {len(self)}), got {numbers.min()} to {numbers.max()}")
        with self._lock:
            return [self._read_one(int(sample)) for sample in numbers]

    def __iter__(self) -> Iterator[TokenRow]:
        """All rows in sample order, a row group at a time."""
        for start in range(0, len(self), SAMPLES_PER_GROUP):
            yield from self.read(np.arange(start, min(start + SAMPLES_PER_GROUP, len(self))))

    def _read_one(self, sample: int) -> TokenRow:
        group, row = divmod(int(self._row[sample]), SAMPLES_PER_GROUP)
        return self._group(int(self._shard[sample]), group).row(sample, row)

    def _group(self, shard: int, group: int) -> _Group:
        key = (shard, group)
        cached = self._groups.get(key)
        if cached is not None:
            self._groups.move_to_end(key)
            return cached
        decoded = _decode(self._file(shard).read_row_group(group, columns=["prompt", "response", "reference"]))
        self._groups[key] = decoded
        self._cached += decoded.bytes
        while self._cached > self._cache_bytes and len(self._groups) > 1:
            _, dropped = self._groups.popitem(last=False)
            self._cached -= dropped.bytes
        return decoded

    def _file(self, shard: int) -> pq.ParquetFile:
        file = self._files.get(shard)
        if file is None:
            file = pq.ParquetFile(shard_path(self.folder, shard), memory_map=True)
            self._files[shard] = file
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        else:
            self._files.move_to_end(shard)
        return file


def _decode(table: pa.Table) -> _Group:
    prompt, response = _flat(table.column("prompt")), _flat(table.column("response"))
    return _Group(*prompt, *response, table.column("reference").combine_chunks(), int(table.nbytes))


def _flat(column: pa.ChunkedArray) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    lists = column.combine_chunks()
    return lists.values.to_numpy(), lists.offsets.to_numpy()


def write_samples(folder: Path, rows: Iterable[tuple[Sequence[int], Sequence[int], str]]) -> TokenShards:
    """Write (prompt ids, response ids, reference) triples as shards and open them: for small corpora and tests."""
    prompts, responses, references = zip(*rows, strict=True)
    with ShardWriter(folder) as writer:
        writer.write(pa.table({"prompt": prompts, "response": responses, "reference": references}))
    return TokenShards.open(folder)
