"""The learning rate of a step. Pure arithmetic."""

from __future__ import annotations

import math

from pipeline.config_training import TrainingConfig


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """The learning rate of optimizer step `step` (0 is the first) of `steps`.

    It rises linearly over the first `warmup` share of the steps, is the peak at the step after them, and falls along
    a half cosine or a line that reaches `final_learning_rate` times the peak where a step after the last would be,
    so that no step is spent on a rate of 0; or it stays (`constant`).
    """
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - warmup) / max(1, steps - warmup)
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1.0 - done
    return config.learning_rate * (config.final_learning_rate + (1.0 - config.final_learning_rate) * left)
