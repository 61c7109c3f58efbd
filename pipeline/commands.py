"""What `overfill run` does around the run itself: find what is missing, run it, show what came out; and show it again."""

from __future__ import annotations

import os
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from overfill.errors import UserError
from pipeline.drivers import at_work
from pipeline.experiment import (
    DEFAULT_STORE,
    Experiment,
    is_done,
    keep_experiment,
    run_missing,
    sweep_folder,
)
from pipeline.objective import objective_line
from pipeline.reporting.exports import summary_json, to_csv, to_json, write_report
from pipeline.reporting.html_report import PAGE_FILE, write_page
from pipeline.reporting.report import make_report
from pipeline.reporting.tables import markdown, print_report
from pipeline.store import Store
from pipeline.tracking.tracker import Tracker

if TYPE_CHECKING:
    from pipeline.reporting.pareto import Budget
    from pipeline.tune import Outcome


DONE_FLUSH_S = 2.0
"""Longest wait for a server of MLflow that is away when there is nothing to run."""


def run_experiment(experiment: Experiment, store: Store, address: str | None, continue_stopped: bool) -> int:
    """Run what is missing and print the comparison; exit code 1 when a cell failed."""
    console = Console(stderr=True)
    keep_experiment(experiment, store)
    with at_work(experiment, store):
        return _run_and_report(experiment, store, address, continue_stopped, console)


def _run_and_report(
    experiment: Experiment, store: Store, address: str | None, continue_stopped: bool, console: Console
) -> int:
    outcomes: list[Outcome] = []
    if is_done(experiment, store):
        console.print(f"{experiment.name}: all {len(experiment.cells)} cells are done already", highlight=False)
        with Tracker(store, experiment.config, experiment.cells, flush=DONE_FLUSH_S):
            pass  # a driver that was killed at its end may have left MLflow behind
    else:
        outcomes = run_missing(experiment, store, address, console, continue_stopped)
    report = make_report(experiment.name, experiment.config.description, experiment.cells, store)
    folder = sweep_folder(store, experiment.name)
    files, page = write_report(report, folder), folder / PAGE_FILE
    write_page(report, experiment.cells, store, page)
    print_report(report, Console())
    objective = objective_line(experiment.cells, store, experiment.config.sweep.objective)
    console.print(objective, highlight=False, soft_wrap=True)
    _print_places(store, [path for path in files if path.suffix == ".png"], page, console)
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    for outcome in failed:
        where = f" (log: {outcome.log})" if outcome.log else ""
        console.print(
            f"failed: {experiment.cells[outcome.cell].label}: {outcome.reason}{where}", style="red", markup=False
        )
    return 1 if failed else 0


def _print_places(store: Store, plots: list[Path], page: Path, console: Console) -> None:
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    for plot in plots:
        console.print(f"{plot.stem} plot: {plot}", highlight=False, soft_wrap=True)
    default = store.location == str(Path(DEFAULT_STORE).absolute())
    console.print(f"MLflow: overfill ui{'' if default else f' --store {shlex.quote(store.location)}'}", highlight=False)


def print_comparison(
    experiment: Experiment, store: Store, budget: Budget, forms: Sequence[str], html: str | None
) -> None:
    """Print what an experiment found, as tables or in one of the `forms` json, summary, csv, markdown; or write the page.

    Raises UserError for more than one form, and for a page that cannot be written."""
    if len(forms) > 1:
        raise UserError(
            f"{' and '.join('--' + form for form in forms)}: they all go to the same output; give one of them"
        )
    report = make_report(experiment.name, experiment.config.description, experiment.cells, store, budget)
    if html is not None:
        write_page(report, experiment.cells, store, Path(html))
        Console(stderr=True).print(f"report: {Path(html).absolute()}", highlight=False, soft_wrap=True)
    if forms:
        written = {"json": to_json, "summary": summary_json, "csv": to_csv, "markdown": markdown}[forms[0]](report)
        sys.stdout.write(written.rstrip("\n") + "\n")
    elif html is None:
        print_report(report, Console())


def print_experiment_status(experiment: Experiment, store: Store, address: str | None, console: Console) -> None:
    """Print where the cells stand, what the drivers saw of the cluster, and with an address what it says itself."""
    from pipeline.progress import print_status
    from pipeline.utilisation import FILE, in_use, read_samples, recorded_line
    from pipeline.watch import snapshot

    print_status(experiment.name, snapshot(store, experiment.cells), console)
    folder = sweep_folder(store, experiment.name)
    store.bring(folder, FILE)
    lines = [recorded_line(read_samples(folder), time.time())]
    if address is not None:
        from pipeline.submission.job_server import JobServer

        server = JobServer(address)
        lines.append(f"{server.shown}: {in_use(server.usage()) or 'has not said yet what is in use'}")
    for line in filter(None, lines):
        console.print(line, highlight=False, soft_wrap=True)


def serve_ui(store: Store, host: str | None, port: int, serve: bool = False) -> NoReturn:
    """Become the MLflow server on the store's database, after saying where each sweep is to be seen.

    With `serve` it is there for the drivers of a cluster: it may begin empty, and where it listens must be said.
    Raises UserError when the port is taken or when there is nothing to show."""
    from pipeline.masking import mask_uri
    from pipeline.tracking.ledger import LEDGER_FILE
    from pipeline.tracking.tracker import LOOPBACK, tracking_uri, ui_command
    from pipeline.tracking.view import saved_views

    if serve and host is None:
        raise UserError("--serve: say with --host at which address of this machine the cluster reaches it")
    host = host or LOOPBACK

    if "MLFLOW_TRACKING_URI" in os.environ and tracking_uri(store.root).startswith("http"):
        raise UserError(f"MLFLOW_TRACKING_URI = {mask_uri(tracking_uri(store.root))}: a server runs there; open it")
    if serve:
        store.root.mkdir(parents=True, exist_ok=True)
    elif not (store.root / "mlflow.db").is_file() and "MLFLOW_TRACKING_URI" not in os.environ:
        raise UserError(f"{store.root}: no runs to show; start some with `overfill run FILE`, or give --store")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror} on {host}; give another port with --port") from error
    command, environment = ui_command(store.root, port, host)
    console, address = Console(stderr=True), f"http://{host}:{port}"
    console.print(f"MLflow UI: {address} (Ctrl-C ends it)", highlight=False)
    store.bring(store.root / "sweeps", LEDGER_FILE)
    for name, path in saved_views(store.root / "sweeps", mask_uri(tracking_uri(store.root))):
        console.print(f"  {name}: {address}{path}", highlight=False, soft_wrap=True)
    os.execve(command[0], command, os.environ | environment)  # noqa: S606 - in our place: no server outlives its command
