"""What the store says of what lies in it; nothing damaged is ever used."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from store_toys import chain, toy

from overfill.errors import UserError
from pipeline import fingerprint
from pipeline.build import Build
from pipeline.lease import Sighting
from pipeline.record import Record, write_text
from pipeline.resume import Facts, Reuse, plan
from pipeline.runner import RunContext, StageFailed, run_graph
from pipeline.stage import External, append_line
from pipeline.store import AlteredArtifact, Store
from pipeline.whole import verify_model


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def test_the_layout_is_the_documented_one(store: Store):
    stage = toy(label="llama", layers=2)
    run_graph([stage], store)
    folder = store.root / "teacher" / f"llama_{stage.identity}"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()) == [
        "attempts/0001/attempt.json",
        "attempts/0001/lease.json",
        "attempts/0001/log.txt",
        "attempts/0001/outcome.json",
        "identity.json",
        "lease.json",
        "payload/config.json",
        "payload/read/inputs.json",
        "payload/record.json",
    ]
    assert json.loads((folder / "identity.json").read_text())["description"]["config"] == {"layers": 2}


@pytest.mark.parametrize("target", ["../../elsewhere", "teacher/another_0123456789ab", "/tmp/x_{}", None])
def test_a_claim_that_names_no_folder_of_its_identity_is_replaced(store: Store, target: str | None):
    stage = toy(layers=2)
    claim = store.root / ".claims" / stage.identity
    claim.parent.mkdir(parents=True)
    if target is None:
        claim.write_text("no link")
    else:
        claim.symlink_to(target.format(stage.identity))
    folder = store.create(stage)
    assert folder == store.root / "teacher" / stage.folder_name == store.find(stage.identity)
    assert claim.readlink() == Path("teacher", stage.folder_name)
    assert {path.name for path in store.root.parent.iterdir()} == {"runs"}
    assert Store(store.root).create(toy(layers=2, label="another")) == folder


def test_a_file_system_without_locks_has_one_writer_too(store: Store, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    folder = store.root / "sweeps" / "toy"
    first = store.alone(folder)
    assert first is not None
    assert Store(store.root).alone(folder) is None
    first.close()
    second = Store(store.root).alone(folder)
    assert second is not None
    second.close()
    append_line(folder / "metrics.jsonl", "a line")
    append_line(folder / "metrics.jsonl", "another")
    assert (folder / "metrics.jsonl").read_text() == "a line\nanother\n"


def test_a_record_says_what_there_is_and_where_it_came_from(store: Store):
    teacher, distill, _ = chain()
    run_graph([distill], store, RunContext(resources={"distill": {"workers": 2}}))
    record = store.record(distill)
    assert record is not None
    assert record.inputs == {"teacher": teacher.identity}
    assert record.metrics == {"inputs": 1, "share": 0.5}
    assert type(record.metrics["inputs"]) is int
    assert set(record.files) == {"config.json", "read/inputs.json"}
    assert record.bytes == sum(len((store.payload(distill) / name).read_bytes()) for name in record.files)
    assert (record.stage, record.identity, record.attempt) == ("distill", distill.identity, 1)
    assert record.resources == {"workers": 2}
    assert record.libraries["pydantic"] and record.libraries["python"]
    assert 0.0 < record.seconds <= record.seconds_all_attempts < 60.0
    assert record.started <= record.finished
    assert Record.model_validate_json(record.model_dump_json()) == record


def test_an_artifact_is_found_by_identity_whatever_its_label(store: Store):
    built = toy(label="first", layers=2)
    run_graph([built], store)
    same = toy(label="second", layers=2)
    assert store.folder(same) == store.folder(built)
    assert store.record(same) == store.record(same.identity) is not None
    assert plan([same], store.gather([same])) == [Reuse(same, "its artifact is there")]


def test_an_artifact_is_found_after_its_folder_was_renamed_or_copied_without_the_index(store: Store, tmp_path: Path):
    stage = toy(layers=2)
    run_graph([stage], store)
    store.folder(stage).rename(store.root / "teacher" / f"better-name_{stage.identity}")
    assert store.record(stage) is not None
    shutil.copytree(store.root / "teacher", tmp_path / "copy" / "teacher")
    assert Store(tmp_path / "copy").verify(stage) is not None


def test_a_folder_that_was_deleted_is_missing_and_can_be_built_again(store: Store):
    stage = toy(layers=2)
    run_graph([stage], store)
    shutil.rmtree(store.folder(stage))
    assert store.status(stage).state == "missing"
    run_graph([stage], store)
    assert store.status(stage).state == "done"


def test_an_empty_or_absent_store_knows_nothing(tmp_path: Path):
    store = Store(tmp_path / "absent")
    stage = toy()
    assert store.record(stage) is None
    assert store.verify(stage.identity) is None
    assert store.nearest(stage) is None
    assert (store.status(stage).state, store.status(stage).attempt) == ("missing", 0)
    assert not store.root.exists()


def shorten(payload: Path) -> None:
    (payload / "config.json").write_text("{")


def remove(payload: Path) -> None:
    (payload / "read" / "inputs.json").unlink()


def add(payload: Path) -> None:
    (payload / "extra.bin").touch()


def tear_record(payload: Path) -> None:
    text = (payload / "record.json").read_text()
    (payload / "record.json").write_text(text[: len(text) // 2])


def remove_record(payload: Path) -> None:
    (payload / "record.json").unlink()


def link(payload: Path) -> None:
    (payload / "config.json").rename(payload.parent / "elsewhere")
    (payload / "config.json").symlink_to(payload.parent / "elsewhere")


def claim_another_identity(payload: Path) -> None:
    record = json.loads((payload / "record.json").read_text())
    (payload / "record.json").write_text(json.dumps(record | {"identity": "0" * 12}))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (shorten, "config.json has 1 bytes, its record says 13"),
        (remove, "read/inputs.json is missing"),
        (add, "extra.bin was added"),
        (tear_record, "record.json is damaged"),
        (remove_record, "record.json is missing"),
        (link, "is a link"),
        (claim_another_identity, "its record is that of teacher 000000000000"),
    ],
)
def test_an_altered_artifact_is_named_with_the_way_out_and_never_used(
    store: Store, damage: Callable[[Path], None], named: str
):
    teacher = toy("teacher", layers=2)
    run_graph([teacher], store)
    damage(store.payload(teacher))
    with pytest.raises(AlteredArtifact) as raised:
        store.record(teacher)
    assert named in str(raised.value)
    assert str(store.folder(teacher)) in str(raised.value)
    assert "restore its payload, or run again to build it anew" in str(raised.value)
    assert isinstance(raised.value, UserError)
    assert store.status(teacher).state == "altered"
    with pytest.raises(AlteredArtifact, match="was altered"):
        verify_model(store.payload(teacher))
    student = toy("distill", {"teacher": teacher})
    run_graph([student], store)
    assert json.loads((store.payload(student) / "read" / "inputs.json").read_text()) == {"teacher": '{"layers": 2}'}
    record = store.verify(teacher)
    assert record is not None
    assert record.attempt == 2
    assert (store.folder(teacher) / "altered-0002").is_dir(), "set aside, and not removed"


@pytest.mark.parametrize("call", ["pipeline.whole.require_regular", "pipeline.record.digest_once", "os.scandir"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO, errno.EMFILE])
def test_what_cannot_be_read_is_named_and_neither_set_aside_nor_built_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, call: str, number: int
):
    teacher = toy("teacher", layers=2)
    run_graph([teacher], store)
    file = store.payload(teacher) / "config.json"

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number), str(file))

    with monkeypatch.context() as away:
        away.setattr(call, fail)
        with pytest.raises(UserError, match=rf"config\.json: cannot be read \({os.strerror(number)}\)") as raised:
            run_graph([toy("distill", {"teacher": teacher})], store)
    assert not isinstance(raised.value, AlteredArtifact)
    assert store.facts(teacher).attempt == 1
    run_graph([toy("distill", {"teacher": teacher})], store)
    assert store.facts(teacher).attempt == 1


def test_what_is_altered_only_to_the_thorough_look_ends_the_run(store: Store, monkeypatch: pytest.MonkeyPatch):
    """A file system that gives a file another inode at every look, so that no digest is known again: asking anew would
    never end."""
    teacher = toy("teacher", layers=2)
    run_graph([teacher], store)
    (store.payload(teacher) / "config.json").write_text('{"layers": 3}')
    monkeypatch.setattr("pipeline.record.known_digest", lambda _: None)
    looks: list[object] = []
    monkeypatch.setattr("pipeline.runner._tell", lambda *_: looks.append(_) if len(looks) < 9 else pytest.fail("spins"))
    with pytest.raises(AlteredArtifact, match=r"config\.json has another SHA-256"):
        run_graph([toy("distill", {"teacher": teacher})], store)


def test_a_changed_byte_is_found_by_a_full_verification(store: Store):
    stage = toy(layers=2)
    run_graph([stage], store)
    (store.payload(stage) / "config.json").write_text('{"layers": 3}')
    assert store.record(stage) is not None  # the size is the same
    with pytest.raises(AlteredArtifact, match=r"config\.json has another SHA-256"):
        store.verify(stage, full=True)
    assert store.is_altered(stage), "what is known is not forgotten"


def test_a_store_that_verifies_sees_a_changed_byte_at_the_first_look(store: Store):
    stage = toy(layers=2)
    run_graph([stage], store)
    (store.payload(stage) / "config.json").write_text('{"layers": 3}')
    assert Store(store.root, verify=True).status(stage).state == "altered"


def test_no_flipped_bit_of_a_record_goes_unseen(store: Store):
    stage = toy(layers=2)
    record = run_graph([stage], store)[stage.identity]
    path = store.payload(stage) / "record.json"
    raw, seen = path.read_bytes(), 0
    for place in range(0, len(raw), 7):
        flipped = bytearray(raw)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        if store.is_altered(stage):
            seen += 1
        else:
            assert store.record(stage) == record, f"byte {place}: {raw[place : place + 20]!r}"  # white space
    assert seen > len(raw) / 7 * 0.7


def test_a_record_of_the_format_before_digests_is_still_read(store: Store):
    stage = toy(layers=2)
    record = run_graph([stage], store)[stage.identity].model_copy(update={"format": 1, "digest": ""})
    (store.payload(stage) / "record.json").write_text(record.model_dump_json())
    assert store.record(stage) == record
    (store.payload(stage) / "record.json").write_text(record.model_copy(update={"format": 3}).model_dump_json())
    with pytest.raises(AlteredArtifact, match="has format 3, this version reads 1 and 2"):
        store.record(stage)


def test_what_is_read_is_verified_once_as_long_as_it_is_not_written(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    teacher = toy("teacher", layers=2)
    run_graph([teacher], store)
    fresh = Store(store.root)
    read: list[str] = []
    monkeypatch.setattr("pipeline.fingerprint._digests", {})
    digest_file = fingerprint.digest_file
    monkeypatch.setattr("pipeline.fingerprint.digest_file", lambda path: (read.append(path.name), digest_file(path))[1])
    for samples in (8, 16):
        run_graph([toy("evaluate", {"teacher": teacher}, samples=samples)], fresh)
    assert read.count("inputs.json") == 1
    (fresh.payload(teacher) / "config.json").touch()
    run_graph([toy("evaluate", {"teacher": teacher}, samples=32)], fresh)
    assert read.count("inputs.json") == 1, "only what was touched is read again"
    assert read.count("config.json") == 2


def test_a_byte_that_changed_since_the_stage_was_published_is_found_when_it_is_read(store: Store):
    teacher = toy("teacher", layers=2)
    run_graph([teacher], store)
    (store.payload(teacher) / "config.json").write_text('{"layers": 3}')
    student = toy("distill", {"teacher": teacher})
    run_graph([student], store)
    assert json.loads((store.payload(student) / "read" / "inputs.json").read_text()) == {"teacher": '{"layers": 2}'}
    assert (store.folder(teacher) / "altered-0002" / "config.json").read_text() == '{"layers": 3}'


def test_files_of_the_user_that_changed_while_a_run_waited_are_refused(store: Store, tmp_path: Path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "config.json").write_text("rows")
    source = External("files", fingerprint.digest_tree(corpus), None, str(corpus))
    run_graph([toy("data", {"files": source})], store)
    (corpus / "config.json").write_text("others")
    with pytest.raises(UserError, match=r"files = .*corpus: it was changed while this ran; run again"):
        run_graph([toy("data", {"files": source}, version=2)], store)


def test_hidden_files_of_tools_do_not_alter_an_artifact(store: Store):
    stage = toy(layers=2)
    run_graph([stage], store)
    (store.payload(stage) / ".nfs0001").touch()
    assert store.record(stage) is not None


def test_the_nearest_artifact_is_the_finished_one_of_the_same_stage_with_the_fewest_differences(store: Store):
    run_graph([toy("distill", loss={"kv": 3.0, "kl": 0.5}, tokens=1, label="far")], store)
    near = toy("distill", loss={"kv": 3.0, "kl": 1.0}, tokens=2, label="near")
    run_graph([near], store)
    run_graph([toy("teacher", loss={"kv": 0.0, "kl": 1.0}, tokens=2)], store)
    unfinished = toy("distill", loss={"kv": 0.0, "kl": 1.0}, tokens=2, does="fail")
    with pytest.raises(StageFailed):
        run_graph([unfinished], store)
    wanted = toy("distill", loss={"kv": 0.0, "kl": 1.0}, tokens=2)
    nearest = store.nearest(wanted)
    assert nearest is not None
    assert nearest.artifact == f"distill/near_{near.identity}"
    assert [str(difference) for difference in nearest.differences] == ["config.loss.kv: 3.0 there, 0.0 here"]


def test_an_artifact_with_a_damaged_identity_file_is_skipped_in_the_comparison(store: Store):
    stage = toy(layers=2)
    run_graph([stage], store)
    (store.folder(stage) / "identity.json").write_text("{")
    assert store.nearest(toy(layers=3)) is None


def test_only_facts_that_are_needed_are_gathered(store: Store):
    teacher, distill, evaluate = chain()
    assert set(store.gather([evaluate])) == {teacher.identity, distill.identity, evaluate.identity}
    run_graph([distill], store)
    assert set(store.gather([evaluate])) == {distill.identity, evaluate.identity}


def test_a_finished_target_needs_its_ancestors_neither_present_nor_whole(store: Store):
    teacher, distill, evaluate = chain()
    run_graph([evaluate], store)
    shutil.rmtree(store.folder(teacher))
    shorten(store.payload(distill))
    assert set(run_graph([evaluate], store)) == {evaluate.identity}


def test_a_relative_store_is_absolute_for_workers_in_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert Store("runs").root == tmp_path / "runs"


def test_an_external_location_never_shows_in_an_identity_file(store: Store):
    stage = toy("distill", {"model": External("model", "llama", "abc", "/secret/place")}, does="fail")
    with pytest.raises(StageFailed):
        run_graph([stage], store)
    assert "/secret/place" not in (store.folder(stage) / "identity.json").read_text()


def test_a_builder_that_publishes_between_two_looks_is_never_taken_for_one_that_left_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    """`facts` must look at the lease before the record: the other way round, this publication falls into the gap."""
    stage = toy(layers=2)
    build = Build.begin(store, stage, Facts())
    assert build is not None
    look = store.sighting

    def publish_and_look(folder: Path) -> Sighting:
        build.publish({})
        build.release()
        return look(folder)

    monkeypatch.setattr(store, "sighting", publish_and_look)
    facts = store.facts(stage)
    assert (facts.lease, facts.artifact) == ("free", "ok")


def test_a_silent_builder_on_another_host_is_running_with_a_remark(store: Store):
    stage = toy(layers=2)
    build = Build.begin(store, stage, Facts(), beat=3600.0)
    assert build is not None
    lease = build.lease.folder / "lease.json"
    lease.write_text(lease.read_text().replace(build.lease.owner.host, "elsewhere/1/2"))
    os.utime(lease, (time.time() - 7200, time.time() - 7200))
    status = store.status(stage)
    assert (status.state, status.detail) == (
        "running",
        f"process {os.getpid()} on elsewhere (silent for 120 min), attempt 1",
    )
    build.release()


def test_a_silent_builder_of_another_start_of_this_machine_is_told_but_may_be_one_of_its_name(store: Store):
    stage = toy(layers=2)
    build = Build.begin(store, stage, Facts(), beat=3600.0)
    assert build is not None
    name, _, space = build.lease.owner.host.split("/")
    lease = build.lease.folder / "lease.json"
    lease.write_text(lease.read_text().replace(build.lease.owner.host, f"{name}/deadbeef/{space}"))
    assert store.status(stage).where == f"process {os.getpid()} on {name}"
    assert not store.status(stage).silent
    os.utime(lease, (time.time() - 7200, time.time() - 7200))
    status = store.status(stage)
    assert status.silent
    assert status.where == f"process {os.getpid()} on {name} (silent for 120 min, of another start of {name})"
    build.release()


def test_what_waits_for_a_running_input_is_waiting_however_far_upstream_it_is(store: Store):
    teacher, distill, evaluate = chain()
    assert store.status(evaluate).state == "missing"
    build = Build.begin(store, teacher, Facts())
    assert build is not None
    assert [(store.status(stage).state, store.status(stage).detail) for stage in (distill, evaluate)] == [
        ("waiting", "waits for: teacher"),
        ("waiting", "waits for: distill"),
    ]
    build.release()


def test_a_damaged_outcome_is_said_and_taken_as_not_there(store: Store, caplog: pytest.LogCaptureFixture):
    stage = toy(does="fail")
    with pytest.raises(StageFailed):
        run_graph([stage], store)
    (store.folder(stage) / "attempts" / "0001" / "outcome.json").write_text("{")
    assert store.status(stage).state == "interrupted"
    assert "outcome.json is damaged" in caplog.text


def test_a_store_that_cannot_be_written_and_one_that_is_a_url_are_users_mistakes(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written .*--store or \$OVERFILL_STORE"):
        run_graph([toy()], Store(tmp_path / "file"))
    with pytest.raises(UserError, match="a URL is opened with"):
        Store("s3://bucket/runs")


def test_a_folder_that_is_brought_in_by_hand_is_found_also_by_a_store_that_has_looked_before(store: Store, tmp_path):
    stage = toy(layers=2)
    run_graph([toy(layers=5)], store)
    run_graph([stage], other := Store(tmp_path / "other"))
    os.utime(store.root / "teacher", (1e9, 1e9))  # long ago, so that the listing is kept
    assert store.find(stage.identity, "teacher") is None and store.record(stage) is None
    shutil.copytree(other.folder(stage), store.root / "teacher" / f"brought_{stage.identity}")
    assert store.record(stage) is not None


def test_of_many_artifacts_those_with_the_most_similar_labels_are_compared(store: Store, monkeypatch):
    monkeypatch.setattr("pipeline.store._COMPARED", 2)
    for label in ("small-0.5-overfill-s0", "small-0.5-pruned-s0", "large-0.5-overfill-s0"):
        run_graph([toy(label=label, rate=1, name_of=label)], store)
    nearest = store.nearest(toy(label="small-0.5-overfill-s1", rate=2, name_of="small-0.5-overfill-s0"))
    assert nearest is not None and nearest.artifact.startswith("teacher/small-0.5-overfill-s0_")


def test_a_note_that_a_full_disk_cut_short_leaves_neither_half_a_file_nor_a_changed_one(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    note = tmp_path / "outcome.json"
    write_text(note, "before")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(note, "after")
    assert list(tmp_path.iterdir()) == [note]
    assert note.read_text() == "before"
