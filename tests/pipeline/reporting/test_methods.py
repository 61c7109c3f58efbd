"""What each method of a sweep is made of, shares with the others, and shows in a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from synthetic_store import TPOT, SyntheticStore, outcomes, toy_cells

from overfill.config import LoraConfig, Method
from overfill.errors import UserError
from overfill.shapes import ModelShape
from pipeline.cost import adapter_parameters, cell_costs
from pipeline.graph import SYSTEM, TRAINED_AS
from pipeline.reporting.methods import METHODS
from pipeline.reporting.report import make_report
from pipeline.reporting.rows import rows
from pipeline.reporting.tables import markdown
from pipeline.sweep import Cell

SHAPE = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 90,
}
RELEASED = {"model": "somebody/small-1b", "revision": "abc", "shape": SHAPE}
BEFORE, CUT, END = ["tokenizer", "data", "teacher"], ["calibrate", "prune"], ["evaluate", "benchmark"]


def every_method(**sections: Any) -> dict[str, Cell]:
    cells = toy_cells(methods=get_args(Method), released=RELEASED, **sections)
    return {cell.method: cell for cell in cells}


@pytest.fixture(scope="module")
def cells() -> dict[str, Cell]:
    return every_method()


def test_every_method_has_a_system_and_a_look() -> None:
    assert set(get_args(Method)) == set(SYSTEM) == set(METHODS)


def test_each_method_has_the_stages_that_it_needs(cells: dict[str, Cell]) -> None:
    names = {method: [stage.name for stage in cell.stages] for method, cell in cells.items()}
    for method in TRAINED_AS:
        assert names[method] == [*BEFORE, *CUT, "distill", *END], method
    for method in ("untrained", "untrained-overfill"):
        assert names[method] == [*BEFORE, *CUT, *END]
    assert names["full"] == [*BEFORE, *END]
    assert names["released"] == [*BEFORE, "released", "held_out", *END]


def test_assisted_generation_is_overfills_student_asked_to_draft(cells: dict[str, Cell]) -> None:
    overfill, assisted = cells["overfill"], cells["assisted"]
    assert assisted.stage("distill") == overfill.stage("distill")
    exact = every_method(evaluate={"refresh": "exact"})["overfill"]
    assert exact.identity == assisted.identity
    assert assisted.config.distill.effective_loss == overfill.config.distill.effective_loss


def test_an_untrained_student_is_the_cut_one_timed_once_for_all(cells: dict[str, Cell]) -> None:
    for method in ("untrained", "untrained-overfill"):
        evaluate, benchmark = cells[method].leaves
        assert evaluate.inputs["student"] == cells["pruned"].stage("prune")
        assert benchmark == cells["pruned"].stage("benchmark") == cells["lora"].stage("benchmark")
    alone, two_stage = (cells[method].stage("evaluate") for method in ("untrained", "untrained-overfill"))
    assert alone is not None and two_stage is not None
    assert (alone.config["system"], two_stage.config["system"]) == ("student", "overfill")


def test_what_is_not_trained_has_no_seed_and_no_axis_of_training() -> None:
    made = toy_cells(
        methods=("full", "pruned", "untrained", "released"),
        seeds=(0, 1),
        axes={"distill.learning_rate": [1e-3, 1e-4]},
        released=RELEASED,
    )
    assert [cell.label for cell in made if cell.method != "pruned"] == [
        "small · full",
        "small · 0.5 · untrained",
        "small · released · small-1b",
    ]
    assert len([cell for cell in made if cell.method == "pruned"]) == 4


def test_a_section_counts_for_its_own_method_alone() -> None:
    plain, other = every_method(), every_method(distill={"tokens": 1000, "batch_tokens": 100, "lora": {"rank": 3}})
    changed = {method for method in plain if plain[method].identity != other[method].identity}
    assert changed == {"lora"}
    distill = plain["pruned"].stage("distill")
    assert distill is not None and "lora" not in distill.config
    spoken = every_method(distill={"tokens": 1000, "batch_tokens": 100, "lora": {"rank": 16, "alpha": 32}})
    assert spoken["lora"].identity == plain["lora"].identity
    ranks = toy_cells(methods=("pruned", "lora"), axes={"distill.lora.rank": [2, 4]})
    assert [cell.label for cell in ranks] == [
        "small · 0.5 · pruned · seed 0",
        "small · 0.5 · lora · rank 2 · seed 0",
        "small · 0.5 · lora · rank 4 · seed 0",
    ]


def test_every_method_is_asked_the_same_tasks_and_a_released_model_as_a_full_one() -> None:
    asked = {method: cell.stage("tasks") for method, cell in every_method(evaluate={"tasks": ["toy_get"]}).items()}
    models = {method: stage.inputs.get("student") for method, stage in asked.items() if stage is not None}
    assert models.keys() == asked.keys()
    assert models["assisted"] == models["overfill"] != models["untrained"]
    released = asked["released"]
    assert released is not None and released.config["system"] == "full"
    assert released.inputs["teacher"].identity == every_method()["released"].stage("released").identity


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"distill": {"lora": {}}}, r"toy.yaml: `distill.lora` is for the method `lora`, which no cell has"),
        ({"released": RELEASED}, r"toy.yaml: `released` is for the method `released`, which no cell has"),
        ({"methods": ["released"]}, r"is `released`, but no model is named; add `released: \{model, revision\}`"),
        ({"methods": ["released"], "released": {"model": "a/b"}}, r"released.model = a/b: no such folder; .*revision"),
        ({"methods": ["lora"], "axes": {"distill.lora": [{"targets": []}]}}, "at least one linear layer, each once"),
        ({"methods": ["lora"], "axes": {"distill.lora": [{"targets": ["lm_head"]}]}}, "distill.lora.targets"),
        ({"methods": ["lora"], "axes": {"distill.lora.rank": [0]}}, "distill.lora.rank = 0"),
    ],
)
def test_what_would_change_nothing_or_cannot_be_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        toy_cells(**sections)


def test_a_released_model_in_a_folder_counts_by_its_content_and_brings_its_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    (cell,) = toy_cells(methods=["released"], released={"model": str(tmp_path)})
    assert cell.decodes == ModelShape.from_config(SHAPE)
    assert [stage.name for stage in cell.stages] == [*BEFORE, "held_out", *END]
    (tmp_path / "config.json").write_text(json.dumps(SHAPE) + "\n")
    from pipeline import graph

    graph._content.cache_clear()
    assert toy_cells(methods=["released"], released={"model": str(tmp_path)})[0].identity != cell.identity


def test_adapters_cost_less_to_train_than_all_weights(cells: dict[str, Cell]) -> None:
    full, lora = (cell_costs(cells[method])["distill"] for method in ("pruned", "lora"))
    assert lora.memory is not None and full.memory is not None and lora.memory < full.memory
    assert lora.flops is not None and full.flops is not None and lora.flops < full.flops
    shape = ModelShape(
        "llama", hidden=8, intermediate=20, layers=3, heads=4, kv_heads=2, head_dim=4, vocabulary=9, tied=True
    )
    assert adapter_parameters(shape, LoraConfig(rank=2, targets=("q_proj", "v_proj", "down_proj"))) == 3 * 2 * (
        (8 + 16) + (8 + 8) + (20 + 8)
    )
    released = cell_costs(cells["released"])
    assert released.keys() == {"teacher", "evaluate", "tasks"}
    assert released["evaluate"].memory < cell_costs(cells["full"])["evaluate"].memory


def test_a_report_has_a_row_of_every_method_from_its_own_system(cells: dict[str, Cell], tmp_path: Path) -> None:
    synthetic = SyntheticStore(tmp_path)
    for number, cell in enumerate(cells.values()):
        synthetic.finish(cell, outcomes(100 + number))
    table = {row["method"]: row for row in rows(list(cells.values()), synthetic.store)}
    timed = {"full": "full", "assisted": "exact", "overfill": "overfill", "untrained-overfill": "overfill"}
    for method, row in table.items():
        assert row["state"] == "done"
        assert row["tpot_s"] == TPOT[timed.get(method, "student")], method
        assert (row["seed"], row["train_tokens"]) == ((0, 1000) if method in TRAINED_AS else (None, None))
    released = table["released"]
    own = ModelShape.from_config(SHAPE).parameters()
    assert (released["ratio"], released["variant"], released["parameters"]) == (0.0, "small-1b", own)
    assert released["parameters_kept"] == own / table["full"]["parameters"]
    text = markdown(make_report("toy", "", list(cells.values()), synthetic.store))
    for name in ("assisted generation", "pruned, LoRA", "pruned, untrained", "OverFill, untrained", "released model"):
        assert name in text
