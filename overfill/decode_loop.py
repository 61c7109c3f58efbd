"""The decode loop: choose a token, let the student read it, until every row has ended.

Nothing waits for the device without need: sampling stays on it, and on a GPU the question whether all rows have ended
is asked of the token before, whose answer has arrived meanwhile; the one token too many is cut off.

Letters: B batch, P prompt, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from overfill.dial import Refresh
from overfill.engine import DecodeState, Engine
from overfill.refresh import Refresher


@dataclass(frozen=True)
class GenerationRequest:
    """A call to `generate`, checked and completed: everything that a loop needs."""

    prompt_ids: Tensor
    """int64 [B, P], left padded; at least one row has no padding."""
    prompt_mask: Tensor
    """bool [B, P]."""
    config: GenerationConfig
    """With all defaults filled in; `max_length` counts P and the new tokens."""
    processors: LogitsProcessorList
    """Logits processors, the sampling ones last."""
    criteria: StoppingCriteriaList
    """Stopping criteria; the maximal length is always among them."""

    @property
    def max_new_tokens(self) -> int:
        """The most tokens that a row can get."""
        return self.config.max_length - self.prompt_ids.shape[1]

    @property
    def returns_per_prompt(self) -> int:
        """Sequences per prompt."""
        return self.config.num_return_sequences or 1


@dataclass
class TwoStageOutput(GenerateDecoderOnlyOutput):
    """What `transformers` returns, and how often the full model was asked again."""

    refreshes: int | None = None
    """Rows refreshed, over the whole generation; None without `refresh`."""
    drafted: int | None = None
    """Tokens that the student drafted for rows that had not ended; None without `exact`."""
    accepted: int | None = None
    """How many of them the full model accepted."""

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted; None without `exact`, or when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted and self.accepted is not None else None


class EndWatch:
    """Whether all rows have ended, as known without waiting for the device.

    Args:
        lag: the answer is that of so many tokens ago; 0 waits for the device.
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self.surplus = 0
        """Tokens that were written after all rows had ended."""
        self._flags: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def all_ended(self, unfinished: Tensor) -> bool:
        """Hand in bool [B] as of the newest token; true if some token up to `lag` ago is known to be the last."""
        flag, event, device = unfinished.any(), None, unfinished.device
        if device.type == "cuda":
            pinned = torch.empty((), dtype=torch.bool, pin_memory=True)
            pinned.copy_(flag, non_blocking=True)
            flag, event = pinned, torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
        self._flags.append((flag, event))
        return len(self._flags) > self.lag and self._next_is_last()

    def close(self) -> None:
        """No more tokens will come: look at what has not been looked at."""
        while self._flags and not self.surplus:
            if self._next_is_last():
                return

    def _next_is_last(self) -> bool:
        flag, event = self._flags.pop(0)
        if event is not None:
            event.synchronize()
        if bool(flag):
            return False
        self.surplus, self._flags = len(self._flags), []
        return True


class Writer:
    """Rows of text as they grow by one token at a time, all at the same length."""

    def __init__(self, request: GenerationRequest, streamer: BaseStreamer | None, generator: torch.Generator | None):
        config = request.config
        self.request, self.streamer, self.generator = request, streamer, generator
        prompts = request.prompt_ids.repeat_interleave(request.returns_per_prompt, dim=0)
        self.width = self.length = prompts.shape[1]
        self.ids = torch.cat([prompts, prompts.new_zeros(len(prompts), request.max_new_tokens)], dim=1)
        """int64 [B, P + max_new_tokens]: the first `length` columns are written."""
        self.unfinished = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
        """bool [B]."""
        self.scores: tuple[Tensor, ...] | None = () if config.return_dict_in_generate and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if config.return_dict_in_generate and config.output_logits else None
        if streamer is not None:
            streamer.put(prompts.cpu())

    def write(self, logits: Tensor) -> Tensor:
        """Choose a token [B] per row from logits [B, V], and note which rows it ends."""
        config = self.request.config
        # What is returned is a copy: processors may write into their input.
        self.logits = None if self.logits is None else (*self.logits, logits.to(torch.float32, copy=True))
        scores = self.request.processors(self.ids[:, : self.length], logits.float())
        self.scores = None if self.scores is None else (*self.scores, scores)
        tokens = choose(scores, bool(config.do_sample), self.generator)
        if config._pad_token_tensor is not None:
            tokens = torch.where(self.unfinished, tokens, config._pad_token_tensor)
        self.ids[:, self.length] = tokens
        self.length += 1
        self.unfinished = self.unfinished & ~self.request.criteria(self.ids[:, : self.length], self.scores)
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        return tokens

    def drop(self, tokens: int) -> None:
        """Forget the last tokens."""
        if tokens:
            self.length -= tokens
            self.scores = None if self.scores is None else self.scores[:-tokens]
            self.logits = None if self.logits is None else self.logits[:-tokens]


@torch.no_grad()
def run_loop(
    engine: Engine,
    request: GenerationRequest,
    *,
    refresh: Refresh | None = None,
    streamer: BaseStreamer | None = None,
    generator: torch.Generator | None = None,
    lag: int | None = None,
) -> Tensor | TwoStageOutput:
    """Prefill once, then choose a token and decode it. `lag`: of the `EndWatch`; None: 1 on a GPU without a streamer
    (which wants every token at once), else 0."""
    logits, state = start(engine, request, request.max_new_tokens)
    text = Writer(request, streamer, generator)
    refresher = None if refresh is None else Refresher(engine, refresh, state)
    watch = EndWatch((engine.device.type == "cuda" and streamer is None) if lag is None else lag)
    for left in reversed(range(request.max_new_tokens)):
        tokens = text.write(logits)
        if watch.all_ended(text.unfinished) or not left:
            break
        if refresher is None:
            logits = engine.decode_one(state, tokens)
        else:
            logits = refresher.next_logits(state, text.ids, text.unfinished)
    watch.close()
    text.drop(watch.surplus)
    if streamer is not None:
        streamer.end()
    sequences = text.ids[:, : text.length]
    if not request.config.return_dict_in_generate:
        return sequences
    return TwoStageOutput(
        sequences=sequences,
        scores=text.scores,
        logits=text.logits,
        past_key_values=engine.as_dynamic(state, text.length - 1),
        refreshes=None if refresher is None else refresher.count,
    )


def start(engine: Engine, request: GenerationRequest, room: int) -> tuple[Tensor, DecodeState]:
    """The full model reads the prompts, each once; logits [B, V] and state for as many rows as are to be returned."""
    logits, state = engine.prefill(request.prompt_ids, request.prompt_mask, room, request.config.prefill_chunk_size)
    if request.returns_per_prompt > 1:
        logits = logits.repeat_interleave(request.returns_per_prompt, dim=0)
        state.repeat(request.returns_per_prompt)
    return logits, state


def choose(scores: Tensor, sample: bool, generator: torch.Generator | None = None) -> Tensor:
    """One token per row [B] from processed scores [B, V]: the highest, or a draw from their softmax."""
    if not sample:
        return scores.argmax(dim=-1)
    return torch.multinomial(scores.softmax(dim=-1), num_samples=1, generator=generator).squeeze(1)
