"""Rows, groups and comparisons of a sweep whose results are known."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_store import SAMPLES, TPOT, SyntheticStore, outcomes, toy_cells

from overfill.errors import UserError
from overfill.shapes import ModelShape
from pipeline.reporting.exports import summary, summary_json, to_csv, to_json, write_report
from pipeline.reporting.groups import Group
from pipeline.reporting.pareto import Budget
from pipeline.reporting.report import make_report
from pipeline.reporting.rows import rows
from pipeline.reporting.tables import markdown, print_report, tables
from pipeline.statistics import Interval


@pytest.fixture
def synthetic(tmp_path: Path) -> SyntheticStore:
    return SyntheticStore(tmp_path / "runs")


def test_a_row_has_the_values_of_its_own_system_and_of_the_models_on_disk(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("full", "overfill", "pruned"))
    for cell in cells:
        synthetic.finish(cell, outcomes(120))
    table = {row["method"]: row for row in rows(cells, synthetic.store)}

    overfill, pruned, full = table["overfill"], table["pruned"], table["full"]
    assert [full["tpot_s"], overfill["tpot_s"], pruned["tpot_s"]] == [TPOT["full"], TPOT["overfill"], TPOT["student"]]
    assert overfill["speed_up"] == pytest.approx(4.0)
    assert full["speed_up"] == 1.0
    assert overfill["benchmark"] == {"batch": 1, "prompt": 128, "output": 32, "device": "test"}
    assert overfill["exact_match"] == 0.6
    assert overfill["exact_match_interval"] == pytest.approx([0.5308, 0.6653], abs=1e-4)
    assert overfill["train_tokens"] == 1000
    assert (overfill["state"], overfill["seed"], full["seed"]) == ("done", 0, None)

    pretrain = cells[0].config.teacher.pretrain
    assert pretrain is not None
    shape = ModelShape.from_config(pretrain.model_config_dict(vocabulary=40, max_positions=128))
    assert full["parameters"] == shape.parameters()
    assert full["parameters_kept"] == 1.0
    widths = cells[1].widths
    assert widths is not None
    student = shape.pruned(widths.hidden, widths.intermediate).parameters()
    assert overfill["parameters"] == student
    assert overfill["ratio_effective"] == pytest.approx(1 - student / shape.parameters())


def test_a_cell_that_has_not_run_has_its_planned_shape_and_no_results(synthetic: SyntheticStore) -> None:
    row = rows(toy_cells(methods=("overfill",)), synthetic.store)[0]
    assert row["state"] == "unfinished"
    assert 0.0 < row["parameters_kept"] < 1.0
    missing = ("exact_match", "exact_match_interval", "perplexity", "ttft_s", "tpot_s", "speed_up", "train_tokens")
    assert {row[name] for name in missing} == {None}


def test_json_has_one_object_per_cell_with_the_promised_keys(synthetic: SyntheticStore) -> None:
    cells = toy_cells()
    synthetic.finish(cells[0])
    found = json.loads(to_json(make_report("toy", "", cells, synthetic.store)))
    promised = "teacher method ratio ratio_effective seed parameters exact_match exact_match_interval perplexity"
    assert len(found) == 2
    assert {*promised.split(), "ttft_s", "tpot_s"} <= set(found[0])
    assert found[1]["exact_match"] is None


def test_a_value_that_is_not_a_number_becomes_null_in_json(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("overfill",))
    report = make_report("toy", "", cells, synthetic.store)
    report.rows[0]["perplexity"] = float("nan")
    assert json.loads(to_json(report))[0]["perplexity"] is None


def test_seeds_become_one_group_with_an_interval_over_seeds_and_samples(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("overfill",), seeds=(0, 1))
    for cell, right in zip(cells, (100, 120), strict=True):
        synthetic.finish(cell, outcomes(right))
    report = make_report("toy", "", cells, synthetic.store)
    assert len(report.groups) == 1
    group = report.groups[0]
    assert group.seeds == (0, 1)
    assert group.exact_match is not None
    assert group.exact_match.value == pytest.approx(0.55)
    assert group.mean("tpot_s") == TPOT["overfill"]


def test_overfill_is_compared_with_pruned_only_of_the_same_ratio(synthetic: SyntheticStore) -> None:
    cells = toy_cells(ratios=(0.25, 0.5))
    right = {(0.25, "overfill"): 150, (0.25, "pruned"): 149, (0.5, "overfill"): 130, (0.5, "pruned"): 65}
    for cell in cells:
        synthetic.finish(cell, outcomes(right[cell.ratio, cell.method]))
    report = make_report("toy", "", cells, synthetic.store)
    close, wide = report.duels
    assert (close.ratio, wide.ratio) == (0.25, 0.5)
    assert close.comparison.within_noise
    assert wide.comparison.difference.value == pytest.approx(65 / SAMPLES)
    assert wide.comparison.ratio is not None
    assert wide.comparison.ratio.value == pytest.approx(2.0)

    duel_table = tables(report)[-1]
    assert [row[-2:] for row in duel_table.rows] == [("within noise", "1"), ("better", "< 0.001")]
    text = markdown(report)
    assert "| 0.5 | OverFill |" in text
    assert "2.00x" in text


def test_cells_with_other_axes_are_never_averaged_together(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("overfill",), axes={"distill.learning_rate": [1e-3, 1e-4]})
    for cell in cells:
        synthetic.finish(cell)
    variants = [group.variant for group in make_report("toy", "", cells, synthetic.store).groups]
    assert variants == ["learning_rate=0.0001", "learning_rate=0.001"]


def test_variants_take_no_digit_from_the_table_on_a_narrow_terminal(synthetic: SyntheticStore) -> None:
    axes = {"distill.learning_rate": [1e-3, 1e-4], "distill.warmup": [0.05, 0.1]}
    cells = toy_cells(methods=("overfill", "pruned"), axes=axes)
    for cell in cells:
        synthetic.finish(cell)
    console = Console(width=80, file=io.StringIO())
    print_report(make_report("toy", "", cells, synthetic.store), console)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    assert any(line.strip() == "warmup=0.05" for line in lines)


def test_two_different_widths_show_in_the_variant(synthetic: SyntheticStore) -> None:
    axes = {"prune": [{"hidden": 0.25, "intermediate": 0.5}, {"hidden": 0.5, "intermediate": 0.25}]}
    cells = toy_cells(methods=("overfill",), axes=axes)
    assert [cell.ratio for cell in cells] == [0.375, 0.375]
    variants = [row["variant"] for row in rows(cells, synthetic.store)]
    assert variants == ["h0.25-i0.5", "h0.5-i0.25"]


def test_the_full_model_appears_once_per_teacher(synthetic: SyntheticStore) -> None:
    cells = toy_cells(ratios=(0.25, 0.5), methods=("full", "overfill"), seeds=(0, 1))
    for cell in cells:
        synthetic.finish(cell)
    methods = [group.method for group in make_report("toy", "", cells, synthetic.store).groups]
    assert methods == ["full", "overfill", "overfill"]


def test_the_fastest_configuration_that_keeps_the_quality_is_shipped(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("full", "overfill", "pruned"))
    for cell in cells:
        synthetic.finish(cell, outcomes({"full": 150, "overfill": 145, "pruned": 90}[cell.method]))
    report = make_report("toy", "", cells, synthetic.store)
    advice = report.to_ship["small"]
    assert (advice.best.method, advice.keeps_quality, advice.is_faster) == ("overfill", True, True)
    assert "ship OverFill at ratio 0.5" in markdown(report)
    assert "4.00x the full model's speed" in markdown(report)
    assert "TTFT and TPOT are medians at batch 1, prompt 128, output 32 on test;" in markdown(report)


def test_when_nothing_keeps_the_quality_the_report_says_so(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("full", "overfill", "pruned"))
    for cell in cells:
        synthetic.finish(cell, outcomes({"full": 190, "overfill": 100, "pruned": 90}[cell.method]))
    text = markdown(make_report("t", "", cells, synthetic.store))
    assert "nothing faster keeps 95% of the full model's exact match" in text


def test_a_student_that_is_slower_than_the_full_model_is_not_shipped(
    synthetic: SyntheticStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TPOT, "full", 0.0005)
    cells = toy_cells(methods=("full", "overfill", "pruned"))
    for cell in cells:
        synthetic.finish(cell, outcomes(150))
    text = markdown(make_report("t", "", cells, synthetic.store))
    assert "ship the full model; no student decodes faster" in text
    assert "pruned only at ratio 0.5" in text


def test_a_full_model_without_a_right_answer_is_no_measure_for_advice(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("full", "overfill"))
    for cell in cells:
        synthetic.finish(cell, outcomes(0))
    assert make_report("t", "", cells, synthetic.store).to_ship == {}


def test_a_report_does_not_load_pandas(synthetic: SyntheticStore) -> None:
    cells = toy_cells()
    for cell in cells:
        synthetic.finish(cell)
    code = """
import sys
from pathlib import Path
from synthetic_store import Store, toy_cells
from pipeline.reporting.pareto import Budget
from pipeline.reporting.report import make_report
assert len(make_report("t", "", toy_cells(), Store(Path(sys.argv[1]))).duels) == 1
print("pandas" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(synthetic.store.root)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[3])])
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path})
    assert done.stdout.strip() == "False"


def test_unfinished_cells_are_counted_in_words(synthetic: SyntheticStore) -> None:
    cells = toy_cells()
    synthetic.finish(cells[0])
    assert "1 of 2 cells are not done: `overfill status toy` says why." in markdown(
        make_report("toy", "", cells, synthetic.store)
    )


def test_the_terminal_shows_every_number_within_eighty_columns(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("full", "overfill", "pruned"))
    for cell in cells:
        synthetic.finish(cell, outcomes(150))
    console = Console(width=80, file=io.StringIO())
    print_report(make_report("toy", "", cells, synthetic.store), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    numbers = ("35.5%", "75.0 ± 6.0", "1.649", "41.0 ms", "1.00 ms", "4.00x", "1.00x [1.00, 1.00]", "within noise")
    for number in numbers:
        assert number in shown
    assert "…" not in shown


def test_written_reports_are_drawn_again_only_for_other_rows(synthetic: SyntheticStore, tmp_path: Path) -> None:
    cells = toy_cells()
    synthetic.finish(cells[0])
    first = write_report(make_report("toy", "", cells, synthetic.store), tmp_path)
    assert {path.name for path in first} == {
        *("report.md", "summary.json", "report.json", "pareto.png", "pareto.svg", "quality.png", "quality.svg")
    }
    drawn = (tmp_path / "pareto.svg").stat().st_mtime_ns
    write_report(make_report("toy", "", cells, synthetic.store), tmp_path)
    assert (tmp_path / "pareto.svg").stat().st_mtime_ns == drawn
    synthetic.finish(cells[1])
    write_report(make_report("toy", "", cells, synthetic.store), tmp_path)
    assert (tmp_path / "pareto.svg").stat().st_mtime_ns > drawn


def test_a_result_that_cannot_be_read_names_its_file(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("overfill",))
    synthetic.finish(cells[0])
    path = synthetic.store.payload(cells[0].stage("benchmark")) / "latency.json"  # type: ignore[arg-type]
    path.write_text("{" + path.read_text()[1:-1] + " ")  # the size is kept, so that the store's check passes
    with pytest.raises(UserError, match="latency.json: this file of an artifact was altered"):
        rows(cells, synthetic.store)


def test_a_group_without_a_value_has_no_mean() -> None:
    member = {"seed": 0, "tpot_s": None}
    assert Group("t", 0.5, "", "pruned", (member,), Interval(0.5, 0.4, 0.6)).mean("tpot_s") is None


def test_the_terminal_begins_with_what_to_ship_what_it_costs_and_how_sure_that_is(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("full", "overfill", "pruned"))
    for cell in cells:
        synthetic.finish(cell, outcomes({"full": 150, "overfill": 145, "pruned": 90}[cell.method]))
    console = Console(width=80, file=io.StringIO())
    print_report(make_report("toy", "", cells, synthetic.store), console)
    screen = " ".join(" ".join(console.file.getvalue().splitlines()[:24]).split())  # type: ignore[attr-defined]
    assert screen.startswith(
        "small: ship OverFill at ratio 0.5, the fastest that keeps 95% of the full model's exact match."
    )
    assert "costs TPOT 1.00 ms, 4.00x the full model's speed; TTFT 41.0 ms (full model 40.0 ms); memory 5 MB" in screen
    assert "exact match 72.5 ± 6.1 % against 75.0 %; on the same samples it keeps 96.7%" in screen
    assert "not surely 95%; every repetition decoded faster than the full model's fastest" in screen
    assert "against pruned only +27.5 [21.5, 33.5] points, better" in screen
    assert "Relative improvement of OverFill over pruned-only, averaged over tasks: +61.1 % [" in screen


def test_a_budget_comes_first_and_its_lead_over_the_next_is_tested(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("full", "overfill", "pruned"))
    for cell in cells:
        synthetic.finish(cell, outcomes({"full": 150, "overfill": 145, "pruned": 144}[cell.method]))
    text = markdown(make_report("toy", "", cells, synthetic.store, Budget(tpot_s=0.002)))
    assert "Within --max-tpot 2.00 ms: ship small: OverFill at ratio 0.5, the most accurate that fits." in text
    assert "ahead of small: pruned only at ratio 0.5 (TPOT 0.95 ms) by +0.5 [0.0, 1.5] points, within noise" in text


def test_a_budget_that_nothing_fits_says_so_and_still_says_what_to_ship(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("full", "overfill", "pruned"))
    for cell in cells:
        synthetic.finish(cell, outcomes(150))
    text = markdown(make_report("toy", "", cells, synthetic.store, Budget(tpot_s=1e-6)))
    assert "Nothing fits --max-tpot 1 µs; the closest is small: pruned only at ratio 0.5 with TPOT 0.95 ms." in text
    assert "small: ship pruned only at ratio 0.5" in text


def test_a_dominated_configuration_is_not_marked_and_rows_say_so(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("full", "overfill", "pruned"))
    for cell in cells:
        synthetic.finish(cell, outcomes({"full": 150, "overfill": 80, "pruned": 90}[cell.method]))
    report = make_report("toy", "", cells, synthetic.store)
    places = {row["method"]: row["on_front"] for row in json.loads(to_json(report))}
    assert places == {
        "full": {"tpot_s": True, "memory_bytes": True},
        "overfill": {"tpot_s": False, "memory_bytes": False},
        "pruned": {"tpot_s": True, "memory_bytes": True},
    }
    cells_of = {row[1]: row for row in tables(report)[0].rows}
    assert "• 0.95 ms" in cells_of["pruned only"]
    assert "1.00 ms" in cells_of["OverFill"]
    assert summary(report)["configurations"][1]["dominated_by"]["tpot_s"]["method"] == "pruned"


def test_csv_has_a_line_per_cell_and_nested_values_in_dotted_columns(synthetic: SyntheticStore) -> None:
    cells = toy_cells()
    synthetic.finish(cells[0])
    lines = list(csv.DictReader(io.StringIO(to_csv(make_report("toy", "", cells, synthetic.store)))))
    assert [line["method"] for line in lines] == ["overfill", "pruned"]
    assert float(lines[0]["exact_match_interval.0"]) < float(lines[0]["exact_match"])
    assert lines[0]["benchmark.device"] == "test"
    assert lines[1]["exact_match"] == ""


def test_the_summary_is_plain_json_of_every_conclusion(synthetic: SyntheticStore) -> None:
    cells = toy_cells(ratios=(0.25, 0.5, 0.6, 0.75), methods=("full", "overfill", "pruned"))
    for cell in cells:
        synthetic.finish(cell, outcomes({"full": 150, "overfill": 145, "pruned": 90}[cell.method]))
    found = json.loads(summary_json(make_report("toy", "", cells, synthetic.store, Budget(tpot_s=0.002))))
    assert found["to_ship"][0]["configuration"]["method"] == "overfill"
    assert found["relative_improvement"]["relative"]["value"] == pytest.approx(145 / 90 - 1)
    assert found["within_budget"]["limits"] == {"tpot_s": 0.002, "memory_bytes": None}
    assert len(found["overfill_against_pruned"]) == 4
    assert {fit["target"] for fit in found["guidelines"][0]["fits"]} == {"quality", "tpot_s"}


def test_a_seed_that_is_not_evaluated_yet_is_left_out_of_the_comparison(synthetic: SyntheticStore) -> None:
    cells = toy_cells(seeds=(0, 1))
    for cell in cells:
        if (cell.method, cell.seed) != ("pruned", 1):
            synthetic.finish(cell, outcomes(150))
    report = make_report("toy", "", cells, synthetic.store)
    assert report.duels[0].comparison.seeds == 1
    assert report.improvement is not None


def test_benchmarks_on_a_machine_whose_speed_drifted_are_called_so(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("full", "overfill"))
    synthetic.finish(cells[0])
    TPOT_BEFORE = dict(TPOT)
    try:
        TPOT.update({name: 1.5 * value for name, value in TPOT.items()})
        synthetic.finish(cells[1])
    finally:
        TPOT.update(TPOT_BEFORE)
    text = markdown(make_report("toy", "", cells, synthetic.store))
    assert "the full model itself took 4.00 ms to 6.00 ms per token in the benchmarks" in text


TASKS = {"tasks": ["toy_add", "toy_get", "toy_sort"]}


def test_tasks_rank_configurations_by_their_average_and_each_is_compared(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("full", "overfill", "pruned"), evaluate=TASKS)
    for cell in cells:
        synthetic.finish(cell, outcomes({"full": 160, "overfill": 156, "pruned": 80}[cell.method]))
    report = make_report("toy", "", cells, synthetic.store)
    overfill = next(group for group in report.groups if group.method == "overfill")
    assert overfill.quality_tasks == ("toy_add", "toy_get")  # the perplexity of the third is no score of samples
    assert overfill.average is not None
    assert overfill.average.value == pytest.approx((156 / 200 + 78 / 200) / 2)
    assert overfill.unpaired == {"toy_sort perplexity": 3.5}
    duel = report.duels[0]
    assert set(duel.tasks) == {"toy_add", "toy_get"}
    assert duel.tasks["toy_add"].difference.value == pytest.approx(76 / 200)
    assert duel.comparison.difference.value == pytest.approx((76 / 200 + 38 / 200) / 2)
    assert report.improvement is not None
    assert report.improvement.relative.value == pytest.approx((156 / 80 + 78 / 40) / 2 - 1)
    assert (report.improvement.tasks, report.improvement.configurations) == (2, 1)


def test_tasks_have_columns_an_average_and_lines_of_their_own(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("full", "overfill", "pruned"), evaluate=TASKS)
    for cell in cells:
        synthetic.finish(cell, outcomes({"full": 160, "overfill": 156, "pruned": 80}[cell.method]))
    report = make_report("toy", "", cells, synthetic.store)
    text = markdown(report)
    assert "the fastest that keeps 95% of the full model's average over 2 tasks" in text
    assert "averaged over tasks: +95.0 % [" in text
    assert "(2 tasks, 1 configuration)" in text
    assert "| ratio | method | toy_add % | toy_get % | average % | toy_sort perplexity |" in text
    assert "| 0.5 | toy_get | 1.95x" in text
    assert "| 0.5 | average | 1.95x" in text
    row = json.loads(to_json(report))[1]
    assert row["tasks"]["toy_add"]["value"] == pytest.approx(0.78)
    assert row["exact_match"] == pytest.approx(0.78)
    assert "tasks.toy_sort.value" in to_csv(report).splitlines()[0]


def test_a_configuration_without_all_tasks_is_not_ranked_by_the_easy_ones(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("full", "overfill"), evaluate=TASKS)
    synthetic.finish(cells[0], outcomes(100))
    evaluate = cells[1].stage("evaluate")
    assert evaluate is not None
    synthetic.publish(evaluate, cells[1], outcomes(200))
    report = make_report("toy", "", cells, synthetic.store)
    assert [group.quality is None for group in report.groups] == [False, True]
    assert report.to_ship == {}
