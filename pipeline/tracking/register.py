"""`overfill register`: a finished cell's student as a version of a registered model in MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from overfill.errors import UserError
from pipeline.masking import mask_uri
from pipeline.reporting.report import make_report
from pipeline.tracking.ledger import LEDGER_FILE, Ledger
from pipeline.tracking.tracker import tracking_uri

if TYPE_CHECKING:
    from pipeline.experiment import Experiment
    from pipeline.store import Store
    from pipeline.sweep import Cell


def register(experiment: Experiment, store: Store, label: str | None, model: str) -> tuple[Cell, str]:
    """Register the student of the cell with this label, or of the one to ship; the cell, and the version.

    Registering a student again finds the version that it has.

    Raises:
        UserError: there is no such cell, no choice without a label, no student to register, or no run of it in MLflow.
    """
    cell = _labelled(experiment.cells, label) if label else _to_ship(experiment, store)
    uri = tracking_uri(store.root)
    folder = store.root / "sweeps" / experiment.name
    store.bring(folder, LEDGER_FILE)
    known = Ledger.read(folder, mask_uri(uri)).cells.get(cell.identity)
    if known is None:
        raise UserError(f"{cell.label}: MLflow at {mask_uri(uri)} has no run of it; `overfill run` of the file logs it")
    from pipeline.tracking.server import MlflowServer  # imports mlflow

    version = MlflowServer(uri, store.root).register(known.run, model)
    if version is None:
        raise UserError(f"{cell.label}: no student was logged with it; choose a cell with a trained one by --cell")
    return cell, version


def _labelled(cells: Sequence[Cell], label: str) -> Cell:
    found = next((cell for cell in cells if cell.label == label), None)
    if found is None:
        raise UserError(f"--cell {label}: no such cell; there are: {'; '.join(cell.label for cell in cells[:20])}")
    return found


def _to_ship(experiment: Experiment, store: Store) -> Cell:
    """The cell that the report says to ship; of several seeds the first."""
    report = make_report(experiment.name, "", experiment.cells, store)
    chosen = [advice.best.members[0]["identity"] for advice in report.to_ship.values()]
    if len(chosen) != 1:
        why = "nothing to ship yet" if not chosen else f"one to ship for each of {len(chosen)} full models"
        raise UserError(
            f"{experiment.name}: {why}; choose a cell with --cell LABEL, as `overfill report --json` has them"
        )
    return next(cell for cell in experiment.cells if cell.identity == chosen[0])
