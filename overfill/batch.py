"""A batch of prompts and responses, laid out so that both meet in the middle.

Prompts are padded on the left and responses on the right, so column P-1 of every row is the last prompt token and the
two halves of a row are contiguous. That makes three things simple: the full model's cache of the first P columns is
what the student continues, the state that predicts the first response token sits in the same column of every row, and
sliding windows, which count columns, count real tokens. Position ids count real tokens only, so a padded row is read
as it would be alone.

Letters: B batch, P prompt, R response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

DUMMY_ROW: tuple[Sequence[int], Sequence[int]] = ((0,), ())
"""A row that fills a slot and counts for nothing: one prompt token, no response."""


@dataclass(frozen=True)
class PromptResponseBatch:
    """Prompts [B, P] and responses [B, R], each with a boolean mask of the same shape; P >= 1, R >= 2.

    A row whose `response_mask` is all false is a dummy: it is computed and adds nothing to any sum. Every row, dummies
    included, has at least one prompt token.
    """

    prompt_ids: Tensor
    """int64 [B, P], left padded."""
    prompt_mask: Tensor
    """bool [B, P], true where a token is real."""
    response_ids: Tensor
    """int64 [B, R], right padded. R is at least 2, so that there is always a token for a student to read."""
    response_mask: Tensor
    """bool [B, R], true where a token is real."""

    def __post_init__(self) -> None:
        for ids, mask, name in (
            (self.prompt_ids, self.prompt_mask, "prompt"),
            (self.response_ids, self.response_mask, "response"),
        ):
            if ids.ndim != 2 or ids.shape != mask.shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"{name}_ids {tuple(ids.shape)} and {name}_mask {tuple(mask.shape)} {mask.dtype} do not fit: "
                    "both are [batch, length] and the mask is boolean"
                )
        if self.prompt_ids.shape[0] != self.response_ids.shape[0]:
            raise ValueError(f"{self.prompt_ids.shape[0]} prompts and {self.response_ids.shape[0]} responses")
        if self.prompt_width < 1 or self.response_width < 2:
            raise ValueError("a batch is at least one prompt column and two response columns wide: use `collate`")

    @classmethod
    def collate(cls, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> PromptResponseBatch:
        """Pad (prompt, response) rows to a batch on the CPU; sequences may be lists or integer arrays.

        Raises:
            ValueError: no rows, or a row without a prompt token.
        """
        if not rows:
            raise ValueError("a batch needs at least one row")
        empty = [index for index, (prompt, _) in enumerate(rows) if len(prompt) == 0]
        if empty:
            raise ValueError(f"row {empty[0]} has no prompt token; the full model needs one to predict the response")
        prompt_width = max(len(prompt) for prompt, _ in rows)
        response_width = max(2, *(len(response) for _, response in rows))
        prompt_ids = torch.full((len(rows), prompt_width), pad_id, dtype=torch.int64)
        prompt_mask = torch.zeros(prompt_ids.shape, dtype=torch.bool)
        response_ids = torch.full((len(rows), response_width), pad_id, dtype=torch.int64)
        response_mask = torch.zeros(response_ids.shape, dtype=torch.bool)
        for index, (prompt, response) in enumerate(rows):
            first = prompt_width - len(prompt)
            prompt_ids[index, first:] = torch.as_tensor(prompt, dtype=torch.int64)
            prompt_mask[index, first:] = True
            response_ids[index, : len(response)] = torch.as_tensor(response, dtype=torch.int64)
            response_mask[index, : len(response)] = True
        return cls(prompt_ids, prompt_mask, response_ids, response_mask)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PromptResponseBatch:
        """The same batch on another device."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return PromptResponseBatch(*(tensor.to(device, non_blocking=non_blocking) for tensor in tensors))

    @property
    def prompt_width(self) -> int:
        """P, padding included."""
        return self.prompt_ids.shape[1]

    @property
    def response_width(self) -> int:
        """R, padding included."""
        return self.response_ids.shape[1]

    @property
    def prompt_lengths(self) -> Tensor:
        """int64 [B]: real prompt tokens per row."""
        return self.prompt_mask.sum(1)

    @property
    def response_lengths(self) -> Tensor:
        """int64 [B]: real response tokens per row, 0 for a dummy."""
        return self.response_mask.sum(1)

    @property
    def prompt_positions(self) -> Tensor:
        """int64 [B, P]: 0, 1, ... over the real tokens; padding, which nothing attends to, has 0."""
        return positions_of(self.prompt_mask)

    @property
    def response_positions(self) -> Tensor:
        """int64 [B, R]: prompt length + column."""
        columns = torch.arange(self.response_width, device=self.response_ids.device)
        return self.prompt_lengths[:, None] + columns

    @property
    def read_width(self) -> int:
        """P + R - 1 columns: what a model reads under teacher forcing. Nothing follows the last response column."""
        return self.prompt_width + self.response_width - 1

    @property
    def read_ids(self) -> Tensor:
        """int64 [B, P + R - 1]."""
        return torch.cat([self.prompt_ids, self.response_ids[:, :-1]], dim=1)

    @property
    def read_mask(self) -> Tensor:
        """bool [B, P + R - 1]."""
        return torch.cat([self.prompt_mask, self.response_mask[:, :-1]], dim=1)

    @property
    def read_positions(self) -> Tensor:
        """int64 [B, P + R - 1]."""
        return torch.cat([self.prompt_positions, self.response_positions[:, :-1]], dim=1)


def positions_of(mask: Tensor) -> Tensor:
    """Position ids int64 [B, N] of left-padded rows from their mask: real tokens count from 0, padding has 0."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)
