"""Entry points of Ray Train workers. Each is called in a fresh process, where importing is most of the start-up."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import train

from overfill.errors import UserError
from pipeline.attempt_log import AttemptLog
from pipeline.stage import StageRun
from pipeline.training.quick_imports import UNUSED, without_modules

STOPPED = "stopped"
METRICS = "metrics"

log = logging.getLogger(__name__)


def distill(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train a student; rank 0 writes it to the stage's staging folder."""

    def work(run: StageRun) -> dict[str, Any]:
        from pipeline.training.distill import train_student

        return train_student(run)

    return guarded(work, arguments["run"], train.get_context().get_world_rank())


def pretrain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train a teacher from scratch; rank 0 writes it to the stage's staging folder."""

    def work(run: StageRun) -> dict[str, Any]:
        from pipeline.training.pretrain import train_teacher

        return train_teacher(run)

    return guarded(work, arguments["run"], train.get_context().get_world_rank())


def calibrate(arguments: dict[str, Any]) -> dict[str, Any]:
    """Measure channel importance; rank 0 writes the scores to the stage's staging folder."""

    def work(run: StageRun) -> dict[str, Any]:
        from pipeline.training.calibrate import measure_importance

        return measure_importance(run)

    return guarded(work, arguments["run"], train.get_context().get_world_rank())


def log_file(run: StageRun, rank: int) -> Path:
    """What a worker logs in this attempt."""
    return run.attempt / f"worker-{rank}.log"


def guarded(work: Callable[[StageRun], dict[str, Any]], run: StageRun, rank: int) -> dict[str, Any]:
    """Call `work(run)` with a log of its own. What it raises is in the log: a user's mistake in words, anything else with
    its traceback; whether to try again is for `failures` to say."""
    with run.on_this_node() as local, _logging_to(log_file(local, rank)):
        try:
            log.info("worker process %d begins", os.getpid())
            import_training_libraries()
            log.info("libraries imported")
            return work(local)
        except UserError as error:
            log.error("%s", error)
            raise
        except Exception:
            log.exception("the worker failed")
            raise


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Send this project's log to a file too."""
    handler = AttemptLog(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03d %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("pipeline")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()


def import_training_libraries() -> None:
    """Import torch, transformers and DeepSpeed as quickly as they go."""
    with without_modules(*UNUSED):
        import torch  # noqa: F401
        import transformers
        import transformers.modeling_utils

        import pipeline.training.engine

        pipeline.training.engine.import_deepspeed()
    transformers.utils.logging.disable_progress_bar()
    for chatty in ("ray.data", "ray.train"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
