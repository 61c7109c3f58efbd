"""What a user calls a path."""

import os
from pathlib import Path

import pytest

from overfill.errors import UserError
from pipeline.paths import local_path, require_regular


def test_a_path_is_made_absolute_whether_something_is_there_or_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert local_path("a/b", "data.path") == tmp_path / "a" / "b"
    assert local_path("~/x", "data.path") == tmp_path / "home" / "x"


@pytest.mark.parametrize("text", ["a\0b", "x" * 5000, "~nobody-here/x"])
def test_what_no_file_can_be_called_is_refused_with_the_field(text):
    with pytest.raises(UserError, match=r"^data\.path = .*cannot be a path"):
        local_path(text, "data.path")


def test_what_has_no_end_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a file"):
            require_regular(path)
    (tmp_path / "file").touch()
    require_regular(tmp_path / "file")
