"""Cells of a sweep and the stages that they share."""

from __future__ import annotations

import subprocess
import sys

import pytest

from overfill.errors import UserError
from pipeline.config import ExperimentConfig
from pipeline.config_io import validate
from pipeline.sweep import combinations, expand

BASE = {
    "name": "x",
    "teacher": {"name": "small", "pretrain": {"hidden": 64, "intermediate": 128, "layers": 2}},
    "sweep": {
        "axes": {
            "prune": [{"hidden": 0.5, "intermediate": 0.5}, {"hidden": 0.75, "intermediate": 0.75}],
            "distill.method": ["overfill", "pruned", "full"],
        },
        "seeds": [0, 1],
    },
}


def config(**changes: object) -> ExperimentConfig:
    return validate(ExperimentConfig, BASE | changes, "x.yaml")


def identities(cells, name):
    return [cell.stage(name).identity for cell in cells if cell.stage(name) is not None]


def test_every_combination_is_a_cell_and_the_full_model_is_one():
    cells = expand(config(), "x.yaml")
    assert [cell.label for cell in cells] == [
        "small · 0.5 · overfill · seed 0",
        "small · 0.5 · overfill · seed 1",
        "small · 0.5 · pruned · seed 0",
        "small · 0.5 · pruned · seed 1",
        "small · full",
        "small · 0.75 · overfill · seed 0",
        "small · 0.75 · overfill · seed 1",
        "small · 0.75 · pruned · seed 0",
        "small · 0.75 · pruned · seed 1",
    ]
    assert [cell.index for cell in cells] == list(range(9))


def test_cells_share_what_does_not_depend_on_them():
    cells = expand(config(), "x.yaml")
    assert len(set(identities(cells, "data"))) == 1
    assert len(set(identities(cells, "teacher"))) == 1
    assert len(set(identities(cells, "calibrate"))) == 1
    assert len(set(identities(cells, "prune"))) == 2
    assert len(set(identities(cells, "distill"))) == 8
    assert len(set(identities(cells, "benchmark"))) == 3, "one per ratio, and one for the full model alone"


def test_stages_come_after_what_they_are_made_from():
    for cell in expand(config(), "x.yaml"):
        seen = set()
        for stage in cell.stages:
            assert {source.identity for source in stage.input_stages} <= seen
            seen.add(stage.identity)


@pytest.mark.parametrize(
    ("path", "value", "changed"),
    [
        ("distill", {"learning_rate": 1e-3}, {"distill", "evaluate"}),
        ("prune", {"hidden": 0.25}, {"prune", "distill", "evaluate", "benchmark"}),
        ("calibrate", {"samples": 7}, {"calibrate", "prune", "distill", "evaluate", "benchmark"}),
        ("evaluate", {"samples": 7}, {"evaluate"}),
        ("benchmark", {"repeats": 9}, {"benchmark"}),
        ("data", {"test_samples": 7}, {"data", "teacher", "calibrate", "prune", "distill", "evaluate", "benchmark"}),
        ("resources", {"distill": {"workers": 4, "zero_stage": 3, "micro_batch": 1}}, set()),
        ("description", "other words", set()),
        ("name", "other", set()),
    ],
)
def test_a_change_reaches_exactly_the_stages_that_depend_on_it(path, value, changed):
    before = expand(config(sweep={}, distill={}), "x.yaml")[0]
    after = expand(config(**({"sweep": {}, "distill": {}} | {path: value})), "x.yaml")[0]
    pairs = zip(before.stages, after.stages, strict=True)
    assert {old.name for old, new in pairs if old.identity != new.identity} == changed


def test_naming_the_default_loss_is_the_same_cell_as_leaving_it_out():
    silent = expand(config(sweep={}), "x.yaml")[0]
    spoken = expand(config(sweep={}, distill={"loss": {"kl": 1.0, "kv": 3.0}}), "x.yaml")[0]
    assert silent.identity == spoken.identity


def test_identities_are_the_same_in_another_process():
    program = (
        "import sys; sys.path.insert(0, 'tests/pipeline')\n"
        "from test_sweep import config\nfrom pipeline.sweep import expand\n"
        "print(' '.join(cell.identity for cell in expand(config(), 'x.yaml')))"
    )
    here = " ".join(cell.identity for cell in expand(config(), "x.yaml"))
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin"}
        out = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
        )
        assert out.stdout.strip() == here


def test_a_random_search_draws_the_same_cells_again_and_stays_in_its_bounds():
    sweep = {
        "search": "random",
        "samples": 20,
        "axes": {"distill.learning_rate": {"log_uniform": [1e-5, 1e-2]}, "prune.hidden": {"uniform": [0.1, 0.9]}},
    }
    first = list(combinations(config(sweep=sweep).sweep))
    assert first == list(combinations(config(sweep=sweep).sweep))
    assert first != list(combinations(config(sweep=sweep | {"seed": 1}).sweep))
    assert all(1e-5 <= draw["distill.learning_rate"] <= 1e-2 and 0.1 <= draw["prune.hidden"] <= 0.9 for draw in first)
    assert len({draw["distill.learning_rate"] for draw in first}) == 20


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"prune.hiden": [0.5]}, "in the cell prune.hiden=0.5: prune.hiden: no such field; did you mean `hidden`?"),
        ({"prune.hidden": [0.5, 2.5]}, "in the cell prune.hidden=2.5: prune.hidden = 2.5: a width is"),
        ({"name.x": [1]}, "may not vary `sweep`, `name`, `seed` or `resources`"),
    ],
)
def test_a_wrong_axis_names_the_cell_and_the_field(axes, message):
    with pytest.raises(UserError, match=message.replace("`", ".").replace("?", r"\?")):
        expand(config(sweep={"axes": axes}), "x.yaml")


def test_a_path_that_is_not_there_is_refused_before_anything_runs():
    teacher = {"pretrain": {"tokenizer": {"vocabulary": 512}}}
    with pytest.raises(UserError, match="data.path = /nowhere: no such file or folder"):
        expand(config(teacher=teacher, data={"source": "jsonl", "path": "/nowhere"}), "x.yaml")


def test_where_the_corpus_lies_does_not_count_but_its_content_does(tmp_path):
    teacher = {"pretrain": {"tokenizer": {"vocabulary": 512}}}
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(text)
    cells = [
        expand(config(sweep={}, teacher=teacher, data={"source": "jsonl", "path": str(tmp_path / name)}), "x")[0]
        for name in ("a", "b", "c")
    ]
    data = identities(cells, "data")
    assert data[0] == data[1] != data[2]


def test_a_hub_teacher_without_revision_or_shape_is_refused():
    with pytest.raises(UserError, match="give `teacher.revision`, a commit"):
        expand(config(teacher={"model": "some/model"}, sweep={}), "x.yaml")


def test_a_hub_teacher_is_fetched_once_and_brings_the_tokenizer():
    shape = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
    }
    cell = expand(config(teacher={"model": "some/model", "revision": "abc", "shape": shape}, sweep={}), "x.yaml")[0]
    names = [stage.name for stage in cell.stages]
    assert names == ["teacher", "data", "calibrate", "prune", "distill", "evaluate", "benchmark"]
    assert cell.stage("data").inputs["tokenizer"] == cell.stage("teacher")


REFRESHING = {"axes": {"evaluate.refresh": ["none", 8, "exact"], "distill.method": ["full", "overfill", "pruned"]}}


def test_how_often_the_full_model_is_asked_again_is_a_matter_of_overfill_alone():
    cells = expand(config(sweep=REFRESHING, prune={"hidden": 0.5, "intermediate": 0.5}), "x.yaml")
    assert [cell.method for cell in cells] == ["full", "overfill", "pruned", "overfill", "overfill"]
    overfill = [cell for cell in cells if cell.method == "overfill"]
    assert len({cell.label for cell in overfill}) == 3
    assert len(set(identities(overfill, "distill"))) == 1
    assert len(set(identities(overfill, "evaluate"))) == len(set(identities(overfill, "benchmark"))) == 3
    timed = {cell.stage("benchmark").config["refresh"]: cell.stage("benchmark").inputs for cell in overfill}
    assert timed["none"]["student"] == timed[8]["student"] == overfill[0].stage("prune")
    assert timed["exact"]["student"] == overfill[0].stage("distill")  # what it accepts depends on its training
    assert "data" in timed["exact"]


@pytest.mark.parametrize(("spelling", "same"), [("8", 8), ("entropy > 2.0", "entropy>2"), ("None", "none")])
def test_a_refresh_is_the_same_however_it_is_spelled(spelling, same):
    one, other = (expand(config(sweep={}, evaluate={"refresh": value}), "x.yaml")[0] for value in (spelling, same))
    assert one.identity == other.identity


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [({"refresh": "often"}, "entropy>NATS"), ({"refresh": 0}, "entropy>NATS"), ({"refresh": 32}, "benchmark.output")],
)
def test_a_refresh_that_is_none_or_would_not_be_measured_is_refused(evaluate, words):
    with pytest.raises(UserError, match=words):
        expand(config(sweep={}, evaluate=evaluate), "x.yaml")


def test_tasks_are_a_stage_of_their_own_and_only_where_some_are_named():
    one = expand(config(evaluate={"tasks": ["toy_get", "ifeval"]}), "x.yaml")
    assert not identities(expand(config(), "x.yaml"), "tasks")
    assert len(set(identities(one, "tasks"))) == 9
    assert {leaf.name for leaf in one[0].leaves} == {"evaluate", "tasks", "benchmark"}
    assert identities(one, "evaluate") == identities(expand(config(), "x.yaml"), "evaluate")
    other_order = expand(config(evaluate={"tasks": ["ifeval", "toy_get"]}), "x.yaml")
    assert identities(other_order, "tasks") == identities(one, "tasks")


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": ["toy_get"]},
        {"task_samples": 3},
        {"num_fewshot": 2},
        {"chat_template": False},
        {"fewshot_as_multiturn": False},
        {"system_instruction": "Be brief."},
        {"task_seed": 1},
        {"task_max_new_tokens": 8},
        {"dtype": "bf16"},
        {"refresh": 8},
    ],
)
def test_what_decides_the_result_of_tasks_is_their_identity(change):
    before, after = (
        expand(config(evaluate={"tasks": ["toy_get", "toy_sort"]} | changes, benchmark={"output": [16]}), "x.yaml")[0]
        for changes in ({}, change)
    )
    assert before.stage("tasks") != after.stage("tasks")
    assert (before.stage("evaluate") == after.stage("evaluate")) == (change.keys().isdisjoint({"dtype", "refresh"}))


def test_tasks_in_files_count_by_their_content_and_not_by_their_place(tmp_path):
    def cell(folder):
        return expand(config(evaluate={"tasks": ["mine"], "task_path": str(folder)}), "x.yaml")[0].stage("tasks")

    for name in ("one", "two", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.yaml").write_text(f"task: mine\ndescription: {name == 'other'}\n")
    assert cell(tmp_path / "one") == cell(tmp_path / "two")
    assert cell(tmp_path / "one") != cell(tmp_path / "other")


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"tasks": ["ifevil"]}, r"evaluate.tasks: 'ifevil': no such task in lm_eval; did you mean ifeval"),
        ({"tasks": ["mine"], "task_path": "/nowhere"}, "evaluate.task_path = /nowhere: no such folder"),
        ({"tasks": ["toy", "toy"]}, "'toy' is named twice"),
    ],
)
def test_a_wrong_task_is_told_before_anything_runs(evaluate, message):
    with pytest.raises(UserError, match=message):
        expand(config(evaluate=evaluate), "x.yaml")
