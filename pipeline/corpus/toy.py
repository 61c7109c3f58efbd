"""The toy corpus: instructions that a model of less than a million parameters learns in minutes on a CPU.

Every task needs its prompt to be read and understood: which word is wanted, by how much to shift. That is what the
two-stage model is about: a narrow student that reads the prompt itself loses more than one that continues on the full
model's cache, where the work is already done. Sixteen letters and words of a fixed length make the tasks quick to
learn: with 26 letters, or with lengths that vary, a model of this size needs several times the steps.

Sample i of a split is a pure function of (seed, split, i), so any part of the corpus can be made anywhere. The test
split holds the prompts whose hash falls in one part of sixteen, the training split the others: no test prompt is ever
trained on, for any seed. The draws come from BLAKE2, whose output no library version changes.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable, Sequence
from typing import Literal

Split = Literal["train", "test"]

LETTERS = string.ascii_lowercase[:16]
_TEST_PARTS, _PARTS = 1, 16
_ATTEMPTS = 10_000


class Draws:
    """An endless stream of integers from BLAKE2b under a text key."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()
        self._block = 0
        self._buffer = b""

    def below(self, n: int) -> int:
        """An integer in [0, n), n <= 65536."""
        if len(self._buffer) < 4:
            self._buffer = hashlib.blake2b(self._key, salt=self._block.to_bytes(16, "big")).digest()
            self._block += 1
        value, self._buffer = int.from_bytes(self._buffer[:4], "big"), self._buffer[4:]
        return value % n

    def text(self, alphabet: str, length: int) -> str:
        return "".join(alphabet[self.below(len(alphabet))] for _ in range(length))

    def distinct(self, alphabet: str, count: int) -> str:
        """`count` different characters in random order."""
        left = list(alphabet)
        return "".join(left.pop(self.below(len(left))) for _ in range(count))


def _get(draws: Draws) -> tuple[str, str]:
    """The n-th of three words: `get 2: kdapd bmhcc mnijk` -> `bmhcc`."""
    words = [draws.text(LETTERS, 5) for _ in range(3)]
    wanted = draws.below(3)
    return f"get {wanted + 1}: {' '.join(words)}", words[wanted]


def _sort(draws: Draws) -> tuple[str, str]:
    """Different letters in alphabetical order: `sort: kdapbmh` -> `abdhkmp`."""
    letters = draws.distinct(LETTERS, 7)
    return f"sort: {letters}", "".join(sorted(letters))


def _reverse(draws: Draws) -> tuple[str, str]:
    """Different letters backwards: `reverse: kdapbm` -> `mbpadk`."""
    letters = draws.distinct(LETTERS, 6)
    return f"reverse: {letters}", letters[::-1]


def _shift(draws: Draws) -> tuple[str, str]:
    """Every letter replaced by the n-th after it, round the alphabet: `shift 3: aapbmh` -> `ddcepk`."""
    places, letters = 1 + draws.below(3), draws.text(LETTERS, 6)
    moved = (LETTERS[(LETTERS.index(letter) + places) % len(LETTERS)] for letter in letters)
    return f"shift {places}: {letters}", "".join(moved)


def _add(draws: Draws) -> tuple[str, str]:
    """The sum of two numbers: `add: 27 + 458` -> `485`."""
    a, b = draws.below(1000), draws.below(1000)
    return f"add: {a} + {b}", str(a + b)


TASKS: dict[str, Callable[[Draws], tuple[str, str]]] = {
    "get": _get,
    "sort": _sort,
    "reverse": _reverse,
    "shift": _shift,
    "add": _add,
}
"""Task -> function of a stream of draws to (prompt, answer)."""


def belongs_to_test(prompt: str) -> bool:
    """Whether a prompt is in the test split: by its hash alone."""
    return hashlib.blake2b(prompt.encode(), digest_size=2).digest()[0] % _PARTS < _TEST_PARTS


def toy_row(tasks: Sequence[str], seed: int, split: Split, i: int) -> dict[str, str]:
    """Sample i of a split as {"prompt", "completion", "task"}; the tasks take turns.

    Raises:
        ValueError: an unknown task, or a task with (nearly) no prompts in the split.
    """
    task = tasks[i % len(tasks)]
    if task not in TASKS:
        raise ValueError(f"unknown toy task {task!r}; known: {', '.join(TASKS)}")
    draws = Draws(f"{task}/{seed}/{split}/{i}")
    for _ in range(_ATTEMPTS):
        prompt, completion = TASKS[task](draws)
        if belongs_to_test(prompt) == (split == "test"):
            return {"prompt": prompt, "completion": completion, "task": task}
    raise ValueError(f"toy task {task!r} has no prompts in the {split} split")
