"""`overfill report` as it is typed: forms, budgets, mistakes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from synthetic_store import SyntheticStore, outcomes

from pipeline.cli import main
from pipeline.experiment import Experiment, keep_experiment, known_experiment, read_experiment

EXPERIMENT = """
name: toy
description: a hypothesis
teacher: {name: small, pretrain: {hidden: 64, intermediate: 128, layers: 2}}
distill: {tokens: 1000, batch_tokens: 100}
sweep: {axes: {distill.method: [full, overfill, pruned]}}
"""


@pytest.fixture
def store(tmp_path: Path) -> str:
    file = tmp_path / "toy.yaml"
    file.write_text(EXPERIMENT)
    synthetic = SyntheticStore(tmp_path / "runs")
    experiment: Experiment = read_experiment(str(file))
    keep_experiment(experiment, synthetic.store)
    for cell in known_experiment(synthetic.store, "toy").cells:
        synthetic.finish(cell, outcomes({"full": 150, "overfill": 145, "pruned": 90}[cell.method]))
    return str(synthetic.store.root)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["report", *arguments])
    captured = capsys.readouterr()
    assert end.value.code == 0, captured.err
    return captured.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["report", *arguments])
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    return captured.err


def test_json_csv_and_summary_have_the_same_cells(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    as_json = json.loads(said(capsys, "--store", store, "--json"))
    as_csv = list(csv.DictReader(io.StringIO(said(capsys, "--store", store, "--csv"))))
    summary = json.loads(said(capsys, "--store", store, "--summary"))
    assert [row["method"] for row in as_json] == [row["method"] for row in as_csv] == ["full", "overfill", "pruned"]
    assert [float(row["exact_match"]) for row in as_csv] == [row["exact_match"] for row in as_json]
    assert [one["exact_match"]["value"] for one in summary["configurations"]] == [0.75, 0.725, 0.45]


def test_a_latency_budget_names_what_to_ship(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(said(capsys, "--store", store, "--max-tpot", "2ms").split())
    assert text.startswith("Within --max-tpot 2.00 ms: ship small: OverFill at ratio")
    text = " ".join(said(capsys, "--store", store, "--max-memory", "1MB").split())
    assert text.startswith("Within --max-memory 1 MB: ship small: pruned only at ratio")
    assert "nothing else fits" in text
    text = " ".join(said(capsys, "--store", store, "--max-tpot", "1us").split())
    assert text.startswith("Nothing fits --max-tpot 1 µs; the closest is small: pruned only at ratio")


def test_a_budget_without_a_unit_is_one_line(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--max-tpot 20: give a number and a unit (s, ms, us, µs), such as 20ms" in refused(
        capsys, "--store", store, "--max-tpot", "20"
    )


def test_two_forms_at_once_are_refused(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--json and --csv: they all go to the same output" in refused(capsys, "--store", store, "--json", "--csv")


def test_the_page_is_written_beside_another_form(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert json.loads(said(capsys, "--store", store, "--json", "--html", str(page)))
    assert page.read_text().startswith("<!doctype html>")
    assert said(capsys, "--store", store, "--html", str(page)) == ""
