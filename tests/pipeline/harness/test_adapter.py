"""The adapter against lm_eval's own model, against itself in other batches, and against plain forward passes."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_toys import DOCUMENTS, POSITIONS, assert_close, model, settings, tokenizer, write_tasks
from lm_eval.api.instance import Instance

from overfill.engine import Engine
from overfill.errors import UserError
from pipeline.corpus.chat import ASSISTANT, END_OF_TURN, PAD
from pipeline.harness.adapter import EngineLM, Reading, StopTexts
from pipeline.harness.loading import build_requests, load
from pipeline.harness.shards import answer, documents_of

FULL, STUDENT = model(), model(seed=1, hidden=16)
ALONE = Engine(FULL, FULL)


def adapter(engine: Engine = ALONE, **reading: Any) -> EngineLM:
    return EngineLM(engine, ALONE, tokenizer(), Reading(**reading))


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("test", number, 1))
        for number, each in enumerate(arguments)
    ]


PAIRS = [
    (f"{document['question']}{space}", choice)
    for document in DOCUMENTS
    for space in ("", " ")
    for choice in document["choices"]
]
LONG = ("abcd efgh " * 9, "kl")
"""More tokens than the model has positions."""
TEXTS = [("get 2: abc def",), ("x" * (3 * POSITIONS - 7),), ("q",), ("ab " * POSITIONS,)]


@pytest.fixture(scope="module")
def theirs() -> Any:
    """lm_eval's own adapter of the full model."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="accelerate is not installed")
    return huggingface.HFLM(pretrained=FULL, tokenizer=tokenizer(), batch_size=3, device="cpu")


def test_log_likelihoods_are_those_of_lm_evals_own_model(theirs):
    requests = asked("loglikelihood", *PAIRS, ("", "abc"), LONG)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = adapter(batch=4).loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=2e-4)


def test_rolling_log_likelihoods_are_those_of_lm_evals_own_model(theirs):
    requests = asked("loglikelihood_rolling", *TEXTS)
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert adapter(batch=2).loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-5)


# No letters of `<assistant>` or `<pad>`: lm-eval stops a batch when every row has a text in it, also within such tokens.
@pytest.mark.parametrize("until", [[], ["z"], ["g2", "oh", "\n\n"]])
def test_answers_are_those_of_lm_evals_own_model(theirs, until):
    options = {"until": until, "max_gen_toks": 20}
    requests = asked("generate_until", *((document["question"], options) for document in DOCUMENTS), (LONG[0], options))
    expected = theirs.generate_until(requests, disable_tqdm=True)
    ours = adapter(batch=4)
    assert ours.generate_until(requests) == expected
    assert len(set(expected)) > 2, "the model says the same to everything, which would prove nothing"
    assert ours.truncated == 1


def test_an_answer_ends_at_a_text_and_not_within_a_special_tokens_name():
    known = tokenizer()
    stop = StopTexts(["a", END_OF_TURN + "b"], known, width=1)
    rows = ["ccba", f"cc{PAD}c", f"c{END_OF_TURN}bc", f"acc{ASSISTANT}"]
    ids = torch.tensor([known.encode(row) for row in rows])
    assert stop(ids, None).tolist() == [True, False, True, False]  # the last begins with an `a`, which is its prompt


def test_a_direct_forward_pass_gives_the_same_log_likelihood():
    context, continuation = tokenizer().encode("sort: dbca"), tokenizer().encode("abcd")
    with torch.no_grad():
        logprobs = FULL(torch.tensor([[*context, *continuation]])).logits[0].log_softmax(-1)
    steps = range(len(context) - 1, len(context) + len(continuation) - 1)
    expected = sum(logprobs[step, token].item() for step, token in zip(steps, continuation, strict=True))
    ((found, _),) = adapter().loglikelihood(asked("loglikelihood", ("sort: dbca", "abcd")), disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-4)


def test_two_stages_score_the_first_token_by_the_full_model_and_the_others_by_the_student():
    context, continuation = tokenizer().encode("sort: dbca"), tokenizer().encode("abcd")
    with torch.no_grad():
        read = FULL(torch.tensor([context]), use_cache=True)
        expected = read.logits[0, -1].log_softmax(-1)[continuation[0]].item()
        cache = read.past_key_values
        for token, following in pairwise(continuation):
            logits = STUDENT(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits
            expected += logits[0, -1].log_softmax(-1)[following].item()
    request = asked("loglikelihood", ("sort: dbca", "abcd"))
    ((found, _),) = adapter(Engine(FULL, STUDENT)).loglikelihood(request, disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-4)


def test_white_space_behind_a_context_is_scored_and_read_by_the_full_model():
    engine = Engine(FULL, STUDENT)
    request = asked("loglikelihood", ("sort: dbca  ", "abcd"))
    ((found, _),) = adapter(engine).loglikelihood(request, disable_tqdm=True)
    ((spaces, _),) = adapter().loglikelihood(asked("loglikelihood", ("sort: dbca", "  ")), disable_tqdm=True)
    lm = adapter(engine)
    whole, rest = tokenizer().encode("sort: dbca  "), tokenizer().encode("abcd")
    ((answered, _),) = lm._loglikelihood_tokens([(None, whole, rest)])
    assert found == pytest.approx(spaces + answered, abs=1e-4)


def test_exact_mode_answers_and_scores_as_the_full_model():
    exact = adapter(Engine(FULL, STUDENT), dial="exact")
    questions = asked("generate_until", *((d["question"], {"until": ["a"], "max_gen_toks": 12}) for d in DOCUMENTS))
    assert exact.generate_until(questions) == adapter().generate_until(questions)
    pairs = asked("loglikelihood", *PAIRS)
    assert exact.loglikelihood(pairs, disable_tqdm=True) == adapter().loglikelihood(pairs, disable_tqdm=True)


def test_a_refresh_after_every_token_is_the_full_model():
    often = adapter(Engine(FULL, STUDENT), dial=1)
    questions = asked("generate_until", *((d["question"], {"until": ["z"], "max_gen_toks": 12}) for d in DOCUMENTS))
    assert often.generate_until(questions) == adapter().generate_until(questions)
    pairs = asked("loglikelihood", *PAIRS)
    expected = [value for value, _ in adapter().loglikelihood(pairs, disable_tqdm=True)]
    assert [value for value, _ in often.loglikelihood(pairs, disable_tqdm=True)] == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "mine")


def answers(lm: EngineLM, folder: Path) -> dict[str, Any]:
    """Every answer to every task, by document."""
    asked_for = settings(folder)
    loaded = load(asked_for)
    return {
        name: answer(lm, documents_of(build_requests(task, asked_for, lm))).documents
        for name, task in loaded.tasks.items()
    }


def test_a_student_that_nothing_was_cut_from_answers_exactly_as_the_full_model(folder):
    same = Engine(FULL, copy.deepcopy(FULL))
    assert answers(adapter(same), folder) == answers(adapter(), folder)


def test_answers_do_not_depend_on_the_batch(folder):
    engine = Engine(FULL, STUDENT)
    one, many = answers(adapter(engine, batch=1), folder), answers(adapter(engine, batch=7), folder)
    assert one != answers(adapter(), folder), "the student must differ from the full model, or this proves nothing"
    for task in one:
        for document in one[task]:
            for key, entry in one[task][document].items():
                assert_close(entry["answers"], many[task][document][key]["answers"])


def test_sampled_answers_differ_by_seed_and_repetition_and_not_by_what_stands_beside_them():
    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    requests = asked("generate_until", *((document["question"], options) for document in DOCUMENTS))
    all_of_them = adapter(seed=1).generate_until(requests)
    assert [adapter(seed=1).generate_until([request])[0] for request in requests] == all_of_them
    assert adapter(seed=2).generate_until(requests) != all_of_them
    first, second = adapter(seed=1).generate_until([requests[0]] * 2)
    assert first == all_of_them[0]
    assert second != first


def test_an_answer_longer_than_the_models_positions_is_refused_in_one_line():
    with pytest.raises(UserError, match="256 tokens, the models have 64 positions .* evaluate.task_max_new_tokens"):
        adapter().generate_until(asked("generate_until", ("sort: ba", {"until": []})))


def test_a_system_turn_that_the_template_refuses_is_left_out():
    lm = adapter()
    lm.tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ message['content'] }};{% endfor %}"
    )
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert lm.apply_chat_template(messages) == "u;"
