"""`overfill plan`: what it prints, and that it needs neither torch nor a network."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from overfill.shapes import ModelShape
from pipeline.config import StageResources
from pipeline.config_training import TrainingConfig
from pipeline.cost import training_memory
from pipeline.planning import count, print_plan, size
from pipeline.store import Store

ROOT = Path(__file__).parents[2]
SHAPE = ModelShape("llama", 128, 352, 4, 4, 4, 32, 100, tied=True)


@pytest.mark.parametrize("name", ["llama-3.2-3b", "llama-3.1-8b", "qwen2.5-3b", "paper"])
def test_a_recipe_is_planned_from_shapes_alone(name, tmp_path):
    program = (
        "import sys\nfrom pipeline.cli import main\n"
        f"try: main(['plan', 'sweeps/{name}.yaml', '--store', {str(tmp_path)!r}])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "loaded = [m for m in ('torch', 'ray', 'mlflow', 'transformers') if m in sys.modules]\n"
        "assert not loaded, loaded"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr
    for word in ("distill", "ZeRO", "GiB", "no artifact", "39.5%" if name in ("llama-3.2-3b", "paper") else "%"):
        assert word in out.stdout
    assert not list(tmp_path.iterdir()), "planning writes nothing"


def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(tmp_path):
    for arguments in (["plan", "sweeps/nothing.yaml"], ["status", "nobody"], ["report"], ["resume", "x"]):
        command = [sys.executable, "-m", "pipeline.cli", *arguments, "--store", str(tmp_path)]
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert out.returncode == 2, arguments
        assert out.stderr.startswith("overfill: ")
        assert out.stderr.count("\n") == 1


def test_zero_stages_shard_what_they_say():
    training = TrainingConfig(dtype="bf16")
    parameters = SHAPE.parameters()
    activations = training_memory(SHAPE, None, training, StageResources(workers=4), 32) - parameters * 16
    for stage, bytes_per_parameter in ((0, 16), (1, 4 + 12 / 4), (2, 2 + 14 / 4), (3, 16 / 4)):
        memory = training_memory(SHAPE, None, training, StageResources(workers=4, zero_stage=stage), 32)
        assert memory - activations == pytest.approx(parameters * bytes_per_parameter)


def test_checkpointing_and_chunks_lower_the_memory():
    training = TrainingConfig()
    plain = training_memory(SHAPE, SHAPE, training, StageResources(), 128)
    assert training_memory(SHAPE, SHAPE, training, StageResources(activation_checkpointing=True), 128) < plain
    assert training_memory(SHAPE, SHAPE, training, StageResources(loss_chunks=8), 128) < plain


@pytest.mark.parametrize(("number", "words"), [(1_268_367_552, "1.27 B"), (812_000, "812 k"), (12, "12")])
def test_counts_are_short(number, words):
    assert count(number) == words


def test_sizes_are_binary():
    assert size(3.5 * 2**30) == "3.5 GiB"


def test_a_large_plan_lists_some_stages_of_each_kind_and_counts_the_others(tmp_path):
    from pipeline.config import ExperimentConfig
    from pipeline.experiment import Experiment
    from pipeline.sweep import expand

    values = {"name": "x", "teacher": {"pretrain": {}}, "prune": {"hidden": 0.5}, "sweep": {"seeds": list(range(250))}}
    config = ExperimentConfig.model_validate(values)
    console = Console(file=io.StringIO(), width=200)
    print_plan(Experiment(config, expand(config, "x.yaml")), Store(tmp_path), console)
    text = console.file.getvalue()
    assert "and 240 more distill: run" in text and "and 240 more evaluate: run" in text
    assert "250 cells" in text and len(text.splitlines()) < 80
