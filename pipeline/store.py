"""The store: a folder of artifacts, found by identity, each whole or not there.

    <store>/<stage>/<label>_<identity>/
        identity.json            what the stage is, its inputs spelled out
        lease.json               -> the newest attempt's (a link for people)
        attempts/0001/           lease.json, attempt.json, log.txt, stop, outcome.json; see pipeline.lease
        progress/                outlives attempts: metrics.jsonl, stopped.json, and until it is finished, in folders,
                                 what a resume needs: <identity>/step-00000200-3f9a1c/ (pipeline.training.checkpoints)
        staging-0001/            a payload being written; renamed as a whole to
        payload/                 the artifact, which exists if and only if payload/record.json does
        altered-0002/            a payload that was found altered when attempt 2 began, set aside
    <store>/.claims/<identity>   -> that folder, so that two processes with different labels use the same one
    <store>/.drivers/            who is at work (`pipeline.drivers`)

This module reads; `pipeline.build` writes attempts and publishes. The folder needs links and atomic renames, as local
disks, NFS and Lustre have. Nothing is believed that was not checked: every look compares the names and sizes of an
artifact's files with its record, and the record with its own digest; before a stage reads an artifact, the SHA-256 of
every file is compared too (`verify`), once per process as long as the files stay as they are.
"""

from __future__ import annotations

import fcntl
import heapq
import json
import logging
import shutil
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, get_args

from overfill.errors import UserError
from pipeline import kept
from pipeline.claims import claim_for, claimed_place
from pipeline.difference import Nearest, differences
from pipeline.kept import Kept
from pipeline.lease import TTL, Heartbeat, Sighting, Watch, acquire, attempt_folder, newest_attempt
from pipeline.notes import read_note, text_of
from pipeline.record import RECORD_FILE, Record, write_json
from pipeline.resume import Facts, Outcome
from pipeline.stage import NO_LOCKS, Site, Stage
from pipeline.status import State, Status
from pipeline.stop import STOP_FILE, StopFile, StopFlag
from pipeline.whole import IDENTITY_FILE, AlteredArtifact, checked

log = logging.getLogger(__name__)

_COMPARED = 16
"""Artifacts that a missing one is compared with, to say in what it differs from what is there."""
_TICK_S = 0.1
"""Longer than a tick of the clock that a local file system takes its times from."""

OUTCOME_FILE, ATTEMPT_FILE, LOG_FILE = "outcome.json", "attempt.json", "log.txt"
STOPPED_FILE = "stopped.json"
DRIVERS = ".drivers"


class Store:
    """Artifacts under one folder, which need not exist yet; `verify` reads every byte at the first look, too."""

    def __init__(self, root: Path | str, ttl: float = TTL, verify: bool = False) -> None:
        if "://" in str(root):
            raise UserError(f"store = {root}: a URL is opened with `pipeline.objects.store.open_at`")
        self.root = Path(root).expanduser().absolute()
        """Absolute, since workers run in other folders."""
        self.location = str(self.root)
        """What `pipeline.objects.store.open_at` opens again, in another process."""
        self._ttl = ttl
        self._verify = verify
        self._watches: dict[Path, Watch] = {}
        self._listings: dict[Path, tuple[float, dict[str, list[str]]]] = {}

    # --- where things are

    def find(self, identity: str, name: str = "*") -> Path | None:
        """Folder of an identity whatever its label, or None. `name` narrows the search to one stage's folder."""
        claimed = claimed_place(self.root / ".claims" / identity)
        if claimed is not None and (self.root / claimed).is_dir():
            return self.root / claimed
        named = (parent / found for parent in self._kinds(name) for found in self._names(parent).get(identity, ()))
        folders = [path for path in named if path.is_dir()]
        folders.sort(key=lambda path: (not (path / "payload" / RECORD_FILE).exists(), path.name))
        return folders[0] if folders else None

    def folder(self, stage: Stage) -> Path:
        """The folder of a stage; where it would be, when it is not there."""
        return self.find(stage.identity, stage.name) or self.root / stage.name / stage.folder_name

    def payload(self, stage: Stage) -> Path:
        """Folder of a stage's payload."""
        return self.folder(stage) / "payload"

    def progress(self, stage: Stage) -> Path:
        """Folder of what outlives attempts."""
        return self.folder(stage) / "progress"

    def place(self, stage: Stage) -> str:
        """Where a stage's payload is, for people and for MLflow."""
        return str(self.payload(stage))

    def site(self, stage: Stage, attempt: int) -> Site | None:
        """How files come to where an attempt works; None, since every node sees this folder."""
        return None

    def look_anew(self) -> None:
        """Others have just finished something: nothing to do, since every look is a new one."""

    def prepare(self) -> None:
        """Before a run writes here: a folder needs nothing."""

    def look_once(self, stages: Iterable[Stage]) -> AbstractContextManager[None]:
        """Around many looks at these stages: a folder is looked at as it is."""
        return nullcontext()

    def stop_flag(self, stage: Stage) -> StopFlag | None:
        """Raised, it asks the newest attempt at a stage to save its position and end; None without any."""
        newest = newest_attempt(attempts := self.folder(stage) / "attempts")
        return StopFile(attempt_folder(attempts, newest) / STOP_FILE) if newest else None

    def interrupt_flag(self) -> StopFlag:
        """A new flag, for a run to ask all its trials to end."""
        return StopFile(self.root / "tune" / f"interrupt-{uuid.uuid4().hex[:12]}")

    def bring(self, folder: Path, name: str) -> None:
        """Before files called `name` in a sweep's folder are read: nothing to do, since this is where they are."""

    def kept(self, folder: Path, name: str) -> Path:
        """The folder where a file of a sweep's own folder is as whoever writes it has kept it."""
        return folder

    def keep(self, path: Path) -> None:
        """After a file of a sweep's own folder was written: nothing to do, since this is where it stays."""

    def alone(self, folder: Path) -> ExitStack | None:
        """A lock on a sweep's own folder, to be closed; None while another process has it. It ends with its process.

        Where the file system has no locks (Lustre, unless it is mounted with -o flock), a lease is as good."""
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stream = stack.enter_context((folder / "mlflow.lock").open("w"))
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                place = folder / "writer"
                seen = self.sighting(place)
                lease = None if seen.state == "held" else self.lease(place, seen.attempt)
                if lease is None:
                    return None
                stack.enter_context(lease)
            return stack.pop_all()

    def drivers(self) -> list[Path]:
        """Folders of the drivers that say that they are at work here, or were killed."""
        return sorted((self.root / DRIVERS).glob("*"))

    def lease(self, folder: Path, after: int) -> Heartbeat | None:
        """The lease of a folder behind its attempt `after`; None when another process was faster."""
        return acquire(folder / "attempts", after)

    def discard(self, folder: Path) -> None:
        """Remove a folder whose lease is over."""
        shutil.rmtree(folder, ignore_errors=True)

    def create(self, stage: Stage) -> Path:
        """The folder of a stage, made if need be; every process gets the same one.

        Raises UserError when the store cannot be written."""
        try:
            return self._create(stage)
        except (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
            raise UserError(
                f"store = {self.root}: cannot be written ({error.strerror}: {error.filename}); "
                "choose another place with --store or $OVERFILL_STORE"
            ) from error

    def _create(self, stage: Stage) -> Path:
        folder = self.find(stage.identity, stage.name)
        if folder is None:
            claim = self.root / ".claims" / stage.identity
            claim.parent.mkdir(parents=True, exist_ok=True)
            folder = self.root / claim_for(claim, Path(stage.name, stage.folder_name))
        (folder / "progress").mkdir(parents=True, exist_ok=True)
        if not (folder / IDENTITY_FILE).exists():
            content = {"identity": stage.identity, "label": stage.label, "description": stage.full_description}
            write_json(folder / IDENTITY_FILE, content)
        return folder

    def _kinds(self, name: str) -> list[Path]:
        """The folders of kinds of stages that `name` matches."""
        if name != "*":
            return [self.root / name]
        return sorted(path for path in self.root.glob("*") if not path.name.startswith(".") and path.is_dir())

    def _names(self, parent: Path) -> dict[str, list[str]]:
        """Identity -> names of the folders in `parent` that end with it; listed again only when a name came or went.

        A large sweep asks for thousands of stages that have no folder yet, and the folder has thousands of others."""
        try:
            changed = parent.stat().st_mtime
            if parent in self._listings and self._listings[parent][0] == changed:
                return self._listings[parent][1]
            names: dict[str, list[str]] = {}
            for path in sorted(parent.iterdir()):
                names.setdefault(path.name.rpartition("_")[2], []).append(path.name)
        except OSError:
            return {}  # not there, or no folder: nothing is in it
        if (
            time.time() - changed > _TICK_S
        ):  # what comes within the same tick of the file system's clock would be missed
            self._listings[parent] = (changed, names)
        return names

    # --- artifacts

    def record(self, stage: Stage | str) -> Record | None:
        """Record of a finished stage, after a check of its files' sizes; None when it is not finished.

        Raises AlteredArtifact when the artifact is damaged."""
        identity = stage if isinstance(stage, str) else stage.identity
        folder = self.find(identity, "*" if isinstance(stage, str) else stage.name)
        return None if folder is None else checked(folder, identity, self._verify)

    def verify(self, stage: Stage | str, full: bool = True) -> Record | None:
        """As `record`, with every file's SHA-256 too."""
        identity = stage if isinstance(stage, str) else stage.identity
        folder = self.find(identity, "*" if isinstance(stage, str) else stage.name)
        return None if folder is None else checked(folder, identity, full)

    def ready(self, stage: Stage) -> bool:
        """Whether an input is there and every byte of it is what was written. Raises AlteredArtifact when it is not."""
        return self.verify(stage) is not None

    def input_path(self, stage: Stage) -> Path:
        """Where an input is for who reads it."""
        return self.payload(stage)

    def is_altered(self, stage: Stage, full: bool = False) -> bool:
        """Whether there is an artifact that is not what was written, as far as `record` or, with `full`, `verify` sees."""
        try:
            self.verify(stage, full=full or self._verify)
        except AlteredArtifact:
            return True
        return False

    def nearest(self, stage: Stage) -> Nearest | None:
        """The finished artifact of the same stage that differs in the fewest fields, or None without any.

        Of thousands only those are compared whose labels are most alike: labels name teacher, ratio, method and seed."""
        others = self._alike(stage)
        wanted = stage.full_description if others else {}
        best: tuple[int, float, Nearest] | None = None
        for folder in others:
            record = self._record_file(folder)
            if not record.exists():
                continue
            try:
                there: Any = json.loads((folder / IDENTITY_FILE).read_bytes())["description"]
                found = differences(there, wanted)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                log.warning("%s cannot be compared: %s", folder, error)
                continue
            key = (len(found), -record.stat().st_mtime)
            if best is None or key < best[:2]:
                best = (*key, Nearest(f"{stage.name}/{folder.name}", found))
        return None if best is None else best[2]

    def _record_file(self, folder: Path) -> Path:
        return folder / "payload" / RECORD_FILE

    def _alike(self, stage: Stage) -> list[Path]:
        """Other folders of the same kind of stage, those with the most similar labels first; not all, if there are many."""
        parent, own = self.root / stage.name, stage.folder_name
        others = [name for names in self._names(parent).values() for name in names if not name.endswith(stage.identity)]
        alike = heapq.nsmallest(_COMPARED, others, key=lambda name: (-_common(name, own), name))
        return [parent / name for name in alike]

    # --- attempts

    def sighting(self, folder: Path) -> Sighting:
        """What is known of an artifact's lease; a silent holder is found dead by looking again and again."""
        watch = self._watches.setdefault(folder, Watch(folder / "attempts", self._ttl))
        return watch.look()

    def ended_attempts(self, stages: Iterable[Stage]) -> dict[str, int]:
        """Identity -> number of the newest attempt that has ended and said how; 0 for none."""
        found: dict[str, int] = {}
        for stage in stages:
            newest = newest_attempt(attempts := self.folder(stage) / "attempts")
            ended = (attempt_folder(attempts, newest) / OUTCOME_FILE).exists()
            found[stage.identity] = newest if ended else max(newest - 1, 0)
        return found

    def facts(self, stage: Stage, explain: bool = True) -> Facts:
        """All that `resume.plan` wants to know of a stage; `explain` adds the nearest artifact of a missing one."""
        folder = self.find(stage.identity, stage.name)
        if folder is None:  # as most of a large sweep, before it runs
            return Facts(nearest=self.nearest(stage) if explain else None)
        # The lease first: a builder publishes before it releases, so a free lease and no record mean there is none.
        seen = self.sighting(folder)
        try:
            artifact = "missing" if self.record(stage) is None else "ok"
            problem = ""
        except AlteredArtifact as error:
            artifact, problem = "altered", str(error)
        last = attempt_folder(folder / "attempts", seen.attempt)
        note = read_note(last / OUTCOME_FILE) if seen.attempt else {}
        outcome = next((known for known in get_args(Outcome) if note.get("status") == known), None)
        # What somebody writes at the moment is not whole yet, and a finished stage has nothing to go on from.
        left = Kept() if seen.state == "held" or artifact == "ok" else kept.look(folder / "progress")
        died = outcome is None and seen.state != "held" and seen.attempt > 0
        return Facts(
            artifact=artifact,
            problem=problem,
            lease=seen.state,
            holder=_holder(seen),
            silent=seen.seems_dead,
            attempt=seen.attempt,
            outcome="interrupted" if died else outcome,
            error=(seen.why or "it ended without a word") if died else text_of(note, "error"),
            log=str(last / LOG_FILE) if seen.attempt else "",
            checkpoint=left.checkpoint,
            torn=left.torn,
            shards=left.shards,
            stopped=text_of(read_note(folder / "progress" / STOPPED_FILE), "reason"),
            nearest=self.nearest(stage) if explain and artifact == "missing" and seen.state != "held" else None,
        )

    def gather(self, targets: Sequence[Stage], explain: bool = True) -> dict[str, Facts]:
        """Facts of the targets and of what they need, by identity: what `resume.plan` takes."""
        gathered: dict[str, Facts] = {}
        pending = list(targets)
        while pending:
            stage = pending.pop()
            if stage.identity not in gathered:
                gathered[stage.identity] = facts = self.facts(stage, explain)
                pending.extend(() if facts.settled else stage.input_stages)
        return gathered

    def status(self, stage: Stage) -> Status:
        """Where a stage stands, in one look; a holder on another host counts as running while its lease is there."""
        facts = self.facts(stage, explain=False)
        state, detail = self._state(stage, facts)
        return Status(
            state=state,
            detail=detail,
            stage=stage,
            folder=self.folder(stage),
            attempt=facts.attempt,
            where=facts.holder if state == "running" else "",
            silent=facts.silent and state == "running",
            error=facts.error if state in ("failed", "interrupted") else facts.problem,
            log=Path(facts.log) if facts.log else None,
            checkpoint=facts.checkpoint,
            torn=facts.torn,
            record=self.record(stage) if state == "done" else None,
        )

    def _state(self, stage: Stage, facts: Facts) -> tuple[State, str]:
        if facts.artifact == "ok":
            return "done", "its artifact is there"
        if facts.artifact == "altered":
            return "altered", facts.problem
        if facts.lease == "held":
            return "running", f"{facts.holder}, attempt {facts.attempt}"
        if facts.stopped:
            return "stopped", facts.stopped
        if facts.outcome == "failed":
            return "failed", f"{facts.error} ({facts.log})"
        if facts.outcome == "interrupted":
            return "interrupted", f"attempt {facts.attempt} was interrupted: {facts.error}"
        for source in stage.input_stages:
            below, _ = self._state(source, self.facts(source, explain=False))
            if below in ("running", "waiting"):
                return "waiting", f"waits for: {source.name}"
        return "missing", "nothing yet"


def _common(one: str, other: str) -> int:
    """Characters that two names begin with alike."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


def _holder(seen: Sighting) -> str:
    """Who builds, in words; a silence is mentioned, though only waiting can tell that the holder is dead.

    Nor is it known after a restart of this machine, for another one may have the same name."""
    if not seen.seems_dead:
        return str(seen.owner or "another process")
    restarted = f", of another start of {seen.owner.name}" if seen.owner and seen.owner.is_of_another_start() else ""
    return f"{seen.owner or 'another process'} (silent for {seen.silent / 60:.0f} min{restarted})"
