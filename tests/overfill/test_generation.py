"""Generation: equal to `transformers` where both can, right where padding and first tokens go wrong, and refusals."""

from __future__ import annotations

import copy
import string
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import EOS, KINDS, PAD, full_model, student_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerFast, StoppingCriteria

from overfill.decode_loop import choose, run_loop
from overfill.engine import Engine
from overfill.errors import UserError
from overfill.generation import generate, left_aligned, prepare_request

PROMPTS = torch.tensor([[3, 14, 5, 9, 26, 8], [0, 0, 9, 8, 7, 13], [0, 0, 0, 0, 0, 4]])
MASK = PROMPTS != PAD
NO_EOS = {"eos_token_id": 40, "suppress_tokens": [40]}


def seeded(seed: int, call: Any, *arguments: Any, **options: Any) -> Any:
    torch.manual_seed(seed)
    return call(*arguments, **options)


def alone(model: PreTrainedModel) -> Engine:
    """The engine of an unpruned student: a copy of the full model."""
    return Engine(model, copy.deepcopy(model))


LETTERS = ["<pad>", "<s>", "</s>", *string.ascii_letters[:38]]


def tokenizer() -> PreTrainedTokenizerFast:
    """One letter per token."""
    letters = Tokenizer(models.BPE({letter: index for index, letter in enumerate(LETTERS)}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="</s>")


class Ban(LogitsProcessor):
    """Rules out one token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.token] = -torch.inf  # in place on purpose: what the caller keeps must not change
        return scores


class StopAt(StoppingCriteria):
    """Ends the rows whose text reaches a length, given per row."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return input_ids.shape[1] >= self.lengths


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 1.4, "top_k": 12, "top_p": 0.9},
    ],
    ids=["greedy", "sampled"],
)
def test_an_unpruned_student_writes_what_transformers_generate_writes(kind: str, options: dict[str, Any]) -> None:
    full = full_model(kind)
    options = {"max_new_tokens": 14, "attention_mask": MASK, **options}
    expected = seeded(7, full.generate, PROMPTS, **options)
    assert torch.equal(seeded(7, generate, alone(full), PROMPTS, **options), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 9, "do_sample": True, "min_p": 0.05, "repetition_penalty": 1.5},
        {"max_new_tokens": 9, "do_sample": True, "num_return_sequences": 3, "repetition_penalty": 4.0},
        {"max_new_tokens": 12, "eos_token_id": [EOS, 5, 17, 21, 30, 33, 35], "min_new_tokens": 4, "do_sample": True},
        {"max_length": 11, "no_repeat_ngram_size": 2},
        {"max_length": 15, "min_length": 12, "eos_token_id": list(range(2, 30)), "pad_token_id": 1},
        {"max_new_tokens": 10, "bad_words_ids": [[5], [7, 8]], "renormalize_logits": True, "forced_eos_token_id": EOS},
        {"generation_config": GenerationConfig(max_new_tokens=6, do_sample=True, top_k=3, eos_token_id=EOS)},
        {"max_new_tokens": 10, "prefix_allowed_tokens_fn": lambda row, ids: [int(ids[-1]) % 30 + 3, 7 + row]},
        {},
    ],
)
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")  # the last case is about that default
def test_options_mean_what_they_mean_in_transformers(options: dict[str, Any]) -> None:
    full = full_model("llama")
    expected = seeded(5, full.generate, PROMPTS, attention_mask=MASK, **options)
    assert torch.equal(seeded(5, generate, alone(full), PROMPTS, attention_mask=MASK, **options), expected)


def test_the_mask_is_inferred_from_the_padding_token_as_transformers_does() -> None:
    full = full_model("llama")
    expected = generate(alone(full), PROMPTS, attention_mask=MASK, max_new_tokens=5)
    assert torch.equal(generate(alone(full), PROMPTS, max_new_tokens=5), expected)


def test_scores_and_logits_are_those_of_transformers() -> None:
    full = full_model("qwen2")
    options = {
        "attention_mask": MASK,
        "max_new_tokens": 6,
        "do_sample": True,
        "temperature": 0.7,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    expected = seeded(2, full.generate, PROMPTS, **options)
    found = seeded(2, generate, alone(full), PROMPTS, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert len(found[name]) == len(expected[name]) == 6
        for one, other in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert found.past_key_values.get_seq_length() == 6 + 5


def test_kept_logits_are_untouched_by_processors_that_write_in_place() -> None:
    options = {"max_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    output = generate(alone(full_model("llama")), PROMPTS, attention_mask=MASK, logits_processor=[Ban(6)], **options)
    assert torch.isfinite(output.logits[0][:, 6]).all()
    assert torch.isinf(output.scores[0][:, 6]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_writes_all_but_the_first_token(kind: str) -> None:
    full, student = full_model(kind), student_model(kind)
    prompt, tokens = [3, 14, 5, 9, 26, 8], []
    with torch.no_grad():
        output = full(torch.tensor([prompt]), use_cache=True)
        for _ in range(8):
            tokens.append(int(output.logits[0, -1].argmax()))
            output = student(torch.tensor([[tokens[-1]]]), past_key_values=output.past_key_values, use_cache=True)
    found = generate(Engine(full, student), torch.tensor([prompt]), max_new_tokens=8, eos_token_id=None)
    assert found[0].tolist() == prompt + tokens


FULL, STUDENT = full_model("qwen2-some-layers-slide"), student_model("qwen2-some-layers-slide")
ENGINE = Engine(FULL, STUDENT)
TOKENS = st.lists(st.integers(3, 40), min_size=1, max_size=7)


@settings(deadline=None, max_examples=15)
@given(
    rows=st.lists(TOKENS, min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    extra=st.integers(0, 3),
    filler=st.integers(0, 40),
    eos=st.sets(st.integers(3, 40), max_size=12),
)
def test_each_row_of_a_batch_is_written_as_it_is_alone(
    rows: list[list[int]], side: str, extra: int, filler: int, eos: set[int]
) -> None:
    width = max(map(len, rows)) + extra
    ids, mask = torch.full((len(rows), width), filler), torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    options = {
        "max_new_tokens": 6,
        "eos_token_id": sorted(eos) or None,
        "pad_token_id": PAD,
        "repetition_penalty": 3.0,  # must not see the padding
    }
    together = generate(ENGINE, ids, attention_mask=mask, **options)[:, max(map(len, rows)) :].tolist()
    for row, found in zip(rows, together, strict=True):
        only = torch.tensor([row])
        expected = generate(ENGINE, only, attention_mask=torch.ones_like(only), **options)[0, len(row) :].tolist()
        assert found == expected + [PAD] * (len(found) - len(expected))
        ends = [step for step, token in enumerate(expected) if token in eos]
        assert ends in ([], [len(expected) - 1])
        assert ends or len(expected) == 6


def test_an_end_token_as_first_token_ends_the_row_at_once() -> None:
    first = generate(ENGINE, PROMPTS, attention_mask=MASK, max_new_tokens=1, **NO_EOS)[:, -1].tolist()
    assert generate(ENGINE, PROMPTS, attention_mask=MASK, max_new_tokens=9, eos_token_id=first).shape == (3, 7)
    one_ends = generate(ENGINE, PROMPTS, attention_mask=MASK, max_new_tokens=9, eos_token_id=first[0], pad_token_id=PAD)
    assert one_ends[0, 6:].tolist() == [first[0]] + [PAD] * (one_ends.shape[1] - 7)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_exactly_as_many_tokens_as_asked_for_and_no_step_too_many(count: int) -> None:
    steps: list[int] = []
    handle = STUDENT.register_forward_hook(lambda *_: steps.append(1))
    output = generate(ENGINE, PROMPTS, attention_mask=MASK, max_new_tokens=count, **NO_EOS)
    handle.remove()
    assert output.shape == (3, 6 + count)
    assert len(steps) == count - 1


def test_the_first_token_obeys_sampling_settings() -> None:
    def first(seed: int, **options: Any) -> list[int]:
        found = seeded(seed, generate, ENGINE, PROMPTS, attention_mask=MASK, max_new_tokens=1, **options)
        return found[:, -1].tolist()

    greedy = first(0)
    assert len({tuple(first(seed, do_sample=True, temperature=3.0, top_k=0)) for seed in range(8)}) > 4
    assert first(1, do_sample=True, temperature=3.0, top_k=1) == greedy
    assert not set(first(0, suppress_tokens=greedy)) & set(greedy)
    assert first(0, logits_processor=[Ban(greedy[0])])[0] != greedy[0]


def test_sampling_draws_in_proportion_to_the_softmax() -> None:
    scores = torch.tensor([0.1, 0.2, 0.7]).log().expand(20_000, 3)
    counts = choose(scores, True, torch.Generator().manual_seed(0)).bincount(minlength=3) / 20_000
    # The largest standard deviation of a share is 0.0032: five of them.
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.2, 0.7]), atol=0.016, rtol=0)


def test_a_generator_of_its_own_makes_samples_repeatable_and_leaves_the_global_one_alone() -> None:
    def draw() -> Tensor:
        own = torch.Generator().manual_seed(11)
        return generate(ENGINE, PROMPTS, attention_mask=MASK, max_new_tokens=6, do_sample=True, generator=own)

    state = torch.get_rng_state()
    first = draw()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(draw(), first)


def test_several_sequences_of_a_prompt_are_its_own_and_differ() -> None:
    torch.manual_seed(0)
    output = generate(
        ENGINE, PROMPTS, attention_mask=MASK, max_new_tokens=8, do_sample=True, top_k=0, num_return_sequences=4
    )
    assert torch.equal(output[:, :6], PROMPTS.repeat_interleave(4, dim=0))
    assert len({tuple(row) for row in output[:4].tolist()}) == 4


def test_stop_strings_end_a_row_as_in_transformers() -> None:
    full, words = full_model("llama"), tokenizer()
    free = full.generate(PROMPTS, attention_mask=MASK, max_new_tokens=12, eos_token_id=None)
    stop = LETTERS[int(free[0, 8])] + LETTERS[int(free[0, 9])]
    options = {"max_new_tokens": 12, "stop_strings": [stop], "tokenizer": words, "attention_mask": MASK}
    expected = full.generate(PROMPTS, **options)
    assert torch.equal(generate(alone(full), PROMPTS, **options), expected)
    assert expected.shape[1] == 10 or expected[0, 10:].unique().tolist() == [PAD]


def test_a_stopping_criterion_of_the_caller_ends_single_rows() -> None:
    output = generate(
        ENGINE, PROMPTS, attention_mask=MASK, max_new_tokens=9, stopping_criteria=[StopAt([8, 11, 9])], **NO_EOS
    )
    assert output.shape == (3, 11)
    assert [(row[6:] != PAD).sum().item() for row in output] == [2, 5, 3]


def test_a_streamer_gets_the_prompt_and_then_every_token_as_it_comes() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[list[int]] = []
            self.ended = 0

        def put(self, value: Tensor) -> None:
            self.seen.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended += 1

    streamer = Streamer()
    prompt = PROMPTS[:1]
    output = generate(ENGINE, prompt, max_new_tokens=5, streamer=streamer)  # type: ignore[arg-type]
    assert streamer.seen == [prompt[0].tolist(), *([token] for token in output[0, 6:].tolist())]
    assert streamer.ended == 1


def test_alignment_keeps_order_and_drops_common_padding() -> None:
    ids, mask = left_aligned(
        torch.tensor([[1, 2, 0, 0, 0], [0, 3, 0, 4, 5]]), torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 1, 1]])
    )
    assert ids.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert mask.tolist() == [[False, True, True], [True, True, True]]


def test_the_longest_sequence_that_fits_is_written() -> None:
    output = generate(ENGINE, PROMPTS, attention_mask=MASK, max_length=64, **NO_EOS)
    assert output.shape == (3, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"num_beams": 2, "do_sample": True}, "beam sample"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"assistant_model": "a model"}, "assistant_model"),
        ({"custom_generate": "repository"}, "custom_generate"),
        ({"past_key_values": "a cache"}, "past_key_values"),
        ({"max_new_token": 3}, "max_new_token is not supported here, or misspelt"),
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions=True"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 59}, "set max_new_tokens to 58 or less"),
        ({"max_length": 65}, "6 prompt tokens and 59 new ones exceed the 64 positions"),
        ({"max_length": 6}, "nothing could be written"),
        ({"stop_strings": ["x"]}, "tokenizer"),
        ({"attention_mask": MASK[:, 1:]}, "must be equal"),
        ({"attention_mask": MASK & (torch.arange(3) != 1)[:, None]}, "row 1 has no token"),
        ({"input_ids": PROMPTS}, "give the prompts once"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line_before_anything_runs(
    options: dict[str, Any], message: str
) -> None:
    ran: list[int] = []
    handles = [model.register_forward_pre_hook(lambda *_: ran.append(1)) for model in (FULL, STUDENT)]
    with pytest.raises(UserError) as error:
        generate(ENGINE, PROMPTS, **{"attention_mask": MASK, **options})
    for handle in handles:
        handle.remove()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not ran


def test_a_prompt_that_is_no_batch_is_refused() -> None:
    with pytest.raises(UserError, match=r"\[batch, length\]"):
        generate(ENGINE, PROMPTS[0])
    with pytest.raises(UserError, match=r"\[batch, length\]"):
        generate(ENGINE, PROMPTS[:, :0])


@settings(deadline=None, max_examples=25)
@given(
    rows=st.lists(TOKENS, min_size=1, max_size=3),
    chunk=st.integers(1, 9),
    refresh=st.sampled_from([None, 2, "entropy>2.5"]),
)
def test_a_prompt_may_be_read_in_chunks_of_any_size(rows: list[list[int]], chunk: int, refresh: Any) -> None:
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    options = {"attention_mask": ids != PAD, "max_new_tokens": 5, "refresh": refresh}
    assert torch.equal(generate(ENGINE, ids, prefill_chunk_size=chunk, **options), generate(ENGINE, ids, **options))


def test_long_prompts_are_read_in_chunks_that_bound_the_tokens_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    handle = FULL.model.register_forward_hook(lambda _, __, output: widths.append(output.last_hidden_state.shape[1]))
    monkeypatch.setattr("overfill.engine.PREFILL_TOKENS", 8)
    generate(ENGINE, PROMPTS, attention_mask=MASK, max_new_tokens=1, **NO_EOS)
    handle.remove()
    assert widths == [2, 2, 2]  # three rows: two columns at a time are at most eight tokens


@settings(deadline=None, max_examples=25)
@given(
    rows=st.lists(TOKENS, min_size=1, max_size=3), lag=st.integers(1, 3), eos=st.sets(st.integers(3, 40), max_size=20)
)
def test_looking_for_the_end_some_tokens_late_changes_nothing(rows: list[list[int]], lag: int, eos: set[int]) -> None:
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    options = {"max_new_tokens": 7, "eos_token_id": sorted(eos) or None, "pad_token_id": PAD}
    wanted = {"return_dict_in_generate": True, "output_scores": True}
    request = prepare_request(ENGINE, ids, ids != PAD, options={**options, **wanted})
    at_once, late = run_loop(ENGINE, request, lag=0), run_loop(ENGINE, request, lag=lag)
    assert torch.equal(late.sequences, at_once.sequences)
    assert len(late.scores) == len(at_once.scores) == at_once.sequences.shape[1] - width
    assert late.past_key_values.get_seq_length() == at_once.past_key_values.get_seq_length()


def test_a_returned_cache_goes_on_in_transformers() -> None:
    full = full_model("llama")
    output = generate(alone(full), PROMPTS[:1], max_new_tokens=5, return_dict_in_generate=True, eos_token_id=None)
    with torch.no_grad():
        found = full(output.sequences[:, -1:], past_key_values=output.past_key_values).logits[0, -1]
        expected = full(output.sequences).logits[0, -1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
