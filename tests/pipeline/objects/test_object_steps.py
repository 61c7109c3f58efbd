"""Step checkpoints on an object store: complete when every rank's files and the marker are there."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from store_toys import toy

from overfill.errors import UserError
from pipeline.objects.build import ObjectBuild
from pipeline.objects.mirror import CACHE_VARIABLE
from pipeline.objects.site import Courier
from pipeline.objects.steps import ObjectSteps
from pipeline.objects.store import ObjectStore
from pipeline.stage import StageRun
from pipeline.training.assemble import _newest_checkpoint
from pipeline.training.checkpoints import MARKER, Position, new_name, read_position, write_manifest, write_position
from pipeline.training.distributed import Place

STAGE = toy("distill", does="steps")
RANKS = 2


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectBuild]:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    store = ObjectStore(f"file://{tmp_path}/bucket")
    begun = ObjectBuild.start(store, STAGE, store.facts(STAGE), None)
    assert isinstance(begun, ObjectBuild)
    yield begun
    if not begun.ended:
        begun.interrupt("the test is over")
    begun.release()


def steps(build: ObjectBuild, node: str) -> ObjectSteps:
    """As a rank sees them that writes in a folder of its own."""
    return ObjectSteps.of(build.site, build.progress / node / STAGE.identity)


def write(build: ObjectBuild, step: int, mark: bool = True, keep: int = 2, first: ObjectSteps | None = None) -> str:
    """Every rank writes its part; the first marks."""
    first = first or steps(build, "node-0")
    name = new_name(step)
    for rank in range(RANKS):
        own = steps(build, f"node-{rank}")
        folder = own.root / name
        folder.mkdir(parents=True)
        (folder / f"rank-{rank:05d}.safetensors").write_bytes(bytes([rank]) * (step + 1))
        files = [folder / f"rank-{rank:05d}.safetensors"]
        files += [write_position(folder, Position(step, step * 10))] if rank == 0 else []
        own.sent(folder, [*files, write_manifest(folder, rank, RANKS, files)])
    if mark:
        run = StageRun(STAGE, {}, build.staging, build.progress / "node-0", build.lease.folder, site=build.site)
        with Courier(build.site, run):
            run.log_metrics(step, 20, {"train/loss": 1.0})
            first.complete(first.root / name, RANKS, keep)
            assert [line["step"] for line in lines(build)][-1] == step, "the lines before it are there when it is"
    for rank in range(RANKS):
        steps(build, f"node-{rank}").leave(steps(build, f"node-{rank}").root / name)
    return name


def lines(build: ObjectBuild) -> list[dict[str, int]]:
    """All lines of metrics in the bucket."""
    keys = build.store.bucket.list(f"{build.key}/progress/metrics/")
    return [json.loads(line) for key in keys for line in (build.store.bucket.read(key) or b"").splitlines()]


def newest(build: ObjectBuild) -> tuple[str | None, dict[str, str]]:
    torn: dict[str, str] = {}
    return steps(build, "another").newest(lambda name, why: torn.update({name: why})), torn


def look(build: ObjectBuild) -> tuple[int | None, str]:
    """What status and plan say once the attempt is over."""
    if not build.ended:
        build.interrupt("preempted")
        build.release()
    facts = build.store.facts(STAGE, explain=False)
    return facts.checkpoint, facts.torn


def test_the_newest_complete_one_is_found_with_all_ranks_files_and_old_ones_are_gone(build: ObjectBuild):
    first = steps(build, "node-0")
    names = [write(build, step, first=first) for step in (5, 10, 15)]
    assert newest(build) == (names[2], {})
    folder = steps(build, "another").open(names[2])
    assert read_position(folder).tokens == 150
    assert (folder / "rank-00001.safetensors").read_bytes() == b"\x01" * 16
    there = {key.split("/")[4] for key in build.store.bucket.list(f"{build.key}/progress/{STAGE.identity}/")}
    assert there == set(names[1:])
    assert not list(build.progress.glob("node-*/*/step-*")), "ranks keep nothing on their disks"
    assert look(build) == (15, "")


def test_one_without_its_marker_is_torn_and_the_one_before_is_used(build: ObjectBuild):
    whole, torn = write(build, 5), write(build, 10, mark=False)
    assert newest(build) == (whole, {torn: f"{MARKER} is missing"})
    assert look(build) == (5, f"{torn} ({MARKER} is missing)")


@pytest.mark.parametrize(
    ("content", "why", "seen"),
    [
        (b"\x01" * 10 + b"\x02", "rank-00001.safetensors is not what was written (sha256 differs)", False),
        (b"\x01" * 10, "rank-00001.safetensors has 10 bytes, 11 were written", True),
        (None, "rank-00001.safetensors is missing", True),
    ],
)
def test_a_damaged_one_is_named_and_skipped(build: ObjectBuild, content: bytes | None, why: str, seen: bool):
    whole, damaged = write(build, 5), write(build, 10)
    key = f"{build.key}/progress/{STAGE.identity}/{damaged}/rank-00001.safetensors"
    if content is None:
        build.store.bucket.remove([key])
    else:
        build.store.bucket.write(key, content)
    assert newest(build) == (whole, {damaged: why})
    with pytest.raises(UserError, match="this step checkpoint is damaged"):
        steps(build, "another").open(damaged)
    assert look(build) == ((5, f"{damaged} ({why})") if seen else (10, ""))


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_ones_that_were_skipped_make_room_for_the_run_that_goes_on(build: ObjectBuild, keep: int):
    whole = write(build, 5, keep=9)
    for name in (write(build, 10, keep=9), write(build, 15, keep=9)):
        build.store.bucket.write(f"{build.key}/progress/{STAGE.identity}/{name}/rank-00001.safetensors", b"?")
    first = steps(build, "node-0")
    assert first.newest(lambda name, why: None) == whole
    new = write(build, 7, keep=keep, first=first)
    assert newest(build) == (new, {})
    there = {key.split("/")[4] for key in build.store.bucket.list(f"{build.key}/progress/{STAGE.identity}/")}
    assert there == {new, *([whole] if keep == 2 else [])}


def test_who_has_lost_the_lease_removes_nothing_of_what_its_successor_writes(build: ObjectBuild):
    before, lost = write(build, 5), steps(build, "node-0")
    assert lost.newest(lambda name, why: None) == before
    being_written = write(build, 7, mark=False)
    ahead = write(build, 15, keep=1, first=lost)
    there = {key.split("/")[4] for key in build.store.bucket.list(f"{build.key}/progress/{STAGE.identity}/")}
    assert there == {being_written, ahead}


def test_a_nodes_copy_that_was_written_to_is_fetched_again(build: ObjectBuild):
    name = write(build, 5)
    copy = steps(build, "another").open(name) / "rank-00001.safetensors"
    whole = copy.read_bytes()
    copy.write_bytes(b"\x02" * len(whole))
    assert newest(build) == (name, {})
    assert copy.read_bytes() == whole
    copy.unlink()
    steps(build, "another").open(name)
    assert copy.read_bytes() == whole


class TwoPlaces:
    """Two ranks, each in a thread of its own, and what they tell each other."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(RANKS, timeout=10)
        self.said: list[Any] = [None] * RANKS

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.said[rank] = value
        self.barrier.wait()
        said = list(self.said)
        self.barrier.wait()
        return said

    def of(self, rank: int) -> Place:
        return TwoPlaces.One(rank, RANKS, torch.device("cpu"), self)

    @dataclass(frozen=True)
    class One(Place):
        all: TwoPlaces

        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            return torch.stack(self.all.exchange(self.rank, tensor)).sum(0)

        def from_first(self, value: Any) -> Any:
            return self.all.exchange(self.rank, value)[0]


def test_what_another_node_cannot_have_whole_no_rank_goes_on_from(build: ObjectBuild, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ObjectSteps, "_local", lambda self, name: self.root.parent / "copies" / name)
    whole, damaged = write(build, 5), write(build, 10)
    ranks = [steps(build, f"node-{rank}") for rank in range(RANKS)]
    assert ranks[0].newest(lambda name, why: None) == damaged, "and has it on its node, from before it was damaged"
    build.store.bucket.write(f"{build.key}/progress/{STAGE.identity}/{damaged}/rank-00001.safetensors", b"\x02" * 11)
    places = TwoPlaces()
    with ThreadPoolExecutor(RANKS) as pool:
        found = pool.map(lambda rank: _newest_checkpoint(ranks[rank], places.of(rank)), range(RANKS))
        assert [folder and folder.name for folder in found] == [whole] * RANKS
    new = write(build, 7, first=ranks[0])
    assert newest(build) == (new, {}), "the damaged one is removed"


def test_publishing_removes_them_and_keeps_the_curve(build: ObjectBuild):
    write(build, 5)
    build.publish({})
    left = build.store.bucket.list(f"{build.key}/progress/")
    assert left
    assert all("/metrics/" in key for key in left)
