"""Rows of a corpus -> conversations.

Three forms are understood: a chat under `messages` (or `conversations`, the ShareGPT spelling), a pair under `prompt`
and `completion`, or either under columns that the user names (`data.columns`). A chat is a list of `role`/`content` or
`from`/`value` turns; the content is text or a list of text parts.

Real corpora have bad rows. A row that cannot be used becomes a `RowError` with one of a few reasons, which the data
stage counts; it never ends a run by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
Reason = Literal["empty", "malformed", "too_long", "template"]
"""`empty`: no text to read or to learn. `malformed`: not the expected columns or types. `too_long`: more than
`data.max_length` tokens. `template`: the chat template refused the conversation (roles that do not alternate)."""

Message = dict[str, str]
"""{"role": Role, "content": text}"""

_CHAT_COLUMNS = ("messages", "conversations")
_PAIR_COLUMNS = ("prompt", "completion")
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
}


class RowError(Exception):
    """A row that cannot be used, and why."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason
        self.detail = detail


@dataclass(frozen=True)
class RowForm:
    """Where a row keeps its conversation. All None: the columns are recognised by name, row by row."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None

    def conversation(self, row: object) -> list[Message]:
        """The turns of a row, in order; at least one of them is an assistant's.

        Raises:
            RowError: `malformed` or `empty`.
        """
        if not isinstance(row, Mapping):
            raise RowError("malformed", f"a row must be an object with named fields, got {type(row).__name__}")
        if self.messages is not None:
            return _chat(_field(row, self.messages))
        if self.prompt is not None and self.completion is not None:
            return _pair(_field(row, self.prompt), _field(row, self.completion))
        for column in _CHAT_COLUMNS:
            if column in row:
                return _chat(row[column])
        if all(column in row for column in _PAIR_COLUMNS):
            return _pair(row["prompt"], row["completion"])
        raise RowError("malformed", f"no `messages` and no `prompt` with `completion`; fields: {field_names(row)}")


def field_names(row: object) -> str:
    """The field names of a row, for an error message."""
    if not isinstance(row, Mapping):
        return f"none ({type(row).__name__})"
    return ", ".join(_short(name) for name in list(row)[:12]) or "none"


def _short(value: object) -> str:
    """A value of a row for a message: not too long, and with nothing in it that cannot be written as UTF-8."""
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 60 else f"{text[:57]}..."


def belongs_to_test(conversation: Sequence[Message], held_out: float, seed: int) -> bool:
    """Whether a conversation is held out: a hash of (seed, everything before the first answer).

    The choice depends on no other row, so it is the same however the corpus is read, and two rows that ask the same
    never fall on different sides.
    """
    digest = hashlib.sha256(str(seed).encode())
    for message in conversation:
        if message["role"] == "assistant":
            break
        digest.update(b"\x00" + message["content"].encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest()[:8], "big") < held_out * 2**64


def _field(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise RowError("malformed", f"no field `{name}`; fields: {field_names(row)}")
    return row[name]


def _pair(prompt: object, completion: object) -> list[Message]:
    question, answer = _text(prompt, "prompt"), _text(completion, "completion")
    if not question or not answer:
        raise RowError("empty", f"the {'prompt' if not question else 'completion'} is empty")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _chat(turns: object) -> list[Message]:
    if isinstance(turns, str) or not isinstance(turns, Sequence):
        raise RowError("malformed", f"a chat must be a list of turns, got {type(turns).__name__}")
    messages = [_message(turn) for turn in turns]
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise RowError("empty", "no assistant turn with text")
    if messages[0]["role"] == "assistant":
        raise RowError("malformed", "the chat begins with an assistant turn: there is no prompt")
    return messages


def _message(turn: object) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError("malformed", f"a turn must have `role` and `content`, got {type(turn).__name__}")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise RowError("malformed", f"unknown role {_short(repr(role))}; known: {', '.join(_ROLES)}")
    content = turn["content"] if "content" in turn else turn.get("value")
    return {"role": _ROLES[role.lower()], "content": _text(content, "content")}


def _text(value: object, what: str) -> str:
    """Text without surrounding white space: a prompt ends, and an answer begins, where the template says."""
    if isinstance(value, str):
        return _sound(value.strip(), what)
    if isinstance(value, Sequence):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in value]
        if all(isinstance(part, str) for part in parts):
            return _sound("".join(str(part) for part in parts).strip(), what)
    raise RowError("malformed", f"{what} must be text, got {type(value).__name__}")


def _sound(text: str, what: str) -> str:
    """JSON may hold halves of surrogate pairs (`"\\ud83d"`), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError("malformed", f"{what} holds half of a surrogate pair, which is no character") from error
    return text
