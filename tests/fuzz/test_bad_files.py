# ruff: noqa: E501 - tables of bad values, one after another
"""Experiment files that people break by hand, by editor, by template, or on purpose."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fuzzing import contents, ends_well, examples, overfill
from hypothesis import given
from hypothesis import strategies as st

from pipeline import commands
from pipeline.config import ExperimentConfig
from pipeline.config_io import parse_yaml

SWEEPS = sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml"))
BASES: list[Any] = [parse_yaml(path.read_text(encoding="utf-8"), path.name) for path in SWEEPS]


@dataclass(frozen=True)
class Raw:
    """A piece of YAML that is written as it stands."""

    text: str


SCALARS: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, 2**64, -(2**63), 10**40, 10**400, 0.0, -0.0, 0.5, 1.5, -0.5, 1e-300),
    *(1e308, "", " ", "x", "none", "exact", "toy", "full", "héllo", "日本", "a\nb", "a\tb", "[/bold]", "[red]x", "x" * 300),
    *("../..", "/", "~", "~nobody-here/x", "a/b/c", "a:b", "{}", "%s", "${HOME}", "{{ x }}", "\x1b[31m", "\u202e", "\ufeffx"),
    *("hf://x", "file:///etc", "entropy>2", "entropy>" + "9" * 400, "9" * 5000, "((((", "(a{99999999999})", "(" * 3000 + ")" * 3000),
    *([], {}, [[]], [0], [1, 2], [1, 1], [None], ["x"], {"x": 1}, [0.5, 2], [{"hidden": 0.5}], {"uniform": [0, 1]}),
    *({"log_uniform": [0, 1]}, {"uniform": [1e308, -1e308]}, [[[[[[1]]]]]], {"a": {"b": {"c": {}}}}, list(range(20))),
]  # fmt: skip
SNIPPETS = [
    *(".inf", "-.inf", ".nan", "1e400", "0o17", "017", "0x1F", "0b1", "12:30:45", "190:20:30", "2026-01-01", "1_000"),
    *("2026-01-01T00:00:00Z", "yes", "no", "on", "~", "!!str 1", "!!int x", "!!int '1'", "!!float x", "!!bool x", "!!null x"),
    *("!!binary aGVsbG8=", "!!binary x", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!timestamp x", "!!timestamp 2026-01-01"),
    *("!!python/object:os.system {}", "!!python/object/apply:os.system [id]", "!!python/name:os.system", "!!python/tuple [1]"),
    *("!local x", "!<tag:x> y", "!!map []", "!!seq {}", "!!str {}", "!!map x", "&a [*a]", "&a {b: *a}", "*nowhere", "&b 1"),
    *('"\\ud800"', '"\\0"', '"\\x07"', '"\\q"', "'", '"', "|", ">", "@x", "`x`", "%x", "#", "? x", "? [1] : 2", "{[1]: 2}", "{{1: 2}: 3}"),
    *("{1: 2}", "{null: 1}", "{true: 1}", "{.nan: 1}", "{1.5: x, '1.5': y}", "{a: 1, a: 2}", "{<<: 1}", "{<<: {a: 1}}", "{<<: [1]}"),
    *("{<<: &m {<<: *m}}", "[" * 80 + "]" * 80, "[" * 3000 + "]" * 3000, "{a: " * 90 + "1" + "}" * 90, "1" * 4000, "1" * 5000, "- 1", "a: b: c"),
    *(f"[{', '.join('x' * 5 for _ in range(3000))}]", "\u00a0", "\u2028", "\x85", "[1, 2", "}", "--- 1", "... "),
]  # fmt: skip
KEYS: list[Any] = [
    *("", " ", "a b", "name", "teacher", "sweep", "axes", "prune.hidden", "<<", "distill.loss.kl", "x" * 200, "é", "[b]"),
    *(Raw("1"), Raw("null"), Raw("true"), Raw("1.5"), Raw("[1]"), Raw("{a: 1}"), Raw("? "), Raw("!!binary aA=="), Raw(".nan")),
    *("models", "hiden", "data.path", "teacher.shape.hidden_size", "prune..hidden", ".", "sweep.seeds", "resources", '"', "a\nb"),
]  # fmt: skip


def emit(value: Any) -> str:
    """YAML in flow style. A mapping is a list of pairs in a tuple, so that a key may be there twice."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, tuple):
        return "{" + ", ".join(f"{emit(key)}: {emit(item)}" for key, item in value) + "}"
    if isinstance(value, dict):
        return emit(tuple(value.items()))
    if isinstance(value, list):
        return "[" + ", ".join(map(emit, value)) + "]"
    return json.dumps(value, ensure_ascii=random.Random(str(value)).random() < 0.5)


def emit_file(value: Any) -> str:
    """Sections as block mappings, so that lines, tabs and indentation can be damaged too."""
    if not isinstance(value, dict | tuple):
        return emit(value)
    return "".join(
        f"{emit(key)}: {emit(item)}\n" for key, item in (value.items() if isinstance(value, dict) else value)
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in plain values but the root."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def changed(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], list[tuple[Any, Any]]]) -> Any:
    """A copy in which the entry at `path` is replaced by what `change(key, value)` gives: none, one or several."""
    if isinstance(value, list):
        pairs: list[tuple[Any, Any]] = list(enumerate(value))
    else:
        pairs = list(value.items())
    head, *rest = path
    found: list[tuple[Any, Any]] = []
    for key, item in pairs:
        if key != head:
            found.append((key, item))
        elif rest:
            found.append((key, changed(item, tuple(rest), change)))
        else:
            found += change(key, item)
    return [item for _, item in found] if isinstance(value, list) else tuple(found)


def fields() -> list[tuple[str, ...]]:
    """Every dotted path that an experiment knows, two levels and `teacher.pretrain` deep."""
    from pipeline.config_io import _model_in

    found: list[tuple[str, ...]] = []
    for name, field in ExperimentConfig.model_fields.items():
        found.append((name,))
        inner = _model_in(field.annotation)
        for below, deeper in (inner.model_fields if inner else {}).items():
            found.append((name, below))
            deepest = _model_in(deeper.annotation)
            found += [(name, below, last) for last in (deepest.model_fields if deepest else ())]
    return found


FIELDS = fields()
nasty = st.sampled_from([*SCALARS, *map(Raw, SNIPPETS)]) | st.text(max_size=12) | st.integers() | st.floats()


@st.composite
def damaged(draw: st.DrawFn, zoo: tuple[str, ...]) -> str:
    """The text of a valid experiment file after a few changes of its structure."""
    value: Any = json.loads(json.dumps(draw(st.sampled_from(BASES))))
    bad = nasty | st.sampled_from(zoo)
    if draw(st.booleans()):
        value["data"] = {"source": draw(st.sampled_from(["jsonl", "parquet"])), "path": draw(st.sampled_from(zoo))}
        value["teacher"] = draw(st.sampled_from([{"model": draw(st.sampled_from(zoo))}, BASES[0]["teacher"]]))
    for _ in range(draw(st.integers(1, 3))):
        known = [path for path in places(value) if not isinstance(path[0], tuple)]
        kind = draw(st.sampled_from(["replace", "set", "drop", "rename", "twice", "wrap", "beside"]))
        path = draw(st.sampled_from(known))
        new, key = draw(bad), draw(st.sampled_from(KEYS))
        if kind == "set":
            value = with_field(value, draw(st.sampled_from(FIELDS)), new)
            continue
        change: dict[str, Callable[[Any, Any], list[tuple[Any, Any]]]] = {
            "replace": lambda old, item: [(old, new)],  # noqa: B023
            "drop": lambda old, item: [],
            "rename": lambda old, item: [(key, item)],  # noqa: B023
            "twice": lambda old, item: [(old, item), (old, new)],  # noqa: B023
            "wrap": lambda old, item: [(old, [item] if isinstance(item, dict) else {"x": item})],
            "beside": lambda old, item: [(old, item), (key, new)],  # noqa: B023
        }
        value = changed(value, path, change[kind])
        if not isinstance(value, dict):  # pairs: nothing more can be changed by path, as a key may be there twice
            break
    return emit_file(value)


def with_field(value: dict[str, Any], path: tuple[str, ...], new: Any) -> dict[str, Any]:
    """The field at `path` set to `new`; sections on the way are made."""
    head, *rest = path
    if not rest:
        return {**value, head: new}
    inner = value.get(head)
    return {**value, head: with_field(inner if isinstance(inner, dict) else {}, tuple(rest), new)}


@st.composite
def files(draw: st.DrawFn, zoo: tuple[str, ...]) -> bytes:
    """A damaged file's bytes, in one case of three damaged as a text too."""
    text = draw(damaged(zoo))
    if draw(st.integers(0, 2)):
        return text.encode("utf-8", "surrogatepass")
    place = draw(st.integers(0, len(text)))
    piece = draw(
        st.sampled_from(
            ["\t", "\0", "\n", ":", "- ", "'", "{", "]", "&", "*", "\u2028", "\n---\n", "\n...\n", "é", "!"]
        )
    )
    text = draw(
        st.sampled_from(
            [
                *(
                    text[:place],
                    text[:place] + piece + text[place:],
                    text + "---\nname: y\n",
                    "%YAML 9.9\n---\n" + text,
                ),
                *(
                    text.replace("\n", "\r\n"),
                    text.replace("\n", "\n\t"),
                    text.replace(" ", "\t"),
                    text.replace(" ", "\u00a0"),
                ),
                *(
                    text[place:],
                    text + text,
                    "- " + text.replace("\n", "\n  "),
                    "# " + text,
                    text + "x: !!python/none\n",
                ),
            ]
        )
    )
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "latin-1", "utf-16", "utf-32", "cp1252", "utf-8"]))
    return text.encode(encoding, "replace")


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Paths that are no corpus and no model, each in its own way."""
    home = tmp_path_factory.mktemp("zoo")
    for name in ("empty", "pipes", "links", "models", "broken", "shapes", "strange", "train-is-a-folder"):
        (home / name).mkdir()
    os.mkfifo(home / "fifo.jsonl")
    os.mkfifo(home / "pipes" / "train.jsonl")
    (home / "links" / "train.jsonl").symlink_to("train.jsonl")
    (home / "links" / "loop").symlink_to("../links")
    (home / "loop.jsonl").symlink_to("loop.jsonl")
    (home / "dangling.jsonl").symlink_to("nowhere")
    (home / "zero.jsonl").symlink_to("/dev/zero")
    (home / "models" / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    (home / "broken" / "config.json").write_bytes(b'{"model_type": \xff')
    (home / "shapes" / "config.json").write_text("[1, 2]")
    (home / "strange" / "config.json").mkdir()
    (home / "train-is-a-folder" / "train.jsonl").mkdir()
    (home / "empty.jsonl").touch()
    (home / "binary.parquet").write_bytes(bytes(range(256)))
    (home / "sound.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    found = [str(path) for path in sorted(home.iterdir())]
    return (
        *found,
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
        "/dev/stdin",
        "/",
        str(home),
        "\0",
        "x" * 5000,
        "~nobody-here/x",
    )


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def ends_alike(path: Path, store: Path, *rest: str) -> None:
    """`plan` of a file runs or says what is wrong with it, naming it, and touches neither the file nor the store."""
    before = path.read_bytes()
    ends_well(overfill("plan", str(path), "--store", str(store), *rest), str(path), *rest)
    assert path.read_bytes() == before and not contents(store)


def test_damaged_experiments_are_planned_or_refused(zoo, store, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "x.yaml"

    @examples(quick=80, full=2400)
    @given(files(zoo))
    def fuzz(content: bytes) -> None:
        path.write_bytes(content)
        ends_alike(path, store)

    fuzz()


def test_any_text_is_refused(store, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "x.yaml"

    @examples(quick=40, full=500)
    @given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
    def fuzz(content: bytes) -> None:
        path.write_bytes(content)
        ends_alike(path, store)

    fuzz()


def test_damaged_overrides_are_planned_or_refused(store, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "x.yaml"
    path.write_bytes(SWEEPS[-1].read_bytes())

    @examples(quick=40, full=600)
    @given(st.sampled_from(FIELDS).map(".".join) | st.text(max_size=12), nasty)
    def fuzz(field: str, value: Any) -> None:
        ends_alike(path, store, "--set", f"{field}={emit(value)}")

    fuzz()


def test_what_can_be_planned_can_be_started_and_is_kept_as_it_was(zoo, tmp_path_factory, monkeypatch):
    """`run` up to where Ray would start, and from there `resume` and `status` of what it kept.

    Ray itself takes seconds to start, and by then the file has been read, checked, and written into the store."""
    home = tmp_path_factory.mktemp("files")
    started = []
    monkeypatch.setattr(commands, "run_missing", lambda experiment, *_: started.append(experiment) or stop())

    def stop() -> None:
        raise SystemExit(0)

    @examples(quick=30, full=600)
    @given(files(zoo))
    def fuzz(content: bytes) -> None:
        path, store = home / "x.yaml", Path(tempfile.mkdtemp(dir=home))
        path.write_bytes(content)
        started.clear()
        ran = ends_well(overfill("run", str(path), "--store", str(store)), str(path), str(store))
        assert path.read_bytes() == content and ran == bool(started)
        if not ran:
            assert not contents(store)
            return
        before = contents(store)
        (experiment,) = started
        for command in ("resume", "status", "report"):
            assert ends_well(overfill(command, experiment.name, "--store", str(store))), command
        assert [cell.identity for cell in started[-1].cells] == [cell.identity for cell in experiment.cells]
        assert contents(store) == before

    fuzz()


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))
AXES = "".join(f"    data.seed{i}: [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" for i in range(20))
LARGE = {
    "billion laughs": LAUGHS,
    "billion merges": MERGES,
    "billion cells": "name: x\nteacher: {pretrain: {}}\nsweep:\n  axes:\n" + AXES,
    "billion samples": "name: x\nteacher: {pretrain: {}}\nsweep: {search: random, samples: 1_000_000_000}\n",
    "deep": "x: " + "[" * 200_000,
    "deep block": "".join(f"{' ' * depth}a:\n" for depth in range(1500)),
    "one long line": "name: " + "x" * 3_000_000,
    "one long key": "x" * 3_000_000 + ": 1",
    "many keys": "".join(f"k{number}: 1\n" for number in range(30_000)),
    "many documents": "---\n" * 100_000,
    "many tabs": "\t" * 1_000_000,
    "10 MB": "# x\n" * 2_500_000,
    "long scalar": "name: x\nteacher: {pretrain: {}}\nprune: {hidden: " + "9" * 1_000_000 + "}\n",
    "long value": "name: x\nteacher: {pretrain: {}}\nseed: {"
    + ", ".join(f"k{i}: [[[[1]]]]" for i in range(5000))
    + "}\n",
}


@pytest.mark.parametrize("kind", LARGE)
def test_what_grows_without_bounds_is_refused(kind, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(LARGE[kind])
    assert not ends_well(overfill("plan", str(path), "--store", str(tmp_path / "store")), str(path))


def test_a_path_that_is_no_file_is_refused(zoo, tmp_path):
    for name in zoo:
        ended = overfill("plan", name, "--store", str(tmp_path))
        assert not ends_well(ended), name


def test_a_store_that_is_no_folder_is_refused(zoo, tmp_path):
    urls = ("s3://", "s3://user:password@bucket/x", "https://example.com/x", "file://relative")
    for name in ("\0", "x" * 5000, "~nobody-here/x", *urls, "/dev/null", *zoo):
        for command in (("plan", str(SWEEPS[-1])), ("status",), ("report", "x")):
            before = contents(tmp_path)
            ends_well(overfill(*command, "--store", name))
            assert contents(tmp_path) == before
