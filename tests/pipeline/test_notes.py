"""Small files beside an artifact, as they are found."""

import json

import pytest

from pipeline.notes import read_note, text_of, time_of


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b"\xff", b"[" * 5000, b"{" + b" " * 2**21 + b"}"])
def test_what_is_no_note_is_taken_as_not_there(tmp_path, content, caplog):
    (tmp_path / "outcome.json").write_bytes(content)
    assert read_note(tmp_path / "outcome.json") == {}
    assert "is damaged" in caplog.text


def test_a_note_that_is_not_there_is_nothing_to_speak_of(tmp_path, caplog):
    assert read_note(tmp_path / "outcome.json") == {} and not caplog.text
    (tmp_path / "file").touch()
    assert read_note(tmp_path / "file" / "outcome.json") == {}


def test_fields_of_another_type_are_left_out(tmp_path):
    (tmp_path / "outcome.json").write_text(json.dumps({"error": "a\nb", "log": ["x"], "ended": 5, "begun": "now"}))
    note = read_note(tmp_path / "outcome.json")
    assert (text_of(note, "error"), text_of(note, "log"), text_of(note, "none")) == ("a b", "", "")
    assert (time_of(note, "ended"), time_of(note, "begun"), time_of({"ended": 1e300}, "ended")) == (5.0, None, None)
