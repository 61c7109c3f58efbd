"""`overfill jobs`, `logs`, `stop` and `submit --follow`: the jobs of a cluster, seen from elsewhere."""

from __future__ import annotations

import sys
import time

from ray.job_submission import JobDetails, JobStatus
from rich import box
from rich.console import Console
from rich.table import Table

from overfill.errors import UserError
from pipeline.progress import duration
from pipeline.submission.job_server import JobServer, Refused
from pipeline.submission.submit import STOP_VARIABLE
from pipeline.utilisation import in_use

STOPPED = 130
"""Exit code of a job that was stopped, as after Ctrl-C."""
PATIENCE_S = 120.0
"""How long a server may be away while its log is followed."""
STOP_PATIENCE_S = 30.0
"""To see the end of a job that was stopped, beyond the time that Ray gives it."""
_STYLES = {"SUCCEEDED": "green", "RUNNING": "cyan", "FAILED": "bold red", "STOPPED": "yellow"}


def our_jobs(server: JobServer) -> list[JobDetails]:
    """The jobs that `overfill submit` started, the newest last."""
    found = [job for job in server.list_jobs() if job.submission_id and "overfill_experiment" in (job.metadata or {})]
    return sorted(found, key=lambda job: job.start_time or 0)


def find(server: JobServer, wanted: str) -> str:
    """The job of that name, or the newest one of the experiment of that name.

    Raises UserError when there is none, naming those that are there."""
    jobs = our_jobs(server)
    for job in reversed(jobs):
        if wanted in (job.submission_id, (job.metadata or {}).get("overfill_experiment")):
            return str(job.submission_id)
    known = ", ".join(str(job.submission_id) for job in jobs[-5:]) or "none; start one with `overfill submit FILE`"
    raise UserError(f"{server.shown}: no job {wanted!r}; known: {known}")


def print_jobs(server: JobServer, console: Console) -> None:
    """A table of the jobs, and how much of the cluster is in use."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("job", "experiment", "state", "exit code", "took", "store"):
        table.add_column(column, no_wrap=column != "store", overflow="fold")
    for job in our_jobs(server):
        metadata, state = job.metadata or {}, str(job.status)
        table.add_row(
            job.submission_id,
            metadata.get("overfill_experiment", ""),
            f"[{_STYLES.get(state, 'dim')}]{state.lower()}[/]",
            "" if job.driver_exit_code is None else str(job.driver_exit_code),
            duration(_seconds(job)),
            metadata.get("overfill_store", ""),
        )
    console.print(table)
    if line := in_use(server.usage()):
        console.print(f"cluster now: {line}", highlight=False)


def _seconds(job: JobDetails) -> float | None:
    if job.start_time is None:
        return None
    return max(0.0, (job.end_time or 1000 * time.time()) - job.start_time) / 1000


def print_log(server: JobServer, job: str) -> None:
    """What the job has said so far."""
    sys.stdout.write(server.get_job_logs(job))
    sys.stdout.flush()


def follow(server: JobServer, job: str) -> int:
    """Write the job's log as it comes, until it ends; its exit code. A server that is away for a while is waited for."""
    known, seen = 0, time.monotonic()
    while True:
        known = server.tail(job, _write, known)
        try:
            details = server.get_job_info(job)
        except Refused:
            raise
        except UserError:
            if time.monotonic() - seen > PATIENCE_S:
                raise
        else:
            seen = time.monotonic()
            if details.status.is_terminal():
                _write(server.get_job_logs(job)[known:])  # its last words may have come after the connection's end
                return exit_code(details)
        time.sleep(1.0)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def exit_code(job: JobDetails) -> int:
    """Of the command that the job ran; 130 for one that was stopped.

    Raises UserError for a job whose command was never run."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.status == JobStatus.STOPPED:
        return STOPPED
    code = job.driver_exit_code
    if code is None:
        reason = next((line for line in (job.message or "").splitlines() if line.strip()), "no reason given")
        raise UserError(f"job {job.submission_id} did not start or lost its node: {reason[:300]}")
    return code if code > 0 else 128 - code


def stop(server: JobServer, job: str, console: Console) -> int:
    """Ask the job to end and wait until it has; exit code 1 when it takes longer than it may."""
    details = server.get_job_info(job)
    if details.status.is_terminal():
        console.print(f"job {job} has ended already", highlight=False)
        return 0
    server.stop_job(job)
    granted = ((details.runtime_env or {}).get("env_vars") or {}).get(STOP_VARIABLE, 3)
    deadline = time.monotonic() + float(granted) + STOP_PATIENCE_S
    while not server.get_job_info(job).status.is_terminal():
        if time.monotonic() > deadline:
            console.print(f"job {job} has not ended yet; see `overfill jobs`", highlight=False)
            return 1
        time.sleep(0.5)
    console.print(f"job {job} is stopped; submitting it again goes on from there", highlight=False)
    return 0
