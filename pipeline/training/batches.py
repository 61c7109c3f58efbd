"""Rows of token ids -> a batch on the device."""

from __future__ import annotations

from typing import Any

import torch

from overfill.batch import DUMMY_ROW, PromptResponseBatch
from pipeline.training.stream import Row

PAD_ID = 0
"""What stands in padding is never read, so any token does."""


def collate(rows: list[Row | None], device: torch.device) -> PromptResponseBatch:
    """A micro-batch; empty slots become rows that count for nothing."""
    filled: list[Any] = [DUMMY_ROW if row is None else row for row in rows]
    return PromptResponseBatch.collate(filled, PAD_ID).to(device)
