"""Identity: canonical JSON that raises rather than guesses, and digests of files.

Two processes, two machines and two Python versions must write the same bytes for the same description, or a finished
artifact is built a second time; and two different descriptions must never share bytes, or a wrong artifact is reused.
So only values with one obvious JSON form are accepted, and everything else (sets, paths, numpy scalars, functions,
enums, NaN) raises with its path. The choices:

- dictionaries are sorted by key; keys are strings, for `{1: ...}` and `{"1": ...}` would write the same bytes;
- an integer and a float are different even when equal: as a width, 1 is one channel and 1.0 is a share of all;
- a float is its shortest `repr`, and -0.0 is 0.0, which compares equal to it;
- a tuple is a list, as YAML has lists only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.paths import require_regular

IDENTITY_LENGTH = 12
"""Hex digits of an identity: 48 bits, so a store of a million artifacts has a collision with odds of 1 in 500."""
MAX_DEPTH = 64
"""Deepest nesting; more than that is a value that contains itself."""
_BLOCK = 1 << 20


def canonical(value: Any, path: str = "") -> Any:
    """A copy of `value` made of dict, list, str, int, float, bool and None alone, as `canonical_json` writes it.

    Raises TypeError naming the path of what has no canonical form."""
    return _canonical(value, path, 0)


def _canonical(value: Any, path: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise TypeError(f"{_at(path)} is nested deeper than {MAX_DEPTH} levels; does it contain itself?")
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        if not math.isfinite(value):
            raise TypeError(f"{_at(path)} is {value}, which has no JSON form; use None or leave the field out")
        return value + 0.0  # -0.0 + 0.0 is 0.0, every other float stays
    if kind in (list, tuple):
        return [_canonical(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
    if kind is dict:
        for key in value:
            if type(key) is not str:
                raise TypeError(f"{_at(path)} has the key {key!r}: keys must be strings")
        return {key: _canonical(value[key], f"{path}.{key}" if path else key, depth + 1) for key in sorted(value)}
    hint = "; pass it through identity_config()" if isinstance(value, BaseModel) else ""
    raise TypeError(f"{_at(path)} is a {kind.__module__}.{kind.__qualname__}, which has no canonical JSON form{hint}")


def _at(path: str) -> str:
    return path or "the value"


def canonical_json(value: Any) -> str:
    """The one JSON text of `value`: sorted keys, no spaces, ASCII. Raises TypeError like `canonical`."""
    return _text(canonical(value))


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False, sort_keys=True)


def fingerprint(value: Any) -> str:
    """12 hex digits of the SHA-256 of the canonical JSON of `value`. Raises TypeError like `canonical`."""
    return fingerprint_of_canonical(canonical(value))


def fingerprint_of_canonical(value: Any) -> str:
    """The fingerprint of what `canonical` gave, without going through it again: a sweep has thousands of stages."""
    return hashlib.sha256(_text(value).encode("ascii")).hexdigest()[:IDENTITY_LENGTH]


def identity_config(model: BaseModel) -> dict[str, Any]:
    """What of a config counts: all its fields, defaults included, except those that say they do not.

    A field says so by `Field(json_schema_extra={"identity": False})`. Models inside lists, tuples and dictionaries
    are treated alike. Values are not converted: what has no canonical form raises TypeError in `canonical`."""
    counting = {
        name: _plain(getattr(model, name))
        for name, field in type(model).model_fields.items()
        if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("identity") is False)
    }
    return counting | {name: _plain(value) for name, value in (model.model_extra or {}).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return identity_config(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def digest_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hex; read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with Path(path).open("rb", buffering=0) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def digest_once(path: Path | str) -> str:
    """As `digest_file`, and free for a file that this process has digested before and that was not written since: by
    its place, inode, size and time of modification."""
    key = _file_key(path)
    if key not in _digests:
        _digests[key] = digest_file(path)
    return _digests[key]


def known_digest(path: Path | str) -> str | None:
    """What `digest_once` would give for free; None where it would have to read."""
    return _digests.get(_file_key(path))


def remember_digest(path: Path | str, digest: str) -> None:
    """Spare `digest_once` the reading of a file whose digest is known."""
    _digests[_file_key(path)] = digest


_digests: dict[tuple[str, int, int, int], str] = {}


def _file_key(path: Path | str) -> tuple[str, int, int, int]:
    found = Path(path).stat()
    return (str(Path(path).absolute()), found.st_ino, found.st_size, found.st_mtime_ns)


def digest_tree(paths: Path | str | Sequence[Path | str]) -> str:
    """SHA-256, in hex, of the content of files and folders, wherever they lie.

    A folder counts by the relative names and bytes of its files, a file by its name and bytes, and several paths by
    their order too, for the order of data files is the order of their rows. Hidden entries are left out: they belong
    to tools (`.git`, `.cache`, `.DS_Store`). Links to files are followed; a link to a folder raises ValueError, for
    it may lead anywhere, and OSError is raised for a pipe or a device. Raises FileNotFoundError for a path that is not
    there."""
    roots = [Path(paths)] if isinstance(paths, Path | str) else [Path(path) for path in paths]
    listing = [[[name, digest_once(file)] for name, file in tree_files(root)] for root in roots]
    return hashlib.sha256(canonical_json(listing).encode("ascii")).hexdigest()


def tree_files(root: Path) -> list[tuple[str, Path]]:
    """(relative name with slashes, file) of every file below `root` that is not hidden, sorted by name."""
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such file or folder")
    found: list[tuple[str, Path]] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if Path(folder, name).is_symlink():
                raise ValueError(f"{Path(folder, name)} is a link to a folder; give the folder itself")
        for name in files:
            if not name.startswith("."):
                file = Path(folder, name)
                require_regular(file)
                found.append((file.relative_to(root).as_posix(), file))
    return sorted(found)
