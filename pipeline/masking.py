"""Addresses without their secrets: for logs, files, MLflow and the screen. The one place for it."""

from __future__ import annotations

import contextlib
import re
from urllib.parse import urlsplit

_SECRET = re.compile(r"(?i)([?&;][^=&;]*(?:password|passwd|secret|token|key|credential)[^=&;]*=)[^&;]+")


def mask_uri(uri: str) -> str:
    """The URI without user names, passwords, and secrets in its query: for logs, files and the screen."""
    scheme, separator, rest = uri.partition("://")
    place, mark, query = rest.partition("?")
    # Up to the last @, since passwords hold unescaped @ and / often enough; a file's path has no user in front.
    if "@" in place and not place.startswith("/"):
        uri = f"{scheme}{separator}***@{place.rpartition('@')[2]}{mark}{query}"
    return _SECRET.sub(r"\1***", uri)


def mask_text(text: str, uri: str) -> str:
    """`text` (an error message) without the secrets of `uri`."""
    text = text.replace(uri, mask_uri(uri))
    with contextlib.suppress(ValueError):  # not a URI that Python can take apart: replaced as a whole above
        password = urlsplit(uri).password
        text = text.replace(password, "***") if password else text
    return re.sub(r"(://)[^\s/@]+@", r"\1***@", text)
