"""The one error of this project that is a user's to mend.

`UserError` carries one line: which file or field, its value, and the way out. The command line prints it and exits
with code 2; anything else that is raised is a defect of ours and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend; `str(error)` is one line that says how."""
