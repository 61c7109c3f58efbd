"""The teacher stage: a full model from the Hub at a pinned commit, or one trained from scratch on the corpus. A released
model to compare with is fetched alike."""

from __future__ import annotations

from overfill.errors import UserError
from pipeline.stage import Metrics, StageRun, in_this_process
from pipeline.stages.distill import metrics_of
from pipeline.training.launch import run_workers
from pipeline.training.worker import pretrain


def run(run: StageRun) -> Metrics:
    """Train a full model on Ray Train workers; the payload is `model/`, a `transformers` folder with its tokenizer."""
    return metrics_of(run_workers(pretrain, run))


@in_this_process
def fetch(run: StageRun) -> Metrics:
    """Download a Hub model into the store; the payload is `model/`. Weights as safetensors only: no pickle is fetched.

    Raises UserError when the Hub cannot be reached or has no such model or commit."""
    from huggingface_hub import snapshot_download

    from overfill.checkpoint import HUB_FILES, weights_digest

    model, revision, folder = run.config["model"], run.config["revision"], run.staging / "model"
    code = ["*.py"] if run.config["trust_remote_code"] else []
    try:
        snapshot_download(model, revision=revision, local_dir=folder, allow_patterns=[*HUB_FILES, *code])
    except Exception as error:  # the Hub client's own errors, requests' and the file system's all end here
        raise UserError(
            f"{run.stage.name}.model = {model} at {revision}: cannot be fetched ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:160]}); check the id, the revision and HF_TOKEN, or give a local folder"
        ) from error
    return {f"{run.stage.name}/digest": weights_digest(folder)}
