"""Exact mode: the student drafts on the full model's cache, the full model verifies (speculative sampling).

One round: the student writes k tokens, the full model reads them in one pass, together with the token before them, and
keeps the longest prefix that it would have written itself; one more token comes from its own distribution (Leviathan et
al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318). What comes out is distributed as the full model's
own text; greedily it is that text. The full model's pass replaces the keys and values that the student drafted on, so
every draft starts from a cache that is entirely the full model's.

Rows of a batch accept different numbers of tokens, so each stands at a column of its own. Processors and criteria see
each row's true prefix: they are called once per distinct length, and what they say of rows of another length is left
out. End tokens and the greatest length need no such calls: they are looked for in all rows at once. Processors and
criteria see drafts that are thrown away, so they must be functions of the prefix alone, without a memory.

How many tokens to draft: the number that maximises the expected tokens per time (arXiv 2211.17192, theorem 3.8),
`(1 - a^(k+1)) / ((1 - a) (1 + c k))`, with a the acceptance probability seen so far and c the bytes of the student's
weights over the full model's.

Letters: B batch, k drafted tokens, P prompt, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from overfill.decode_loop import GenerationRequest, TwoStageOutput, choose, start
from overfill.engine import DecodeState, Engine
from overfill.errors import UserError
from overfill.fast_linear import weight_bytes
from overfill.reader import FEW_TOKENS

MOST_DRAFTED = FEW_TOKENS - 1
"""Most tokens of one draft."""
MOST_DRAFTED_COMPILED = 8
"""The same where drafts are adaptive and the verifying pass is compiled: it always reads as many, padded."""


@dataclass
class Acceptance:
    """What became of drafted tokens, and what follows for the next draft."""

    cost: float
    """Time of a student's step over that of the full model's."""
    fixed: int | None
    """Tokens per draft; None: adaptive."""
    most: int
    """Upper bound of an adaptive draft."""
    drafted: int = 0
    accepted: int = 0
    rejected: int = 0
    """Rows that rejected a token; what was drafted after it was not judged."""

    def count(self, accepted: Tensor, drafted: int) -> None:
        """Take in a round: accepted tokens per unfinished row [B'], out of `drafted` each."""
        self.drafted += drafted * len(accepted)
        self.accepted += int(accepted.sum())
        self.rejected += int((accepted < drafted).sum())

    def next_draft(self) -> int:
        """How many tokens to draft. Begins at an acceptance of 0.8, worth ten tokens of evidence."""
        if self.fixed is not None:
            return self.fixed
        a = (self.accepted + 8) / (self.accepted + self.rejected + 10)

        def tokens_per_time(k: int) -> float:
            return (1 - a ** (k + 1)) / ((1 - a) * (1 + self.cost * k))

        return max(range(1, self.most + 1), key=tokens_per_time)


@dataclass
class Rows:
    """Rows of text that grow at their own pace."""

    request: GenerationRequest
    ids: Tensor
    """int64 [B, P + max_new_tokens + room for a draft]: of each row the first `lengths` are written."""
    lengths: Tensor
    """int64 [B]."""
    unfinished: Tensor
    """bool [B]."""
    scores: list[Tensor] = field(default_factory=list)
    """Per new token [B, V], where asked for; rows that had ended hold -inf."""
    logits: list[Tensor] = field(default_factory=list)

    @property
    def width(self) -> int:
        """P."""
        return self.request.prompt_ids.shape[1]

    def processed(self, logits: Tensor, ahead: int) -> Tensor:
        """Processed scores [B, V] of the token `ahead` columns after the written ones, from logits [B, V].

        Rows that have ended, or end within those columns, are passed over: their scores are the logits."""
        scores = logits.to(torch.float32, copy=True)
        if not self.request.processors:
            return scores
        going = self._going(ahead)
        for length in (self.lengths + ahead)[going].unique().tolist():
            rows = going & (self.lengths + ahead == length)
            scores[rows] = self.request.processors(self.ids[:, :length], logits.to(torch.float32, copy=True))[rows]
        return scores

    def _going(self, ahead: int) -> Tensor:
        """bool [B]: rows that have not ended and have no end token among the next `ahead` columns."""
        ends = self.request.config._eos_token_tensor
        if ends is None or not ahead:
            return self.unfinished
        columns = self.lengths[:, None] + torch.arange(ahead, device=self.ids.device)
        return self.unfinished & ~torch.isin(self.ids.gather(1, columns), ends.to(self.ids.device)).any(1)

    def append(self, tokens: Tensor, counts: Tensor) -> None:
        """Append the first `counts` [B] of tokens [B, N] to each unfinished row, until it ends.

        Where rows end by an end token or by their length alone, all at once and without waiting for the device;
        any other criterion wants to be asked about every prefix."""
        if all(type(criterion) in (EosTokenCriteria, MaxLengthCriteria) for criterion in self.request.criteria):
            self._append_at_once(tokens, counts)
        else:
            self._append_one_by_one(tokens, counts)

    def _append_at_once(self, tokens: Tensor, counts: Tensor) -> None:
        index = torch.arange(tokens.shape[1], device=tokens.device)
        ends = (self.lengths[:, None] + index + 1) >= self.width + self.request.max_new_tokens
        if (end_tokens := self.request.config._eos_token_tensor) is not None:
            ends = ends | torch.isin(tokens, end_tokens.to(tokens.device))
        after_end = (ends.cumsum(1) - ends.long()) > 0
        written = self.unfinished[:, None] & (index < counts[:, None]) & ~after_end
        columns = self.lengths[:, None] + index
        self.ids.scatter_(1, columns, torch.where(written, tokens, self.ids.gather(1, columns)))
        self.lengths = self.lengths + written.sum(1)
        self.unfinished = self.unfinished & ~(written & ends).any(1)

    def _append_one_by_one(self, tokens: Tensor, counts: Tensor) -> None:
        for step in range(tokens.shape[1]):
            rows = self.unfinished & (step < counts)
            if not bool(rows.any()):
                return
            places = self.lengths[rows]
            self.ids[rows, places] = tokens[rows, step]
            self.lengths = self.lengths + rows
            for length in self.lengths[rows].unique().tolist():
                ended = self.request.criteria(self.ids[:, :length], None)
                self.unfinished = self.unfinished & ~(ended & rows & (self.lengths == length))

    def keep(self, kept: list[Tensor], values: Tensor, before: Tensor) -> None:
        """Put values [B, N, V] of the newest tokens where they belong; `before` [B]: lengths before they were added."""
        grown = int(self.lengths.max()) - self.width
        while len(kept) < grown:
            kept.append(torch.full_like(values[:, 0], -torch.inf))
        for row in range(len(values)):
            for step in range(int(self.lengths[row] - before[row])):
                kept[int(before[row]) - self.width + step][row] = values[row, step]


@torch.no_grad()
def run_exact(
    engine: Engine,
    request: GenerationRequest,
    *,
    draft_tokens: int | None = None,
    streamer: BaseStreamer | None = None,
    generator: torch.Generator | None = None,
) -> Tensor | TwoStageOutput:
    """Draft and verify until every row has ended.

    Raises:
        UserError: a streamer with more than one row, whose tokens come at different times; a watermark; models of two
            dtypes.
    """
    if streamer is not None and len(request.prompt_ids) * request.returns_per_prompt > 1:
        raise UserError("generate: exact streams one row at a time; leave the streamer out, or give one prompt")
    if request.config.watermarking_config is not None:
        raise UserError("generate: exact drafts tokens that a watermark would count; leave watermarking_config out")
    if engine.prefill_model.dtype != engine.decode_model.dtype:
        raise UserError(
            f"generate: exact wants one dtype, the models have {engine.prefill_model.dtype} and "
            f"{engine.decode_model.dtype}: the full model would read its own cache rounded; load both in the same"
        )
    most = MOST_DRAFTED if engine.decoder == "eager" else MOST_DRAFTED_COMPILED
    most = min(draft_tokens or most, max(1, request.max_new_tokens))
    logits, state = start(engine, request, request.max_new_tokens + MOST_DRAFTED)
    rows = _first_token(request, logits, streamer, generator)
    acceptance = Acceptance(_cost(engine), None if draft_tokens is None else most, most)
    while bool(rows.unfinished.any()):
        left = request.max_new_tokens + rows.width - int(rows.lengths[rows.unfinished].min())
        _round(engine, state, rows, acceptance, min(acceptance.next_draft(), left - 1), generator, streamer)
    if streamer is not None:
        streamer.end()
    sequences = rows.ids[:, : int(rows.lengths.max())]
    columns = torch.arange(sequences.shape[1], device=sequences.device)
    pad = request.config._pad_token_tensor
    # Without a padding token what follows an end is void: there are drafts.
    sequences = torch.where(columns < rows.lengths[:, None], sequences, 0 if pad is None else pad)
    if not request.config.return_dict_in_generate:
        return sequences
    return TwoStageOutput(
        sequences=sequences,
        scores=tuple(rows.scores) if request.config.output_scores else None,
        logits=tuple(rows.logits) if request.config.output_logits else None,
        past_key_values=None,  # rows end at columns of their own, which no cache of `transformers` can say
        drafted=acceptance.drafted,
        accepted=acceptance.accepted,
    )


def _first_token(
    request: GenerationRequest, logits: Tensor, streamer: BaseStreamer | None, generator: torch.Generator | None
) -> Rows:
    prompts = request.prompt_ids.repeat_interleave(request.returns_per_prompt, dim=0)
    ids = torch.cat([prompts, prompts.new_zeros(len(prompts), request.max_new_tokens + MOST_DRAFTED + 1)], dim=1)
    lengths = torch.full((len(prompts),), prompts.shape[1], device=prompts.device)
    rows = Rows(request, ids, lengths, torch.ones_like(lengths, dtype=torch.bool))
    if streamer is not None:
        streamer.put(prompts.cpu())
    scores = rows.processed(logits, 0)
    tokens = choose(scores, bool(request.config.do_sample), generator)
    _extend(rows, tokens[:, None], torch.ones_like(lengths), scores[:, None], logits[:, None], streamer)
    return rows


def _round(
    engine: Engine,
    state: DecodeState,
    rows: Rows,
    acceptance: Acceptance,
    drafted: int,
    generator: torch.Generator | None,
    streamer: BaseStreamer | None,
) -> None:
    """Draft, verify, append. With nothing to draft it is one step of the full model."""
    sample = bool(rows.request.config.do_sample)
    drafts, proposals = _draft(engine, state, rows, drafted, sample, generator)
    logits = _verify(engine, state, rows, drafts, acceptance)
    targets = torch.stack([rows.processed(logits[:, step], step) for step in range(drafted + 1)], dim=1)
    if sample:
        accepted, last = accept_sampled(drafts, proposals, targets.softmax(-1), generator)
    else:
        accepted, last = accept_greedy(drafts, targets)
    acceptance.count(accepted[rows.unfinished], drafted)
    tokens = torch.cat([drafts, drafts.new_zeros(len(drafts), 1)], dim=1).scatter(1, accepted[:, None], last[:, None])
    _extend(rows, tokens, accepted + 1, targets, logits, streamer)


def _draft(
    engine: Engine, state: DecodeState, rows: Rows, count: int, sample: bool, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """The student writes `count` tokens [B, count]; with the distributions [B, count, V] that they are drawn from."""
    tokens, proposals = [], []
    newest = rows.ids.gather(1, rows.lengths[:, None] - 1)
    for step in range(count):
        columns = (rows.lengths + step - 1)[:, None]
        end = int(columns.max()) + 1
        logits = engine.student.step(state.store, state.valid, state.padding, newest, columns, end)[:, -1]
        scores = rows.processed(logits, step)
        newest = choose(scores, sample, generator)[:, None]
        rows.ids.scatter_(1, columns + 1, newest)
        tokens.append(newest)
        proposals.append(scores.softmax(-1) if sample else scores)
    if not count:
        return newest[:, :0], newest.new_zeros(0)
    return torch.cat(tokens, dim=1), torch.stack(proposals, dim=1)


def _verify(engine: Engine, state: DecodeState, rows: Rows, drafts: Tensor, acceptance: Acceptance) -> Tensor:
    """The full model reads the newest token and the drafts; logits [B, k + 1, V].

    A compiled pass always reads `acceptance.most + 1` tokens: what is missing goes where nobody attends to."""
    tokens = torch.cat([rows.ids.gather(1, rows.lengths[:, None] - 1), drafts], dim=1)
    count = tokens.shape[1]
    columns = rows.lengths[:, None] - 1 + torch.arange(count, device=tokens.device)
    end = int(columns.max()) + 1
    missing = acceptance.most + 1 - count if engine.full.compiles(tokens) else 0
    if missing:
        void = columns.new_full((len(columns), missing), state.store.columns - 1)
        tokens, columns = torch.cat([tokens, void.clamp(max=0)], dim=1), torch.cat([columns, void], dim=1)
        end = state.store.columns
    logits = engine.full.step(state.store, state.valid, state.padding, tokens, columns, end)
    return logits[:, :count].to(engine.device)


def accept_greedy(drafts: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """How many drafted tokens [B, k] the full model would have written, and the token that it writes after them.

    Args:
        targets: the full model's scores [B, k + 1, V] at the drafted tokens and after them.

    Returns:
        Accepted counts int64 [B], 0 to k, and tokens [B].
    """
    own = targets.argmax(-1)
    accepted = (own[:, :-1] == drafts).long().cumprod(1).sum(1)
    return accepted, own.gather(1, accepted[:, None]).squeeze(1)


def accept_sampled(
    drafts: Tensor, proposals: Tensor, targets: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """The same when sampling (arXiv 2211.17192, algorithm 1): a drafted token x is kept with probability
    min(1, p(x) / q(x)); at the first that is not, a token is drawn from max(0, p - q), normalised; after k kept ones,
    from p. Accepted tokens and this one are then distributed as draws from p.

    Args:
        drafts: [B, k]. proposals: q, [B, k, V], or anything when k is 0. targets: p, [B, k + 1, V].
    """
    count = drafts.shape[1]
    after = targets[:, count]
    accepted = drafts.new_zeros(len(drafts))
    if count:
        p = targets[:, :count].gather(2, drafts[:, :, None]).squeeze(2)
        q = proposals.gather(2, drafts[:, :, None]).squeeze(2)
        uniform = torch.rand(q.shape, generator=generator, device=q.device, dtype=q.dtype)
        accepted = (uniform * q < p).long().cumprod(1).sum(1)
        at = accepted.clamp(max=count - 1)[:, None, None].expand(-1, 1, targets.shape[2])
        rest = (targets.gather(1, at) - proposals.gather(1, at)).squeeze(1).clamp_min(0)
        # p = q up to rounding leaves nothing to draw from; then nothing is ever rejected, and p is as good.
        rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, targets.gather(1, at).squeeze(1))
        after = torch.where((accepted < count)[:, None], rest, after)
    return accepted, torch.multinomial(after, num_samples=1, generator=generator).squeeze(1)


def _extend(
    rows: Rows, tokens: Tensor, counts: Tensor, scores: Tensor, logits: Tensor, streamer: BaseStreamer | None
) -> None:
    """Append tokens [B, N] and what is to be returned of their scores and logits [B, N, V]."""
    before = rows.lengths
    rows.append(tokens, counts)
    config = rows.request.config
    if config.return_dict_in_generate and config.output_scores:
        rows.keep(rows.scores, scores, before)
    if config.return_dict_in_generate and config.output_logits:
        rows.keep(rows.logits, logits.float(), before)
    if streamer is not None:
        for column in range(int(before[0]), int(rows.lengths[0])):
            streamer.put(rows.ids[:, column].cpu())


def _cost(engine: Engine) -> float:
    """Time of a student's step over a full model's, both bound by reading their weights."""
    return weight_bytes(engine.student.model) / weight_bytes(engine.full.model)
