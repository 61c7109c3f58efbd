"""Pieces of a corpus: parts that one task reads on its own, in a fixed order.

A corpus is a list of pieces, and its rows are those of the first piece, then those of the second, and so on. A piece
is a small description that travels to any worker and streams its rows there, so neither the driver nor a task ever
holds a corpus, and the order does not depend on how many tasks read it.

A large file of lines is cut at byte offsets; a line belongs to the piece in which its first byte lies. Compressed files
and JSON arrays cannot be cut: each is one piece (an array is even read at once: JSON lines are the form for large
corpora). A Parquet file is cut into its row groups.
"""

from __future__ import annotations

import contextlib
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
LONGEST_LINE = 64 * 2**20
"""Bytes of a line; a file without line ends must not be read as one row."""

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
        with _readable(self.path), open_binary(self.path) as file:
            if self.path.endswith(".gz"):
                with gzip.open(file) as unzipped:
                    yield from map(parse_line, _lines(unzipped))
                return
            if self.start:
                # A line that begins before `start` belongs to the piece before, also if it ends exactly there.
                file.seek(self.start - 1)
                _skip_line(file)
            yield from map(parse_line, _lines(file, self.stop))


@dataclass(frozen=True)
class ArrayPiece:
    """A file that holds one JSON array of rows."""

    path: str

    def rows(self) -> Iterator[Row]:
        with _readable(self.path), open_binary(self.path) as raw:
            file = gzip.open(raw) if self.path.endswith(".gz") else raw  # noqa: SIM115 - closed with raw
            text = file.read(_ARRAY_BYTES + 1)
        if len(text) > _ARRAY_BYTES:
            raise UserError(
                f"{self.path}: a JSON array of more than 1 GiB; write it as JSON lines, which can be streamed"
            )
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.path}: not a JSON array ({error}); mend the file or write it as JSON lines"
            ) from error
        if not isinstance(rows, list):
            raise UserError(f"{self.path}: not a JSON array; mend the file or write it as JSON lines")
        yield from rows


@dataclass(frozen=True)
class ParquetPiece:
    """A row group of a Parquet file, or some of its columns."""

    path: str
    row_group: int
    columns: tuple[str, ...] | None = None

    def rows(self) -> Iterator[Row]:
        import pyarrow.parquet as pq

        with _readable(self.path), open_binary(self.path) as file, pq.ParquetFile(file) as parquet:
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
    if len(line) > LONGEST_LINE:
        return RowError("malformed", f"a line of more than {LONGEST_LINE >> 20} MiB")
    try:
        return json.loads(line)
    except RecursionError:
        return RowError("malformed", "not JSON that can be read: nested too deeply")
    except ValueError as error:  # UnicodeDecodeError is one, too
        return RowError("malformed", f"not JSON: {error}")


def _lines(file: IO[bytes], stop: int | None = None) -> Iterator[bytes]:
    """The lines that are not blank and begin before `stop`; a line that is too long is cut just above the limit."""
    while stop is None or file.tell() < stop:
        line = file.readline(LONGEST_LINE + 1)
        if not line:
            return
        if len(line) > LONGEST_LINE and not line.endswith(b"\n"):
            _skip_line(file)
        if line.strip():
            yield line


def _skip_line(file: IO[bytes]) -> None:
    """Go to the next line, holding no more than a part of this one."""
    while (part := file.readline(2**20)) and not part.endswith(b"\n"):
        pass


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turn what a file's reader raises about a damaged file into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except (EOFError, OSError, ValueError, zlib.error) as error:  # Arrow's errors are ValueErrors and OSErrors
        lines = str(error).strip().splitlines()
        reason = lines[0][:160] if lines else type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason}); is the file whole? Copy it again") from error
