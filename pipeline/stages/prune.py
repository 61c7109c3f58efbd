"""The pruning stage: a teacher's folder is cut, tensor by tensor, to the channels that calibration ranks highest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.stage import External, StageRun
from pipeline.stages.folders import model_folder
from pipeline.stages.remote import Metrics, run_on_worker

if TYPE_CHECKING:
    from overfill.checkpoint import FullModel


def run(run: StageRun) -> Metrics:
    """Cut the student; the payload is `model/`, a student folder that is not trained yet."""
    return run_on_worker(prune, run)


def prune(run: StageRun) -> Metrics:
    """In a Ray worker: the cut itself; memory holds one shard of the student and one tensor of the full model."""
    from overfill.checkpoint import Manifest, write_manifest
    from overfill.importance import ImportanceScores
    from overfill.shapes import ModelShape, widths_of
    from overfill.surgery import prune_folder, read_config

    full = model_folder(run.inputs["teacher"])
    config = read_config(full).to_dict()
    shape = ModelShape.from_config(config, str(full / "config.json"))
    widths = widths_of(shape, run.config["hidden"], run.config["intermediate"], *run.config["requested"])
    scores = ImportanceScores.load(run.inputs["scores"] / "scores.safetensors")
    kept = prune_folder(full, scores, widths, run.staging / "model")
    write_manifest(run.staging / "model", Manifest.of(full_model_of(run, full), shape.architecture, widths, kept))
    student = shape.pruned(widths.hidden, widths.intermediate)
    return {
        "shape/parameters": student.parameters(),
        "shape/parameters_kept": student.parameters() / shape.parameters(),
        "shape/hidden": widths.hidden,
        "shape/intermediate": widths.intermediate,
        "shape/ratio_effective": widths.ratio_effective,
    }


def full_model_of(run: StageRun, folder: Path) -> FullModel:
    """How the manifest names the full model: its Hub id and commit, or the folder it lies in."""
    from overfill.checkpoint import FullModel, weights_digest

    source, digest = run.stage.inputs["teacher"], weights_digest(folder)
    if not isinstance(source, External) and "model" in source.config:
        return FullModel(id=source.config["model"], revision=source.config["revision"], digest=digest)
    place = (
        str(folder) if run.site is None else f"{run.site.place('teacher')}/{folder.relative_to(run.inputs['teacher'])}"
    )
    return FullModel(id=place, revision=None, digest=digest)
