"""The ledger: what a kill leaves of it, what it costs, and what earlier versions wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.tracking.ledger import EARLIER_FILE, LEDGER_FILE, Entry, Ledger

STATUSES = ("RUNNING", "FINISHED")


def written(folder: Path, cells: int, server: str = "a") -> Ledger:
    """A ledger whose cells began and ended."""
    ledger = Ledger(token="t", experiment="7", parent=Entry(run="p"))
    ledger.write(folder, server, "")
    for number in range(cells):
        for status in STATUSES:
            ledger.cells[f"cell-{number}"] = Entry(run=f"run-{number}", status=status)
            ledger.write(folder, server, f"cell-{number}")
    return ledger


def test_each_server_has_its_own_memory(tmp_path: Path) -> None:
    one, other = Ledger.read(tmp_path, "a"), Ledger.read(tmp_path, "b")
    for ledger, server in ((one, "a"), (other, "b")):
        ledger.cells["x"] = Entry(run=server)
        ledger.write(tmp_path, server, "")
        ledger.write(tmp_path, server, "x")
    for ledger, server in ((one, "a"), (other, "b")):
        assert Ledger.read(tmp_path, server).model_dump() == ledger.model_dump()


@pytest.mark.parametrize("earlier", [False, True])
def test_a_server_that_is_new_starts_with_the_keys_of_the_others_and_one_that_began_anew_keeps_its_own(
    tmp_path: Path, earlier: bool
) -> None:
    if earlier:
        (tmp_path / EARLIER_FILE).write_text(json.dumps({"a": {"token": "t"}}))
    else:
        written(tmp_path, cells=1)
    other = Ledger.read(tmp_path, "b")
    assert (other.token, other.experiment, other.parent, other.cells) == ("t", "", None, {})
    other.token = "u"
    other.write(tmp_path, "b", "")
    assert [Ledger.read(tmp_path, server).token for server in ("a", "b", "c")] == ["t", "u", "u"]


def test_the_last_line_about_a_cell_holds_and_nothing_is_written_twice(tmp_path: Path) -> None:
    ledger = written(tmp_path, cells=3)
    size = (tmp_path / LEDGER_FILE).stat().st_size
    for cell in ("", *ledger.cells):
        ledger.write(tmp_path, "a", cell)
    assert (tmp_path / LEDGER_FILE).stat().st_size == size
    assert Ledger.read(tmp_path, "a").model_dump() == ledger.model_dump()


def test_a_ledger_grows_with_the_changes_and_not_with_their_square(tmp_path: Path) -> None:
    written(tmp_path / "few", cells=10)
    written(tmp_path / "many", cells=100)
    few, many = ((tmp_path / name / LEDGER_FILE).stat().st_size for name in ("few", "many"))
    assert many < 11 * few


def test_wherever_a_kill_tears_the_file_what_stands_before_it_is_known_and_writing_goes_on(tmp_path: Path) -> None:
    written(tmp_path, cells=2)
    path = tmp_path / LEDGER_FILE
    content = path.read_bytes()
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        known = Ledger.read(tmp_path, "a")
        whole = [json.loads(line) for line in content[:end].splitlines() if _is_json(line)]
        assert known.cells == {line["cell"]: Entry(**line["entry"]) for line in whole if "cell" in line}, (
            f"torn after {end} bytes"
        )
        assert (known.token == "t") is bool(whole)
        known.cells["next"] = Entry(run="n")
        known.write(tmp_path, "a", "next")
        assert Ledger.read(tmp_path, "a").cells == known.cells


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def test_a_new_beginning_forgets_the_cells_there_were(tmp_path: Path) -> None:
    ledger = written(tmp_path, cells=2)
    ledger.token, ledger.cells, ledger.parent = "u", {}, None
    ledger.write(tmp_path, "a", "")
    ledger.cells["cell-1"] = Entry(run="again")
    ledger.write(tmp_path, "a", "cell-1")
    assert Ledger.read(tmp_path, "a").cells == {"cell-1": Entry(run="again")}


@pytest.mark.parametrize("line", ["[]", "7", '{"server": "a"}', '{"server": "a", "cell": "x", "entry": {}}', "\x00"])
def test_a_damaged_line_is_left_out(tmp_path: Path, line: str) -> None:
    ledger = written(tmp_path, cells=1)
    with (tmp_path / LEDGER_FILE).open("a") as stream:
        stream.write(line + "\n")
    assert Ledger.read(tmp_path, "a").model_dump() == ledger.model_dump()


def test_what_an_earlier_version_wrote_is_known_until_something_newer_is_said(tmp_path: Path) -> None:
    cells = {name: {"run": name, "status": "RUNNING", "content": ""} for name in ("x", "y")}
    earlier = {"token": "t", "experiment": "7", "parent": {"run": "p", "status": "", "content": ""}, "cells": cells}
    (tmp_path / EARLIER_FILE).write_text(json.dumps({"a": earlier}))
    ledger = Ledger.read(tmp_path, "a")
    assert ledger.model_dump() == earlier
    ledger.cells["x"].status = "FINISHED"
    ledger.write(tmp_path, "a", "")
    ledger.write(tmp_path, "a", "x")
    assert {cell: entry.status for cell, entry in Ledger.read(tmp_path, "a").cells.items()} == {
        "x": "FINISHED",
        "y": "RUNNING",
    }
