"""How often the full model is asked again while the student writes: a setting, in words. Loads no torch.

Between never asking again and asking for every token lies this dial (`overfill.refresh`); at its end the student only
drafts and the full model verifies (`overfill.speculative`).

- `none`: the student writes alone after the first token;
- `64`: the full model re-reads every 64 tokens;
- `entropy>2.0`: it re-reads when the student's distribution of the next token has more than 2 nats of entropy;
- `exact`: it verifies every token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from overfill.errors import UserError

NONE, EXACT = "none", "exact"


@dataclass(frozen=True)
class Refresh:
    """When to refresh; exactly one of the two is set."""

    every: int | None = None
    """Tokens between refreshes, at least 1."""
    entropy: float | None = None
    """Nats."""

    @classmethod
    def parse(cls, value: int | str | None) -> Refresh | None:
        """`64`, `"64"`, `"entropy>2.0"`; None, `"none"` for no refresh.

        Raises:
            UserError: anything else.
        """
        text = str(value).strip().lower()
        if text == "none":
            return None
        gate = re.fullmatch(r"entropy\s*>\s*([0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})", text)
        if gate:
            return cls(entropy=float(gate.group(1)))
        if isinstance(value, bool) or not re.fullmatch(r"[1-9][0-9]{0,14}", text):
            raise UserError(f"refresh: {value!r} is not a number of tokens (64), entropy>NATS (entropy>2.0) or none")
        return cls(every=int(text))


def dial(value: int | str | None) -> int | str:
    """A setting in its one spelling: `none`, `exact`, a number of tokens, `entropy>NATS`.

    Raises:
        UserError: anything else.
    """
    if str(value).strip().lower() == EXACT:
        return EXACT
    refresh = Refresh.parse(value)
    if refresh is None:
        return NONE
    if refresh.every is not None:
        return refresh.every
    return f"entropy>{Decimal(repr(refresh.entropy)).normalize():f}"  # never in exponents, never rounded
