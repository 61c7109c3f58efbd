"""Experiment files: what a mistake looks like to the user, and what is read from a right one."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overfill.errors import UserError
from pipeline.config import ExperimentConfig
from pipeline.config_io import dump_yaml, load_experiment, parse_yaml, schema

RIGHT = "name: x\nteacher: {pretrain: {}}\n"
SWEEPS = sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml"))


def load(tmp_path: Path, text: str, *overrides: str) -> ExperimentConfig:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return load_experiment(path, overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an experiment is a mapping of sections"),
        ("- 1", "an experiment is a mapping of sections"),
        ("name: x", "teacher: is missing"),
        ("name: x\nteacher: {modle: a}", "teacher.modle: no such field; did you mean `model`?"),
        (
            "name: x\nteacher: {model: a, revision: 12}",
            "teacher.revision = 12: this field is a text; write the value in quotes",
        ),
        ("name: x\nname: y\n", "x.yaml:2:1: not valid YAML: key `name` given twice"),
        ("name: [", "not valid YAML"),
        (RIGHT + "prune: {hidden: 1.5}", "prune.hidden = 1.5: a width is a share to remove"),
        (RIGHT + "prune: {hidden: true}", "prune.hidden = true: a width is a share"),
        (RIGHT + "prune: {hidden: 0.5, parameters: 5}", "prune: give either `parameters` or the widths"),
        (RIGHT + "distill: {learning_rate: fast}", 'distill.learning_rate = "fast"'),
        (RIGHT + "distill: {loss: {kl: 0}}", "distill.loss: every weight is 0"),
        (RIGHT + "data: {source: jsonl}", "data: source `jsonl` needs `path`"),
        (RIGHT + "data: {source: jsonl, path: a}", "`teacher.pretrain.tokenizer.vocabulary` is needed"),
        (RIGHT + "evaluate: {answer: '####'}", 'evaluate.answer = "####": needs a group'),
        (RIGHT + "sweep: {axes: {prune.hidden: []}}", "sweep: axis `prune.hidden` has no values"),
        (RIGHT + "sweep: {axes: {prune.hidden: {uniform: [0, 1]}}}", "`search: grid` needs a list of values"),
        (RIGHT + "sweep: {seeds: [1, 1]}", "`seeds` needs at least one seed, each once"),
    ],
)
def test_a_mistake_is_one_line_with_file_field_value_and_way_out(tmp_path, text, message):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
    assert str(tmp_path / "x.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "quickstart.yaml").write_text(RIGHT)
    with pytest.raises(UserError, match=r"no such file; did you mean .*quickstart\.yaml"):
        load_experiment(tmp_path / "quikstart.yaml")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00x", b"\x00\x01\x02"])
def test_a_binary_file_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.yaml"):
        load_experiment(tmp_path / "x.yaml")


def test_a_folder_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_experiment(tmp_path)


def test_scalars_are_read_as_people_mean_them():
    text = "[no, yes, 1e-4, 500_000_000, 0x10, 2026-01-01, null, true, .5, 12:30, '1']"
    expected = ["no", "yes", 1e-4, 500_000_000, 16, "2026-01-01", None, True, 0.5, "12:30", "1"]
    assert parse_yaml(text, "here") == expected


def test_overrides_reach_fields_sections_and_absent_sections(tmp_path):
    config = load(tmp_path, RIGHT, "prune.hidden=0.5", "distill.loss={kl: 2.0}", "sweep.seeds=[3, 4]")
    assert config.prune.hidden == 0.5
    assert config.distill.loss is not None
    assert config.distill.loss.kl == 2.0
    assert config.sweep.seeds == (3, 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.hidden", "write it as dotted.path=value"),
        ("=3", "write it as dotted.path=value"),
        ("name.x=3", '`name` is "x", so it has no field `x`'),
        ("prune.hiden=3", "prune.hiden: no such field; did you mean `hidden`?"),
        ("prune.hidden=[", "--set prune.hidden=[:1"),
    ],
)
def test_a_wrong_override_is_one_line(tmp_path, override, message):
    with pytest.raises(UserError) as caught:
        load(tmp_path, RIGHT, override)
    assert message in str(caught.value)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_every_experiment_in_the_repository_parses(path):
    from pipeline.sweep import combinations

    text = path.read_text(encoding="utf-8")
    overrides = [f"data.path={path.parent}"] if "source: jsonl" in text else []
    config = load_experiment(path, overrides)
    assert config.name == path.stem
    assert text.startswith("# ") and "Hypothesis" in text
    assert list(combinations(config.sweep))


def test_what_is_dumped_is_read_back_the_same(tmp_path):
    config = load(tmp_path, RIGHT, "prune.hidden=0.5", "sweep.axes={distill.learning_rate: [1e-3]}")
    again = load(tmp_path, dump_yaml(config.model_dump(mode="json", exclude_unset=True)))
    assert again == config


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=8), st.recursive(st.none() | st.floats() | st.text(), st.lists, max_leaves=4)))
def test_no_mapping_makes_anything_but_a_config_or_a_user_error(values):
    from pipeline.config_io import validate

    try:
        assert validate(ExperimentConfig, values, "here").name
    except UserError as error:
        assert "\n" not in str(error)


def test_the_schema_describes_every_section_with_its_docstrings():
    found = schema()
    assert set(ExperimentConfig.model_fields) == set(found["properties"])
    loss = found["$defs"]["LossConfig"]["properties"]
    assert loss["kv"]["description"].startswith("Weight of the KV match")


def test_reading_a_config_loads_no_torch_and_no_ray():
    program = (
        "import sys, overfill, pipeline.config_io, pipeline.sweep, pipeline.planning, pipeline.experiment\n"
        "print([name for name in ('torch', 'ray', 'mlflow', 'deepspeed', 'transformers') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
