"""Pieces of a corpus: parts that one task reads on its own, in a fixed order.

A corpus is a list of pieces, and its rows are those of the first piece, then those of the second, and so on. A piece
is a small description that travels to any worker and streams its rows there, so neither the driver nor a task ever
holds a corpus, and the order does not depend on how many tasks read it.

A large file of lines is cut at byte offsets; a line belongs to the piece in which its first byte lies. Compressed files
and JSON arrays cannot be cut: each is one piece (an array is even read at once: JSON lines are the form for large
corpora). A Parquet file is cut into its row groups.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from overfill.errors import UserError
from pipeline.corpus.rows import RowError
from pipeline.corpus.toy import Split, toy_row

PIECE_BYTES = 8 * 2**20
"""A piece of a file of lines, in bytes of text."""
TOY_PIECE = 10_000
"""Samples in a piece of the toy corpus."""
_PARQUET_BATCH = 256
_ARRAY_BYTES = 2**30

Row = Any
"""What a corpus has in a row: a mapping if it is sound, or a `RowError` for a line that cannot be parsed."""


class Piece(Protocol):
    """A part of a corpus."""

    def rows(self) -> Iterator[Row]:
        """The rows, streamed."""
        ...


@dataclass(frozen=True)
class ToyPiece:
    """Samples [start, stop) of a split of the toy corpus."""

    tasks: tuple[str, ...]
    seed: int
    split: Split
    start: int
    stop: int

    def rows(self) -> Iterator[Row]:
        for i in range(self.start, self.stop):
            yield toy_row(self.tasks, self.seed, self.split, i)


@dataclass(frozen=True)
class LinesPiece:
    """The lines of a file of JSON lines that begin in the bytes [start, stop); gzip files are read whole."""

    path: str
    start: int = 0
    stop: int | None = None

    def rows(self) -> Iterator[Row]:
        with open_binary(self.path) as file:
            if self.path.endswith(".gz"):
                yield from _unzipped_rows(file, self.path)
                return
            if self.start:
                # A line that begins before `start` belongs to the piece before, also if it ends exactly there.
                file.seek(self.start - 1)
                file.readline()
            while self.stop is None or file.tell() < self.stop:
                line = file.readline()
                if not line:
                    return
                if line.strip():
                    yield parse_line(line)


@dataclass(frozen=True)
class ArrayPiece:
    """A file that holds one JSON array of rows."""

    path: str

    def rows(self) -> Iterator[Row]:
        with open_binary(self.path) as raw:
            file = gzip.open(raw) if self.path.endswith(".gz") else raw  # noqa: SIM115 - closed with raw
            text = file.read(_ARRAY_BYTES + 1)
        if len(text) > _ARRAY_BYTES:
            raise UserError(
                f"{self.path}: a JSON array of more than 1 GiB; write it as JSON lines, which can be streamed"
            )
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise UserError(
                f"{self.path}: not a JSON array ({error}); mend the file or write it as JSON lines"
            ) from error
        yield from rows


@dataclass(frozen=True)
class ParquetPiece:
    """A row group of a Parquet file, or some of its columns."""

    path: str
    row_group: int
    columns: tuple[str, ...] | None = None

    def rows(self) -> Iterator[Row]:
        import pyarrow.parquet as pq

        with open_binary(self.path) as file, pq.ParquetFile(file) as parquet:
            columns = None
            if self.columns is not None:
                columns = [name for name in self.columns if name in parquet.schema_arrow.names]
            # With threads, Arrow would read ahead more than a task may hold.
            for batch in parquet.iter_batches(
                batch_size=_PARQUET_BATCH, row_groups=[self.row_group], columns=columns, use_threads=False
            ):
                yield from batch.to_pylist()


@dataclass(frozen=True)
class HubPiece:
    """One of the shards of a Hub dataset that is not kept as Parquet or JSON lines, streamed by `datasets`."""

    dataset: str
    subset: str | None
    split: str
    revision: str
    shard: int
    shards: int

    def rows(self) -> Iterator[Row]:
        import datasets

        stream = datasets.load_dataset(
            self.dataset, self.subset, split=self.split, revision=self.revision, streaming=True
        )
        yield from stream.shard(num_shards=self.shards, index=self.shard)


def open_binary(path: str) -> IO[bytes]:
    """Open a local file, or one of the Hub (`hf://datasets/<id>@<revision>/<path>`)."""
    if path.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        return HfFileSystem().open(path, "rb")  # type: ignore[return-value]
    return Path(path).open("rb")


def parse_line(line: bytes) -> Row:
    """A JSON line as a row, or the reason why it is none."""
    try:
        return json.loads(line)
    except ValueError as error:  # UnicodeDecodeError is one, too
        return RowError("malformed", f"not JSON: {error}")


def _unzipped_rows(file: IO[bytes], path: str) -> Iterator[Row]:
    try:
        with gzip.open(file) as lines:
            for line in lines:
                if line.strip():
                    yield parse_line(line)
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path}: cannot be unpacked ({error}); copy the file again") from error
