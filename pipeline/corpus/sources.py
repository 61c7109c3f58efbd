"""Where a corpus comes from: `toy` (generated), `jsonl` and `parquet` (files), `hf` (a Hub dataset at a commit).

A source is two lists of pieces, for training and for testing. Without test files of its own, the test split is a share
of the training rows, chosen by a hash of the question (`pipeline.corpus.rows.belongs_to_test`).

Files. A path is one file, or a folder whose files are told apart by name: those that begin with `train` and those that
begin with `test`; others (a licence, a card) are left alone.
"""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overfill.errors import UserError
from pipeline.config import DataConfig
from pipeline.corpus.pieces import (
    PIECE_BYTES,
    TOY_PIECE,
    ArrayPiece,
    LinesPiece,
    ParquetPiece,
    Piece,
    ToyPiece,
    open_binary,
)
from pipeline.corpus.rows import Message, RowError, RowForm, belongs_to_test
from pipeline.corpus.toy import Split

if TYPE_CHECKING:
    import pyarrow.parquet as pq

TOY_TRAIN_SAMPLES = 20_000
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".json.gz")
PARQUET_SUFFIXES = (".parquet",)


@dataclass(frozen=True)
class CorpusSource:
    """The pieces of a corpus."""

    name: str
    """How messages call it: `data.path = ...`."""
    train: tuple[Piece, ...]
    test: tuple[Piece, ...] | None
    """None: the test rows are held out of `train`."""
    form: RowForm
    held_out: float
    seed: int

    def split(self, split: Split) -> SplitRows:
        """The rows of one split."""
        if self.test is not None:
            return SplitRows(self.train if split == "train" else self.test, self.form)
        return SplitRows(self.train, self.form, split, self.held_out, self.seed)


@dataclass(frozen=True)
class SplitRows:
    """How to read a split: pieces, the form of their rows and, where one has to be made, the choice of the split."""

    pieces: tuple[Piece, ...]
    form: RowForm
    held_out_split: Split | None = None
    held_out: float = 0.0
    seed: int = 0

    def conversations(self, piece: int) -> Iterator[tuple[object, list[Message] | RowError]]:
        """(row, its conversation or why it has none) for the rows of one piece that are in the split.

        A row without a conversation belongs to the training split.
        """
        for row in self.pieces[piece].rows():
            conversation: list[Message] | RowError
            if isinstance(row, RowError):
                conversation = row
            else:
                try:
                    conversation = self.form.conversation(row)
                except RowError as error:
                    conversation = error
            if self._has(conversation):
                yield row, conversation

    def sound_conversations(self) -> Iterator[list[Message]]:
        """The conversations of all pieces, in order, without those that cannot be used."""
        for piece in range(len(self.pieces)):
            for _, conversation in self.conversations(piece):
                if not isinstance(conversation, RowError):
                    yield conversation

    def _has(self, conversation: list[Message] | RowError) -> bool:
        if self.held_out_split is None:
            return True
        test = not isinstance(conversation, RowError) and belongs_to_test(conversation, self.held_out, self.seed)
        return test == (self.held_out_split == "test")


def open_source(config: DataConfig) -> CorpusSource:
    """The source that a config describes; reads directories and file footers, no rows.

    Raises:
        UserError: files are missing or of an unknown kind, or the Hub dataset cannot be reached.
    """
    columns = config.columns
    form = RowForm(columns.messages, columns.prompt, columns.completion) if columns else RowForm()
    test: tuple[Piece, ...] | None
    if config.source == "toy":
        name = f"data.source = toy ({', '.join(config.tasks)})"
        train = _toy_pieces(config, "train", config.train_samples or TOY_TRAIN_SAMPLES)
        test = _toy_pieces(config, "test", config.test_samples)
    elif config.source == "hf":
        from pipeline.corpus.hub import hub_pieces

        name = f"data.dataset = {config.dataset}"
        train = hub_pieces(config, config.split, form)
        test = hub_pieces(config, config.test_split, form) if config.test_split else None
    else:
        name = f"data.path = {config.path}"
        files = _files(Path(str(config.path)).expanduser(), config.source)
        train = pieces_of_files(files["train"], form)
        test = pieces_of_files(files["test"], form) if files["test"] else None
    return CorpusSource(name, train, test, form, config.held_out, config.seed)


def pieces_of_files(paths: Iterable[str], form: RowForm) -> tuple[Piece, ...]:
    """The pieces of files of lines and Parquet files, in the order given."""
    return tuple(itertools.chain.from_iterable(_pieces_of_file(path, form) for path in paths))


def _toy_pieces(config: DataConfig, split: Split, count: int) -> tuple[Piece, ...]:
    starts = range(0, count, TOY_PIECE)
    return tuple(ToyPiece(config.tasks, config.seed, split, i, min(i + TOY_PIECE, count)) for i in starts)


def _files(path: Path, source: str) -> dict[Split, list[str]]:
    """Training and test files of a path, as absolute paths (workers have other working folders)."""
    suffixes = LINE_SUFFIXES if source == "jsonl" else PARQUET_SUFFIXES
    path = path.absolute()
    if path.is_file():
        if not path.name.endswith(suffixes):
            raise UserError(f"data.path = {path}: not a {source} file; its name must end in {', '.join(suffixes)}")
        return {"train": [str(path)], "test": []}
    if not path.is_dir():
        raise UserError(
            f"data.path = {path}: no such file or folder; give a {source} file or a folder with train files"
        )
    files = sorted(file for file in path.iterdir() if file.is_file() and file.name.endswith(suffixes))
    train = [str(file) for file in files if file.name.startswith("train")]
    if not train:
        found = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
        raise UserError(
            f"data.path = {path}: no training file; a folder needs train{suffixes[0]} (and, if it has one, "
            f"test{suffixes[0]}); found {found}"
        )
    return {"train": train, "test": [str(file) for file in files if file.name.startswith("test")]}


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
        except (EOFError, OSError):
            return False  # a broken archive: reading it says so


def _size(path: str) -> int:
    with open_binary(path) as file:
        return file.seek(0, 2)
