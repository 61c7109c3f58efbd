# ruff: noqa: E501 - tables of bad values, one after another
"""Store folders that were edited by hand, half deleted, or restored from a backup that was not whole.

Every command that reads a store says how it stands or what is wrong, in one line, and changes nothing in it; and a run
on a damaged store ends with whole artifacts or with the folder that is in its way, named."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzzing import contents, ends_well, examples, overfill, time_limit
from hypothesis import given
from hypothesis import strategies as st
from store_toys import chain
from synthetic_store import SyntheticStore, outcomes, toy_cells

from overfill.errors import UserError
from pipeline.config_io import dump_yaml
from pipeline.experiment import EXPERIMENT_FILE
from pipeline.runner import RunContext, StageFailed, run_graph
from pipeline.store import Store

JUNK = [
    *(b"", b"{", b"null", b"[]", b"{}", b'"x"', b"1", b"\x00\xff", b"[" * 5000, b'{"a":' * 5000, b"{" * 3000, b"NaN", b"x" * 3000),
    *(b'{"status": 1, "error": ["x"], "ended": "now"}', b'{"status": "failed", "error": "a\\nb\\u001b[31m", "ended": 1e999}'),
    *(b'{"owner": {"host": 1, "pid": "x", "started": [], "token": null}, "state": "held"}', b'{"reason": {"x": 1}}', b'{"reason": "a\\nb"}'),
    *(b'{"step": 1e999, "steps": -1, "tokens": 1e400, "time": NaN, "metrics": {"train/loss": 1e999}}\n', b'{"rows": 1, "device": 2}'),
    *(b'{"rows": [{"system": "overfill"}, 1, null], "device": null}', b'{"description": 3}', b'{"description": {"config": [[]]}}'),
    b'{"step": 1, "steps": 0, "tokens": 9007199254740993, "time": 1e10, "metrics": {"train/loss": "x", "y": null}}\n' * 3,
]  # fmt: skip
WORDS = ["", "x", "../..", "/etc", "\ud800", "[/b]", -1, 0, 1e308, 10**30, None, True, [], {}, [1], {"a": 1}, "a\nb"]

Damage = Callable[[Path, random.Random], None]


def delete(path: Path, chance: random.Random) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def replaced(path: Path, chance: random.Random) -> None:
    """By something of another kind."""
    delete(path, chance)
    kind = chance.choice(["file", "folder", "loop", "dangling", "pipe", "outside", "full"])
    if kind == "file":
        path.write_bytes(chance.choice(JUNK))
    elif kind in ("folder", "full"):
        path.mkdir()
        if kind == "full":
            (path / "x").write_text("y")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"loop": path.name, "dangling": "nowhere", "outside": "/usr"}[kind])


def junk(path: Path, chance: random.Random) -> None:
    if path.is_file():
        path.write_bytes(chance.choice(JUNK))


def bytes_changed(path: Path, chance: random.Random) -> None:
    """Some bytes changed, the size kept: what a record's sizes do not tell."""
    if path.is_file() and (content := bytearray(path.read_bytes())):
        for _ in range(chance.randint(1, 3)):
            content[chance.randrange(len(content))] = chance.choice([0, 10, 34, 57, 123, chance.randrange(256)])
        path.write_bytes(content)


def cut(path: Path, chance: random.Random) -> None:
    if path.is_file():
        content = path.read_bytes()
        path.write_bytes(content[: chance.randint(0, len(content))] + chance.choice([b"", b"\n", b"{"]))


def edited(path: Path, chance: random.Random) -> None:
    """A field of a JSON file set to something else, or left out."""
    if path.suffix != ".json" or not path.is_file():
        return junk(path, chance)
    try:
        root = json.loads(path.read_bytes())
    except ValueError:
        return
    node = root
    while isinstance(node, dict) and node:
        key = chance.choice(sorted(node))
        if not isinstance(node[key], dict) or not node[key] or chance.random() < 0.3:
            if chance.random() < 0.2:
                del node[key]
            else:
                node[key] = chance.choice(WORDS)
            break
        node = node[key]
    path.write_text(json.dumps(root))


def renamed(path: Path, chance: random.Random) -> None:
    target = path.with_name(
        chance.choice(["x", "0002", "99999999999", "٣", "payload", "_", f"{path.name}.bak", "staging-0001", "é" * 90])
    )
    if not os.path.lexists(target):
        path.rename(target)


def copied(path: Path, chance: random.Random) -> None:
    target = path.with_name(
        chance.choice([f"{path.name} (copy)", f"x_{path.name[-12:]}", "0007", "step-00000009-aaaaaa"])
    )
    if os.path.lexists(target):
        return
    if path.is_dir():
        with contextlib.suppress(shutil.Error):  # a pipe in it is left out
            shutil.copytree(path, target, symlinks=True)
    else:
        shutil.copy(path, target, follow_symlinks=False)


DAMAGES: list[Damage] = [delete, replaced, junk, bytes_changed, cut, edited, edited, renamed, copied]


def damage(root: Path, seed: int, times: int) -> None:
    """So many changes at places drawn from the seed."""
    chance = random.Random(seed)
    for _ in range(times):
        there = [
            Path(place, name) for place, folders, files in os.walk(root) for name in sorted(folders) + sorted(files)
        ]
        there = sorted(path for path in there if ".git" not in path.parts)
        path = chance.choice(there)
        if path.is_symlink() or path.is_fifo():
            delete(path, chance)
        else:
            chance.choice(DAMAGES)(path, chance)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a sweep of which three cells are finished and the last one failed and was interrupted."""
    root = tmp_path_factory.mktemp("sound") / "store"
    cells = toy_cells(ratios=(0.5,), seeds=(0, 1))
    store = SyntheticStore(root)
    for cell in cells[:3]:
        store.finish(cell, outcomes(150 - 10 * cell.index))
    other = cells[3].stage("distill")
    assert other is not None
    store.log(other, range(1, 5))
    build = store.begin(other)
    build.fail("ValueError: the loss is NaN")
    build.release()
    marker = store.store.progress(other) / other.identity / "step-00000004-abcdef" / "complete.json"
    marker.parent.mkdir(parents=True)
    marker.with_name("rank-00000.json").write_text('{"ranks": 1, "files": {}}')
    marker.write_text('{"ranks": 1}')
    store.begin(other).release()
    folder = root / "sweeps" / "toy"
    folder.mkdir(parents=True)
    values = cells[0].config.model_dump(mode="json", exclude_unset=True)
    axes = {"prune": [{"hidden": r, "intermediate": r} for r in (0.5,)], "distill.method": ["overfill", "pruned"]}
    (folder / EXPERIMENT_FILE).write_text(dump_yaml({**values, "prune": {}, "sweep": {"axes": axes, "seeds": [0, 1]}}))
    return root


COMMANDS = [
    *(
        ["status", "toy"],
        ["report", "toy"],
        ["report", "toy", "--json"],
        ["report", "toy", "--markdown"],
        ["status"],
        ["gc"],
    ),
    *(["report", "toy", "--summary"], ["report", "toy", "--csv"], ["plan", "FILE"]),
]


def test_the_sound_store_is_read_by_every_command(sound):
    before = contents(sound)
    for command in COMMANDS:
        words = [word.replace("FILE", str(sound / "sweeps" / "toy" / EXPERIMENT_FILE)) for word in command]
        assert ends_well(overfill(*words, "--store", str(sound))), command
    assert contents(sound) == before


def test_damaged_stores_are_read_or_refused_and_left_alone(sound, tmp_path_factory):
    home = tmp_path_factory.mktemp("stores")
    file = home / "toy.yaml"
    shutil.copy(sound / "sweeps" / "toy" / EXPERIMENT_FILE, file)

    @examples(quick=40, full=1200)
    @given(st.integers(0, 2**32), st.integers(1, 4), st.sampled_from(COMMANDS))
    def fuzz(seed: int, times: int, command: list[str]) -> None:
        root = home / "store"
        shutil.copytree(sound, root, symlinks=True)
        try:
            damage(root, seed, times)
            before = contents(root)
            words = [word.replace("FILE", str(file)) for word in command]
            ends_well(overfill(*words, "--store", str(root)), str(root))
            assert contents(root) == before
        finally:
            shutil.rmtree(root)

    fuzz()


def test_a_run_on_a_damaged_store_ends_whole_or_names_what_is_in_its_way(tmp_path_factory):
    home = tmp_path_factory.mktemp("stores")
    _, _, evaluate = chain()
    run_graph([evaluate], Store(home / "sound"))

    @examples(quick=40, full=600)
    @given(st.integers(0, 2**32), st.integers(1, 3))
    def fuzz(seed: int, times: int) -> None:
        root = home / "store"
        shutil.copytree(home / "sound", root, symlinks=True)
        try:
            damage(root, seed, times)
            payloads = [found for name, found in contents(root).items() if "/payload/" in name]
            store = Store(root, ttl=0.2)
            try:
                with time_limit():
                    run_graph([evaluate], store, RunContext(poll=0.02))
                assert store.verify(evaluate) is not None
            except UserError as error:
                assert str(root) in str(error) and "\n" not in str(error)
            except StageFailed as failure:
                assert isinstance(failure.__cause__, UserError | OSError)
            # What was altered may be set aside, but is there.
            assert not Counter(payloads) - Counter(contents(root).values())
        finally:
            shutil.rmtree(root)

    fuzz()
