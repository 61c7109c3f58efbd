"""Shards put together are what lm_eval makes of one run, and what is told about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness_toys import DOCUMENTS, model, settings, tokenizer, write_tasks
from lm_eval.evaluator import evaluate

from overfill.engine import Engine
from overfill.errors import UserError
from pipeline.harness.adapter import EngineLM, Reading
from pipeline.harness.aggregate import BOOTSTRAP, aggregate
from pipeline.harness.loading import TaskSettings, build_requests, load
from pipeline.harness.results import SAMPLES_FILE, Metrics, record_metrics
from pipeline.harness.shards import answer, documents_of, keep, kept, plan

FULL = model()
ENGINE = Engine(FULL, model(seed=1, hidden=16))


def adapter() -> EngineLM:
    return EngineLM(ENGINE, Engine(FULL, FULL), tokenizer(), Reading(batch=3, seed=5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "mine")


def sharded(asked: TaskSettings, progress: Path, payload: Path) -> Metrics:
    """What the stage does, in this process: shards of two documents, last first."""
    lm, loaded = adapter(), load(asked)
    documents = {name: documents_of(build_requests(task, asked, lm)) for name, task in loaded.tasks.items()}
    for shard in reversed(plan({name: len(found) for name, found in documents.items()}, 2)):
        keep(progress, shard, answer(lm, documents[shard.task][shard.start : shard.stop]))
    again = load(asked)
    for task in again.tasks.values():
        build_requests(task, asked, lm)
    payload.mkdir()
    return aggregate(again, {name: kept(progress, name) for name in documents}, lm, asked.samples, payload)


def in_one_run(asked: TaskSettings) -> Any:
    """lm_eval by itself."""
    loaded = load(asked)
    for task in loaded.tasks.values():
        task.set_fewshot_seed(asked.seed)
    return evaluate(
        adapter(),
        {"tasks": loaded.tasks, "groups": loaded.groups},
        limit=asked.samples,
        bootstrap_iters=BOOTSTRAP,
        apply_chat_template=True,
        fewshot_as_multiturn=asked.fewshot_as_multiturn,
    )


@pytest.mark.parametrize(("samples", "shots"), [(None, 0), (3, 2)])
def test_shards_together_are_lm_evals_own_run(tmp_path, folder, samples, shots):
    names = ("both", "likely", "roll", "draw")
    asked = settings(folder, *names, samples=samples, num_fewshot=shots, fewshot_as_multiturn=True)
    found, expected = sharded(asked, tmp_path / "progress", tmp_path / "payload"), in_one_run(asked)
    numbers = 0
    for name, values in expected["results"].items():
        for metric in found.tasks[name].metrics if name in found.tasks else ():
            assert metric.value == pytest.approx(values[f"{metric.metric},{metric.filter}"], rel=1e-6)
            error = values[f"{metric.metric}_stderr,{metric.filter}"]
            assert metric.stderr == (None if error == "N/A" else pytest.approx(error, rel=1e-4))
            numbers += 1
    assert numbers == 10  # write, choose, likely and the group have two each, roll and draw one
    assert found.tasks["write"].num_fewshot == shots
    assert found.tasks["write"].version == "2.5"


def test_each_sample_is_kept_with_its_requests_answers_and_scores(tmp_path, folder):
    import pyarrow.parquet as parquet

    found = sharded(settings(folder), tmp_path / "progress", tmp_path / "payload")
    rows = parquet.ParquetFile(tmp_path / "payload" / SAMPLES_FILE).read().to_pylist()
    assert len(rows) == len(DOCUMENTS) * 6  # five tasks, one of them with two filters
    chosen = [row for row in rows if row["task"] == "choose"]
    for row, document in zip(chosen, DOCUMENTS, strict=True):
        assert row["prompt"] == f"<user>{document['question']}<assistant>"
        assert [request[1] for request in json.loads(row["requests"])] == document["choices"]
        scores = [answers[0][0] for answers in json.loads(row["responses"])]
        assert row["score"] == float(scores.index(max(scores)) == document["right"])
        assert json.loads(row["metrics"])["acc"] == row["score"]
    mean = sum(row["score"] for row in chosen) / len(chosen)
    assert found.tasks["choose"].metrics[0].value == pytest.approx(mean)
    written = [row for row in rows if row["task"] == "write" and row["filter"] == "whole"]
    assert [row["response"] for row in written] == [row["answer"] for row in written]
    assert {row["score"] for row in rows if row["task"] == "roll"} == {None}


def test_metrics_have_names_that_a_report_and_mlflow_take(tmp_path, folder):
    found = sharded(settings(folder, "write", "choose"), tmp_path / "progress", tmp_path / "payload")
    names = set(record_metrics(found))
    assert names == {
        *("eval/write/exact_match", "eval/write/exact_match_stderr", "eval/write/samples"),
        *("eval/write/exact_match/whole", "eval/write/exact_match_stderr/whole"),
        *("eval/choose/acc", "eval/choose/acc_stderr", "eval/choose/acc_norm", "eval/choose/acc_norm_stderr"),
        "eval/choose/samples",
    }


def test_answers_to_other_questions_are_not_taken(tmp_path, folder):
    lm, asked = adapter(), settings(folder, "write")
    loaded = load(asked)
    answers = answer(lm, documents_of(build_requests(loaded.tasks["write"], asked, lm)))
    build_requests(loaded.tasks["write"], settings(folder, "write", system_instruction="Be brief."), lm)
    with pytest.raises(ValueError, match="write: document 0 asks something else"):
        aggregate(loaded, {"write": answers}, lm, None, tmp_path)


def test_examples_are_those_of_the_whole_task_whoever_answers(folder):
    lm, asked = adapter(), settings(folder, "write", num_fewshot=2, fewshot_as_multiturn=True)
    first, second = (build_requests(load(asked).tasks["write"], asked, lm) for _ in range(2))
    assert [request.args for request in first] == [request.args for request in second]
    prompt = first[0].args[0]
    assert prompt.count("<user>") == 3
    assert prompt.count("<assistant>") == 3
    other = settings(folder, "write", num_fewshot=2, fewshot_as_multiturn=True, seed=2)
    assert [r.args for r in build_requests(load(other).tasks["write"], other, lm)] != [r.args for r in first]


def test_data_are_found_beside_the_task_or_where_the_user_says(tmp_path, folder):
    with pytest.raises(UserError, match=r"gsm8k_files reads train.jsonl, which is not in .*evaluate.task_data"):
        load(TaskSettings(tasks=("gsm8k_files",)))
    for split in ("train", "test"):
        row = {"question": "How many are 9 and 9?", "answer": "9 + 9 = 18\n#### 18"}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    asked = TaskSettings(tasks=("gsm8k_files",), data=tmp_path, chat_template=True)
    task = load(asked).tasks["gsm8k_files"]
    (request,) = build_requests(task, asked, adapter())
    assert request.args[0] == "<user>How many are 9 and 9?<assistant>"
    scores = {}
    for answered in ("9 + 9 = 18\n#### 18", "It is 18", "#### 17"):
        request.resps = [answered]
        task.apply_filters()
        scores[answered] = [
            task.process_results(task.eval_docs[0], [request.filtered_resps[name]])["exact_match"]
            for name in ("strict-match", "flexible-extract")
        ]
    assert list(scores.values()) == [[1, 1], [0, 1], [0, 0]]


def test_data_files_may_be_anywhere_and_many(tmp_path, folder):
    (tmp_path / "documents-0.jsonl").write_text((folder / "documents.jsonl").read_text())
    own = write_tasks(tmp_path / "own")
    common = (own / "_common").read_text()
    for files in (f"'{folder / 'documents.jsonl'}'", "[documents.jsonl, documents-*.jsonl]"):
        (own / "_common").write_text(common.replace("test: documents.jsonl", f"test: {files}"))
        asked = TaskSettings(tasks=("write",), folder=own, data=tmp_path)
        assert len(load(asked).tasks["write"].eval_docs) == len(DOCUMENTS) * (2 if files.startswith("[") else 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unsafe_code: true\n", "runs the code that the model writes"),
        ("doc_to_image: [question]\n", "reads? text only"),
        ("test_split: nowhere\n", r"odd cannot be loaded \(KeyError: 'nowhere'\)"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(tmp_path, text, message):
    folder = write_tasks(tmp_path)
    (folder / "odd.yaml").write_text(f'include: _common\ntask: odd\ndoc_to_target: "{{{{answer}}}}"\n{text}')
    with pytest.raises(UserError, match=message) as caught:
        load(settings(folder, "odd"))
    assert "\n" not in str(caught.value)
