from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch

from pipeline.training.checkpoints import Position
from pipeline.training.distributed import Place
from pipeline.training.loop import Recorder


def test_no_nan_is_the_best_so_far_and_none_undoes_it() -> None:
    session: Any = SimpleNamespace(
        place=Place(0, 1, torch.device("cpu")),
        plan=SimpleNamespace(steps=9),
        run=SimpleNamespace(log_metrics=lambda *_, **__: None),
    )
    recorder, best = Recorder(session, Position(0, 0)), []
    position = Position(0, 0)
    for step, nll in enumerate((math.nan, 2.0, math.nan, 3.0, 1.0)):
        position = recorder.write_validation(Position(step, 0, position.best_nll, position.best_step), nll)
        best.append((position.best_nll, position.best_step))
    assert best == [(None, None), (2.0, 1), (2.0, 1), (2.0, 1), (1.0, 4)]
