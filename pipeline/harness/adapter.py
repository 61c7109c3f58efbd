"""An `overfill.engine.Engine` as a model of lm-evaluation-harness: full, student alone, or two-stage, by the same code.

Where prompt and answer meet is the engine's to say: the full model reads the context and gives the first token's
distribution, the student the others'. For each kind of request:

- `generate_until`: the context is the prompt. `until` strings end a row on their own; tokens are those of lm-eval's own
  `HFLM`, text is cut at the first `until` string as there.
- `loglikelihood`: the full model reads the context, the student scores the continuation on its cache. lm-eval counts
  white space at the end of a context to the continuation, and so the line breaks that a chat template writes after the
  assistant's header: their tokens are scored as lm-eval wants it, but by the full model, which reads them in training
  and generation too.
- `loglikelihood_rolling`: lm-eval's windows, each a context and a continuation. The first window's context is the
  prefix token alone and that of every further window the last token of the one before (more in the last window, which
  is filled up from the left). So this is nearly the student's own perplexity, on a cache that begins with one column of
  the full model's: texts without a prompt have nothing for it to read.

In exact mode answers are the full model's, and so are the scores of given texts.

A row's result does not depend on the rows beside it (to the last bits that summation order allows), so batches are made
of what is alike in length. Sampled answers are drawn one row at a time, each from a seed of its own: then neither the
batch nor the shard changes what is drawn.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import BoolTensor, Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from overfill.dial import EXACT, NONE, Refresh
from overfill.engine import Engine
from overfill.errors import UserError
from overfill.evaluation import end_tokens, pad_token
from overfill.generation import generate
from overfill.scoring import ScoredContext, score_continuations

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
"""Options that say nothing when decoding is greedy."""

T = TypeVar("T")


class ChatText:
    """What a tokenizer alone decides of a model: how text becomes tokens, and messages text."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer: Any = tokenizer

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the beginning of a text, else its end."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds by itself unless the text has them already."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **special)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as the prompt's text; a template that refuses a system turn gets the others."""
        import jinja2

        def rendered(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return rendered(chat_history)
        except jinja2.TemplateError:
            return rendered([message for message in chat_history if message["role"] != "system"])


@dataclass(frozen=True)
class Reading:
    """How the system reads and writes."""

    batch: int = 16
    """Rows at once."""
    dial: int | str = NONE
    """How often the full model is asked again while the student writes (`overfill.dial`)."""
    max_new_tokens: int = 256
    """Where a task does not say."""
    seed: int = 0
    """Of sampled answers."""

    @property
    def exact(self) -> bool:
        """Whether every token is the full model's."""
        return self.dial == EXACT

    @property
    def refresh(self) -> Refresh | None:
        """When the full model reads again, in exact mode never: there is nothing left to refresh."""
        return None if self.exact else Refresh.parse(self.dial)


class EngineLM(ChatText, TemplateLM):
    """A system as lm-eval sees it.

    Args:
        full: the full model alone; it scores where the system is in exact mode.
    """

    def __init__(self, engine: Engine, full: Engine, tokenizer: Any, reading: Reading | None = None) -> None:
        super().__init__(tokenizer)
        self.engine, self.full, self.reading = engine, full, reading or Reading()
        self.truncated = 0
        """Contexts that were cut from the left so far, because the models have too few positions."""

    @property
    def max_length(self) -> int:
        """Positions of the models."""
        return self.engine.max_positions

    # --- log-likelihood

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """Requests of (texts, context ids, continuation ids); continuations of one context share its reading."""
        grouped: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[int, list[int]]]] = {}
        for index, (texts, context, continuation) in enumerate(requests):
            context, given, continuation = self._split(texts, context, continuation)
            grouped.setdefault((tuple(context), tuple(given)), []).append((index, continuation))
        scored: dict[int, tuple[float, bool]] = {}
        engine = self.full if self.reading.exact else self.engine
        for contexts in self._context_batches(grouped):
            rows = [ScoredContext(read, given, [ids for _, ids in own]) for (read, given), own in contexts]
            scores = score_continuations(engine, rows, pad_token(self.tokenizer), refresh=self.reading.refresh)
            for (_, members), results in zip(contexts, scores, strict=True):
                scored |= {index: result for (index, _), result in zip(members, results, strict=True)}
        return [scored[index] for index in range(len(requests))]

    def _split(
        self, texts: tuple[str, str] | None, context: list[int], continuation: list[int]
    ) -> tuple[list[int], list[int], list[int]]:
        """(context, tokens that the full model reads beyond it, continuation), cut from the left to what fits."""
        if not continuation:
            raise UserError(
                f"a task's continuation {texts[1] if texts else ''!r} has no tokens of its own: this tokenizer joins it with "
                "the context; give the task a `target_delimiter`"
            )
        if len(continuation) > self.max_length:
            raise UserError(
                f"a task's continuation has {len(continuation)} tokens, the models {self.max_length} positions"
            )
        surplus = len(context) + len(continuation) - (self.max_length + 1)
        self.truncated += surplus > 0
        given = self._trailing_space(texts, context, continuation)
        return context[max(0, surplus) :], continuation[:given], continuation[given:]

    def _trailing_space(self, texts: tuple[str, str] | None, context: list[int], continuation: list[int]) -> int:
        """How many of the continuation's tokens are white space at the end of the context's text, whole tokens only."""
        if texts is None or texts[0] == texts[0].rstrip():
            return 0
        whole = self.tok_encode(texts[0])
        given = len(whole) - len(context)
        fits = 0 < given < len(continuation) and whole == [*context, *continuation[:given]]
        return given if fits else 0

    def _context_batches(self, grouped: dict[Any, list[Any]]) -> Iterator[list[tuple[Any, list[Any]]]]:
        """Contexts with their continuations, longest first, with equally many given tokens and at most `batch` rows."""
        size = self.reading.batch
        parts = [
            (key, members[start : start + size])
            for key, members in grouped.items()
            for start in range(0, len(members), size)
        ]
        longest = sorted(parts, key=lambda part: (len(part[0][1]), -len(part[0][0]), part[0]))
        batch: list[tuple[Any, list[Any]]] = []
        for part in longest:
            rows = len(part[1]) + sum(len(members) for _, members in batch)
            if batch and (rows > size or len(part[0][1]) != len(batch[0][0][1])):
                yield batch
                batch = []
            batch.append(part)
        if batch:
            yield batch

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, by lm-eval's windows."""
        owners: list[int] = []
        windows: list[tuple[None, list[int], list[int]]] = []
        for index, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for window in rolling:
                windows.append((None, *make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        return totals

    # --- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, cut at the first of the task's `until` strings."""
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(json.dumps(request.arguments[1], sort_keys=True), []).append(index)
        texts: dict[int, str] = {}
        seeds = self._seeds(requests)
        for options, indices in alike.items():
            settings = _settings(json.loads(options), self.reading.max_new_tokens, self._end_text)
            contexts = {index: self._fitting(self.tok_encode(requests[index].args[0]), settings) for index in indices}
            order = sorted(indices, key=lambda index: (-len(contexts[index]), index))
            for batch in _chunks(order, 1 if settings.sampled else self.reading.batch):
                answers = self._write([contexts[index] for index in batch], settings, seeds[batch[0]])
                texts |= dict(zip(batch, answers, strict=True))
        return [texts[index] for index in range(len(requests))]

    def _fitting(self, context: list[int], settings: _Settings) -> list[int]:
        room = self.max_length - settings.max_new_tokens
        if room < 1:
            raise UserError(
                f"a task's answers may have {settings.max_new_tokens} tokens, the models have {self.max_length} positions "
                "for prompt and answer; set max_gen_toks in the task's generation_kwargs, or evaluate.task_max_new_tokens"
            )
        self.truncated += len(context) > room
        return context[-room:]

    def _write(self, contexts: Sequence[Sequence[int]], settings: _Settings, seed: int) -> list[str]:
        width, pad = max(map(len, contexts)), pad_token(self.tokenizer)
        ids = torch.tensor([[pad] * (width - len(context)) + list(context) for context in contexts])
        lengths = torch.tensor([len(context) for context in contexts])
        mask = torch.arange(width) >= width - lengths[:, None]
        written = generate(
            self.engine,
            ids,
            attention_mask=mask,
            stopping_criteria=StoppingCriteriaList([StopTexts(settings.until, self.tokenizer, width)]),
            generator=torch.Generator(self.engine.device).manual_seed(seed) if settings.sampled else None,
            refresh=None if self.reading.exact else self.reading.dial,
            exact=self.reading.exact,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=end_tokens(self.engine, self.tokenizer),
            pad_token_id=pad,
            **settings.options,
        )
        assert isinstance(written, Tensor)  # a dictionary was not asked for
        texts = self.tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        return [postprocess_generated_text(text, [*settings.until, self._end_text], None) for text in texts]

    @property
    def _end_text(self) -> str:
        return self.tokenizer.decode([self.eot_token_id])

    def _seeds(self, requests: Sequence[Instance]) -> list[int]:
        """A seed per request, of what it is and its how-manieth repetition it is, and not of what stands beside it."""
        seen: Counter[tuple[Any, ...]] = Counter()
        seeds: list[int] = []
        for request in requests:
            key = (self.reading.seed, request.task_name, request.doc_id, request.idx)
            digest = hashlib.sha256(json.dumps([*key, seen[key]]).encode()).digest()
            seen[key] += 1
            seeds.append(int.from_bytes(digest[:7], "big"))
        return seeds


@dataclass(frozen=True)
class _Settings:
    """A task's `generation_kwargs`, sorted out."""

    until: tuple[str, ...]
    """Texts that end an answer; the end of a text, which is a token, is not among them."""
    max_new_tokens: int
    sampled: bool
    options: dict[str, Any]
    """What is left, for `transformers`."""


def _settings(given: dict[str, Any], max_new_tokens: int, end_text: str) -> _Settings:
    options: dict[str, Any] = dict(normalize_gen_kwargs(given, max_new_tokens))
    until = handle_stop_sequences(options.pop("until", None), eos=end_text)
    longest = options.pop("max_gen_toks")
    sampled = bool(options["do_sample"])
    if not sampled:
        options = {name: value for name, value in options.items() if name not in _SAMPLING}
    return _Settings(tuple(text for text in until if text and text != end_text), longest, sampled, options)


class StopTexts(StoppingCriteria):
    """Ends each row whose answer has come to contain one of the texts.

    Like lm-eval, it looks at as many tokens from the end as the longest text has, and two more, because an answer may
    be cut into tokens in another way; what it overlooks is cut from the answer afterwards. A special token's own text
    counts only for those of the texts that name a special token: `<pad>` is not an `a`."""

    def __init__(self, texts: Sequence[str], tokenizer: Any, width: int) -> None:
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special = [text for text in texts if any(token in text for token in special)]
        self.plain = [text for text in texts if text not in self.special]
        self.tokenizer, self.width = tokenizer, width
        lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        self.look_back = max(lengths, default=0) + 2

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> BoolTensor:
        """bool [B], of ids [B, prompt + answer]."""
        ends = input_ids[:, self.width :][:, -self.look_back :]
        stopped = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for texts, skip in ((self.plain, True), (self.special, False)):
            if texts:
                written = self.tokenizer.batch_decode(ends, skip_special_tokens=skip)
                found = [any(text in end for text in texts) for end in written]
                stopped |= torch.tensor(found, device=input_ids.device)
        return cast("BoolTensor", stopped)


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
