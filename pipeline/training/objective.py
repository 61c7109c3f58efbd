"""What a training run learns, and from which full model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from overfill.batch import PromptResponseBatch
from overfill.config import LossConfig
from overfill.distillation import TeacherModel, TeacherPass, TrainingMethod
from pipeline.corpus.order import BatchOrder


@dataclass(frozen=True)
class Objective:
    """Method and loss."""

    method: TrainingMethod
    loss: LossConfig
    prompt_targets: bool = False
    """Learn the prompt's tokens too (a teacher of our own)."""
    kv_second_moment: Tensor | None = None
    """[L, 2] from calibration, for the KV match."""

    @property
    def needs_full_model(self) -> bool:
        """Whether training reads the full model: its cache, its distribution, or its keys and values."""
        return self.method == "overfill" or (self.method != "pretrain" and (self.loss.kl > 0 or self.loss.kv > 0))

    def target_tokens(self, order: BatchOrder, step: int) -> int:
        """Tokens of a global batch that are to be predicted: what its summed loss is divided by. At least 1."""
        samples = order.batch(step)
        responses = order.response_lengths[samples]
        if self.method == "overfill":  # the first token of a response is the full model's
            return max(1, int(np.maximum(responses - 1, 0).sum()))
        answered = np.where(responses > 0, order.prompt_lengths[samples] - 1, 0)
        return max(1, int(responses.sum()) + (int(answered.sum()) if self.prompt_targets else 0))


@dataclass(frozen=True)
class FullModel:
    """The full model as the loop uses it: a call for a pass over a batch, and the module with its output head."""

    call: Callable[[PromptResponseBatch], TeacherPass]
    module: TeacherModel
