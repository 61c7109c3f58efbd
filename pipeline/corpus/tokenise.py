"""What one task of the data stage does: the rows of a piece -> token columns, a batch at a time.

Rows that are skipped stay in the output, with the reason and without tokens: the driver counts them where it counts the
samples, so that counts and samples are cut at the same row when only the first samples are wanted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from pipeline.corpus.chat import ChatEncoder, Sample, load_tokenizer
from pipeline.corpus.rows import RowError, field_names
from pipeline.corpus.sources import SplitRows
from pipeline.stage import Located, here

ROWS_AT_ONCE = 256

RESULT_SCHEMA = pa.schema(
    [
        ("prompt", pa.list_(pa.int32())),
        ("response", pa.list_(pa.int32())),
        ("reference", pa.string()),
        ("skipped", pa.string()),
        ("detail", pa.string()),
        ("fields", pa.string()),
    ]
)
"""`skipped` is null for a sample; else the reason, its `detail`, and the names of the row's `fields`."""
UNREADABLE = "unreadable"
"""In place of a reason: the piece cannot be read, and `detail` tells the user what to do."""

T = TypeVar("T")


@dataclass(frozen=True)
class TokeniseJob:
    """All that a task needs to know; it travels to every worker."""

    rows: SplitRows
    tokenizer: Path | Located
    chat_template: str | None
    max_length: int

    def encoder(self) -> ChatEncoder:
        """The encoder, its tokenizer from this process' cache."""
        return ChatEncoder(load_tokenizer(here(self.tokenizer), self.chat_template), self.max_length)

    def tables(self, piece: int) -> Iterator[pa.Table]:
        """The results for one piece in row order, as tables of `RESULT_SCHEMA`; none for a piece without rows."""
        encoder = self.encoder()
        for rows in batched(self.rows.conversations(piece), ROWS_AT_ONCE):
            sound = [conversation for _, conversation in rows if not isinstance(conversation, RowError)]
            encoded = iter(encoder.encode(sound))
            results = []
            for row, conversation in rows:
                outcomes = [conversation] if isinstance(conversation, RowError) else next(encoded)
                results += [_result(row, outcome) for outcome in outcomes]
            yield pa.Table.from_pylist(results, schema=RESULT_SCHEMA)


def unreadable(message: str) -> pa.Table:
    """One row that says that a piece cannot be read."""
    row = {"prompt": [], "response": [], "reference": "", "skipped": UNREADABLE, "detail": message, "fields": ""}
    return pa.Table.from_pylist([row], schema=RESULT_SCHEMA)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _result(row: object, outcome: Sample | RowError) -> dict[str, object]:
    if isinstance(outcome, Sample):
        return {"prompt": outcome.prompt, "response": outcome.response, "reference": outcome.reference}
    return {
        "prompt": [],
        "response": [],
        "reference": "",
        "skipped": outcome.reason,
        "detail": outcome.detail,
        "fields": field_names(row),
    }
