"""Files of a corpus -> pieces that tasks read on their own: ranges of lines, arrays, Parquet row groups."""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from overfill.errors import UserError
from pipeline.corpus.pieces import PIECE_BYTES, ArrayPiece, LinesPiece, ParquetPiece, Piece, open_binary
from pipeline.corpus.rows import RowForm

if TYPE_CHECKING:
    import pyarrow.parquet as pq

LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".json.gz")
PARQUET_SUFFIXES = (".parquet",)


def pieces_of_files(paths: Iterable[str], form: RowForm) -> tuple[Piece, ...]:
    """The pieces of files of lines and Parquet files, in the order given."""
    return tuple(itertools.chain.from_iterable(_pieces_of_file(path, form) for path in paths))


def _pieces_of_file(path: str, form: RowForm) -> Iterator[Piece]:
    if path.endswith(PARQUET_SUFFIXES):
        yield from _row_groups(path, form)
    elif path.endswith(".gz"):
        yield ArrayPiece(path) if _begins_with_array(path) else LinesPiece(path)
    elif path.endswith(".json") and _begins_with_array(path):
        yield ArrayPiece(path)
    else:
        size = _size(path)
        for start in range(0, max(size, 1), PIECE_BYTES):
            yield LinesPiece(path, start, min(start + PIECE_BYTES, size))


def _row_groups(path: str, form: RowForm) -> Iterator[ParquetPiece]:
    import pyarrow.parquet as pq

    try:
        with open_binary(path) as file, pq.ParquetFile(file) as parquet:
            columns = _columns(parquet, form)
            groups = parquet.metadata.num_row_groups
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise UserError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0][:120]})") from error
    for group in range(groups):
        yield ParquetPiece(path, group, columns)


def _columns(parquet: pq.ParquetFile, form: RowForm) -> tuple[str, ...] | None:
    """The columns that hold the conversation, or None (all) if they are not there: the rows then say what is."""
    wanted = (form.messages,) if form.messages else (form.prompt, form.completion) if form.prompt else ()
    names = [name for name in wanted if name is not None]
    return tuple(names) if names and set(names) <= set(parquet.schema_arrow.names) else None


def _begins_with_array(path: str) -> bool:
    with open_binary(path) as raw:
        file = gzip.open(raw) if path.endswith(".gz") else raw  # noqa: SIM115 - closed with raw
        try:
            return file.read(4096).lstrip().startswith(b"[")
        except (EOFError, OSError, zlib.error):
            return False  # a broken archive: reading it says so


def _size(path: str) -> int:
    with open_binary(path) as file:
        return file.seek(0, 2)
