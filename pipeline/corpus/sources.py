"""Where a corpus comes from: `toy` (generated), `jsonl` and `parquet` (files), `hf` (a Hub dataset at a commit).

A source is two lists of pieces, for training and for testing. Without test files of its own, the test split is a share
of the training rows, chosen by a hash of the question (`pipeline.corpus.rows.belongs_to_test`).

Files. A path is one file, or a folder whose files are told apart by name: those that begin with `train` and those that
begin with `test`; others (a licence, a card) are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from overfill.errors import UserError
from pipeline.config import DataConfig
from pipeline.corpus.files import LINE_SUFFIXES, PARQUET_SUFFIXES, pieces_of_files
from pipeline.corpus.pieces import TOY_PIECE, Piece, ToyPiece
from pipeline.corpus.rows import Message, RowError, RowForm, belongs_to_test
from pipeline.corpus.toy import Split
from pipeline.paths import local_path

TOY_TRAIN_SAMPLES = 20_000


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
        files = corpus_files(local_path(str(config.path), "data.path"), config.source)
        train = pieces_of_files(files["train"], form)
        test = pieces_of_files(files["test"], form) if files["test"] else None
    return CorpusSource(name, train, test, form, config.held_out, config.seed)


def _toy_pieces(config: DataConfig, split: Split, count: int) -> tuple[Piece, ...]:
    starts = range(0, count, TOY_PIECE)
    return tuple(ToyPiece(config.tasks, config.seed, split, i, min(i + TOY_PIECE, count)) for i in starts)


def corpus_files(path: Path, source: str) -> dict[Split, list[str]]:
    """Training and test files of an absolute path (workers have other working folders).

    Raises:
        UserError: there is none, or it cannot be looked at.
    """
    try:
        return _files(path, source)
    except OSError as error:
        raise UserError(f"data.path = {path}: cannot be read ({error.strerror}); give a {source} file") from error


def _files(path: Path, source: str) -> dict[Split, list[str]]:
    suffixes = LINE_SUFFIXES if source == "jsonl" else PARQUET_SUFFIXES
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
