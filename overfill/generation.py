"""Generation with the options of `transformers`, over an `Engine`.

Options are read, defaulted and turned into logits processors and stopping criteria by `transformers` itself (its
`GenerationMixin` methods, of the prefilling model), so `temperature`, `min_new_tokens`, `stop_strings`, `eos_token_id`
and the rest mean what they mean there, and the same seed draws the same tokens. The loops are ours
(`overfill.decode_loop`, `overfill.speculative`): `prefill` by one model, `decode_one` by another. What they do not do
(beams, assistants, ...) is refused before anything runs.

Differences from `transformers.generate`, on purpose:

- prompts may be padded on either side; they are aligned, and common padding is dropped, before anything else, so a
  row's text does not depend on its neighbours. Returned sequences are left padded.
- a sequence longer than the models' positions is refused rather than warned about.
- with `num_return_sequences` a prompt is read once.
- `generator=` draws from a generator of its own; without it, from torch's global one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from overfill.decode_loop import GenerationRequest, TwoStageOutput, run_loop
from overfill.dial import Refresh
from overfill.engine import Engine
from overfill.errors import UserError
from overfill.speculative import MOST_DRAFTED, run_exact

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_cache": (None, True),
    "cache_implementation": (None, "dynamic"),
    "guidance_scale": (None, 1, 1.0),
    "token_healing": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}
"""Options that change the loop, with the values that leave it as it is."""


def generate(
    engine: Engine,
    inputs: Tensor | None = None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    streamer: BaseStreamer | None = None,
    tokenizer: Any = None,
    generator: torch.Generator | None = None,
    refresh: int | str | None = None,
    exact: bool = False,
    draft_tokens: int | None = None,
    **options: Any,
) -> Tensor | TwoStageOutput:
    """Continue prompts, greedily or by sampling.

    Args:
        inputs, input_ids: int64 [B, P], either of the two.
        attention_mask: [B, P], 1 where a token is real, padding on either side; inferred from the padding token if
            missing, as `transformers` does.
        generation_config, options: as for `transformers.generate`; the defaults are the prefilling model's.
        tokenizer: needed for `stop_strings`.
        generator: source of the samples.
        refresh: when the full model re-reads what the student wrote: a number of tokens, or `"entropy>NATS"`; see
            `overfill.refresh`.
        exact: the student only drafts, and the full model verifies: what comes out is distributed as the full model's
            own text, and greedily is that text; see `overfill.speculative`.
        draft_tokens: with `exact`, tokens that are drafted at a time, 1 to 16; None: as many as pay, adaptively.

    Returns:
        Sequences int64 [B * num_return_sequences, P' + new tokens], prompts left padded to the longest of them, P';
        after its end a row is filled with the padding token. With `return_dict_in_generate`, the usual
        `GenerateDecoderOnlyOutput` (`scores` and `logits` if asked for), with `refreshes`, `drafted`,
        `accepted` and `acceptance_rate`.

    Raises:
        UserError: an option that is not supported, an empty prompt, or more tokens than the models have positions.
    """
    if (inputs is None) == (input_ids is None):
        raise UserError("generate: give the prompts once, as `input_ids`")
    dial = Refresh.parse(refresh)
    _check_mode(dial, exact, draft_tokens)
    request = prepare_request(
        engine,
        input_ids if inputs is None else inputs,
        attention_mask,
        generation_config,
        options,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        tokenizer=tokenizer,
    )
    if exact:
        return run_exact(engine, request, draft_tokens=draft_tokens, streamer=streamer, generator=generator)
    return run_loop(engine, request, refresh=dial, streamer=streamer, generator=generator)


def prepare_request(
    engine: Engine,
    prompt_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    options: dict[str, Any] | None = None,
    *,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    tokenizer: Any = None,
) -> GenerationRequest:
    """Everything of `generate` that comes before the first forward pass. Raises as `generate` does."""
    if prompt_ids is None or prompt_ids.ndim != 2 or prompt_ids.shape[1] == 0:
        raise UserError("generate: input_ids must be [batch, length] with at least one token per row")
    library = engine.prefill_model
    given_max_length, given_min_length = _given_lengths(library.generation_config, generation_config, options or {})
    with _as_user_errors():
        config, leftover = library._prepare_generation_config(generation_config, **(options or {}))
    _refuse_unsupported(config, leftover)
    prompt_ids = prompt_ids.to(engine.device)
    with _as_user_errors():
        library._prepare_special_tokens(config, attention_mask is not None, prompt_ids.device, len(prompt_ids))
    if attention_mask is None:
        attention_mask = library._prepare_attention_mask_for_generation(prompt_ids, config, {})
    prompt_ids, prompt_mask = left_aligned(prompt_ids, attention_mask.to(engine.device))
    _set_lengths(config, prompt_ids.shape[1], given_max_length, given_min_length, engine.max_positions)
    with _as_user_errors():
        processors = library._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=prompt_ids.shape[1],
            encoder_input_ids=prompt_ids,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            logits_processor=logits_processor or LogitsProcessorList(),
            device=prompt_ids.device,
            model_kwargs={"attention_mask": prompt_mask.repeat_interleave(config.num_return_sequences or 1, 0)},
        )
        criteria = library._get_stopping_criteria(
            generation_config=config, stopping_criteria=stopping_criteria or StoppingCriteriaList(), tokenizer=tokenizer
        )
    return GenerationRequest(prompt_ids, prompt_mask, config, processors, criteria)


def left_aligned(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's real tokens to the right end, in their order, and drop columns that are padding in every row.

    Returns ids int64 [B, P'] and mask bool [B, P'], P' the longest row.

    Raises:
        UserError: the shapes differ, or a row has no token.
    """
    if ids.shape != mask.shape:
        raise UserError(f"attention_mask is {tuple(mask.shape)}, input_ids {tuple(ids.shape)}: they must be equal")
    mask = mask.bool()
    lengths = mask.sum(1)
    if not bool((lengths > 0).all()):
        raise UserError(f"attention_mask: row {int(lengths.argmin())} has no token; the prompt needs at least one")
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    first = mask.shape[1] - int(lengths.max())
    return ids.gather(1, order)[:, first:], mask.gather(1, order)[:, first:]


def _check_mode(refresh: Refresh | None, exact: bool, draft_tokens: int | None) -> None:
    if exact and refresh is not None:
        raise UserError("generate: exact verifies every token, so there is nothing to refresh; leave refresh out")
    if draft_tokens is not None and not exact:
        raise UserError("generate: draft_tokens is for exact=True; leave it out")
    if draft_tokens is not None and not 1 <= draft_tokens <= MOST_DRAFTED:
        raise UserError(f"generate: draft_tokens is {draft_tokens}; it must be 1 to {MOST_DRAFTED}")


def _given_lengths(
    model_default: GenerationConfig, config: GenerationConfig | None, options: dict[str, Any]
) -> tuple[bool, bool]:
    """Whether anyone asked for a maximal, and a minimal, total length; if not, defaults count new tokens only."""

    def given(name: str) -> bool:
        sources = (getattr(config, name, None), getattr(model_default, name, None), options.get(name))
        return any(value is not None for value in sources)

    return given("max_length"), given("min_length")


def _refuse_unsupported(config: GenerationConfig, leftover: dict[str, Any]) -> None:
    unknown = [name for name, value in leftover.items() if value is not None and value is not False]
    for name, neutral in _NEUTRAL.items():
        if getattr(config, name, None) not in neutral:
            raise UserError(f"generate: {name}={getattr(config, name)!r} is not supported; leave {name} out")
    if unknown:
        raise UserError(f"generate: {unknown[0]} is not supported here, or misspelt; leave it out")
    mode = config.get_generation_mode()
    if mode not in _MODES:
        raise UserError(
            f"generate: these options ask for {mode.value.replace('_', ' ')}; OverFill decodes greedily or by "
            "sampling: set do_sample, with num_beams=1 and no assistant"
        )


def _set_lengths(
    config: GenerationConfig, prompt: int, given_max_length: bool, given_min_length: bool, positions: int
) -> None:
    """Turn numbers of new tokens into total lengths, and refuse what does not fit."""
    if config.max_new_tokens is not None:
        config.max_length = prompt + config.max_new_tokens
    elif not given_max_length:
        config.max_length = prompt + config.max_length
    if config.min_new_tokens is not None:
        config.min_length = prompt + config.min_new_tokens
    elif not given_min_length:
        config.min_length = 0
    if config.max_length <= prompt:
        raise UserError(
            f"generate: max_length is {config.max_length} and the longest prompt has {prompt} tokens, so nothing could "
            "be written; set max_new_tokens instead"
        )
    if config.max_length > positions:
        raise UserError(
            f"generate: {prompt} prompt tokens and {config.max_length - prompt} new ones exceed the {positions} "
            f"positions of the models; set max_new_tokens to {max(positions - prompt, 0)} or less, or cut the prompt"
        )


@contextlib.contextmanager
def _as_user_errors() -> Iterator[None]:
    """What `transformers` says against an option is the user's to mend."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"generate: {' '.join(str(error).split())}") from error
