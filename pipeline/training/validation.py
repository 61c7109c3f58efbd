"""The held-out response NLL during training: of the whole system, so that methods can be compared by it.

Every response token counts. For `overfill` the first one is the full model's prediction, the others are the student's
on the full model's cache; for the other methods all are the student's.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from overfill.config import LossConfig
from overfill.losses import cross_entropy
from pipeline.corpus.shards import TokenShards
from pipeline.training.batches import collate
from pipeline.training.session import Session
from pipeline.training.stream import Row, ids_of

_CE = LossConfig(kl=0.0, kv=0.0, ce=1.0)


def validation_nll(session: Session) -> float:
    """Mean NLL per response token of the first `evaluate_samples` held-out samples, in nats. A collective."""
    place, objective = session.place, session.objective
    full = session.full if objective.method == "overfill" else None
    total = torch.zeros(2, dtype=torch.float64, device=place.device)
    session.engine.train(False)
    with torch.no_grad():
        for rows in _micro_batches(session):
            batch = collate(rows, place.device)
            teacher = full.call(batch) if full is not None else None
            terms = session.engine(batch, teacher, None, objective.method, _CE, chunks=session.resources.loss_chunks)
            total += torch.stack([term.double() for term in terms["ce"]])
            if full is not None and teacher is not None:
                answered = batch.response_mask[:, 0]
                logits = full.module.head(teacher.hidden[:, 0])
                first = cross_entropy(logits, batch.response_ids[:, 0]).where(answered, 0.0)
                total += torch.stack([first.sum().double(), answered.sum().double()])
    session.engine.train()
    nll, tokens = place.sum(total).tolist()
    return nll / max(1.0, tokens)


def _micro_batches(session: Session) -> list[list[Row | None]]:
    """This worker's share: as many micro-batches as every other's."""
    rows = held_out_rows(session.held_out, session.config.evaluate_samples)
    size = min(session.resources.micro_batch, -(-len(rows) // session.place.workers))
    count = -(-len(rows) // (size * session.place.workers))
    mine: list[Row | None] = [*rows[session.place.rank :: session.place.workers]]
    mine += [None] * (size * count - len(mine))
    return [mine[start : start + size] for start in range(0, size * count, size)]


@lru_cache(maxsize=1)
def held_out_rows(folder: Path, samples: int) -> list[Row]:
    """(prompt ids, response ids) of the first `samples` held-out samples, longest first: they pad each other little."""
    shards = TokenShards.open(folder)
    chosen = np.arange(min(samples, len(shards)))
    longest_first = chosen[np.argsort(-shards.lengths[chosen], kind="stable")]
    return [ids_of(row) for row in shards.read(longest_first)]
