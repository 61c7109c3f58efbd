"""The one error of this project that is a user's to mend.

`UserError` carries one line: which file or field, its value, and the way out. The command line prints it and exits
with code 2; anything else that is raised is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

_LONGEST = 2_000
"""Characters; a value of any length may stand in a message."""


class UserError(Exception):
    """A mistake that the user can mend; `str(error)` is one line that says how."""

    def __str__(self) -> str:
        """The message, with what would break the line or move the cursor written out (`\\n`), and not too long."""
        text = super().__str__()
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
        return "".join(part if part.isprintable() else part.encode("unicode_escape").decode() for part in text)


def disk_full(error: BaseException) -> UserError | None:
    """What to tell of a full disk, whichever library met it; None for any other error."""
    text = str(error)
    if "No space left on device" not in text and "Disk quota exceeded" not in text:
        return None
    return UserError(
        f"{getattr(error, 'filename', None) or 'the store'}: the disk is full; free some space and run again"
    )
