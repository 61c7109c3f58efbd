"""All answers of a system -> what lm_eval makes of them: filters, scores, aggregates and standard errors.

lm_eval's own `evaluate` runs over a model that only repeats what was answered, so the numbers are those of one run on
one machine, whatever shards there were. Each request must be the one that was answered, by its digest.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from pipeline.harness.adapter import ChatText
from pipeline.harness.results import (
    METRICS_FILE,
    SAMPLES_FILE,
    Metrics,
    Named,
    Scored,
    TaskResult,
    samples_schema,
)
from pipeline.harness.shards import Answers, request_digest, request_key

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from pipeline.harness.loading import Loaded

BOOTSTRAP = 1000
"""Resamples for the standard error of metrics that have no formula: accurate to about 2 %. lm_eval's 100,000 take
minutes for a perplexity, and cap BLEU's at 100."""


class Recorded(ChatText, LM):
    """Repeats what was answered."""

    def __init__(self, tokenizer: Any, answers: Mapping[str, Answers]) -> None:
        super().__init__(tokenizer)
        self._answers = answers

    def _repeat(self, requests: Sequence[Instance]) -> list[Any]:
        seen: Counter[tuple[Any, ...]] = Counter()
        repeated: list[Any] = []
        for request in requests:
            key = (request.task_name, request.doc_id, request_key(request))
            assert request.task_name is not None and request.doc_id is not None  # as when they were answered
            entry = self._answers[request.task_name].documents[request.doc_id][request_key(request)]
            if entry["request"] != request_digest(request):
                raise ValueError(
                    f"{request.task_name}: document {request.doc_id} asks something else than when it was answered"
                )
            repeated.append(entry["answers"][seen[key]])
            seen[key] += 1
        return repeated

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As it was scored."""
        return [(logprob, greedy) for logprob, greedy in self._repeat(requests)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As it was scored."""
        return self._repeat(requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As it was written."""
        return self._repeat(requests)


def aggregate(
    loaded: Loaded, answers: Mapping[str, Answers], model: ChatText, documents: int | None, folder: Path
) -> Metrics:
    """Evaluate answers to tasks whose requests are built, for at most so many documents each.

    Writes `metrics.json` and `samples.parquet` into the folder."""
    os.environ["DISABLE_MULTIPROC"] = "1"  # a stage's worker has the threads that it was given, and no more
    for task in loaded.tasks.values():
        task.build_all_requests = _built  # they are: a second time, few-shot examples might be others
    found: Any = evaluate(
        Recorded(model.tokenizer, answers),
        {"tasks": loaded.tasks, "groups": loaded.groups},
        limit=documents,
        bootstrap_iters=BOOTSTRAP,
    )
    results = {name: _result(name, found, answers) for name in found["results"]}
    metrics = Metrics(
        tasks={name: result for name, result in results.items() if result.metrics},
        named={name: _named(name, loaded, results) for name in loaded.members},
    )
    (folder / METRICS_FILE).write_text(metrics.model_dump_json(indent=1) + "\n", encoding="utf-8")
    _write_samples(found["samples"], metrics, folder / SAMPLES_FILE)
    return metrics


def _built(**_: Any) -> None:
    """Requests are there already."""


def _result(name: str, found: Mapping[str, Any], answers: Mapping[str, Answers]) -> TaskResult:
    values = found["results"][name]
    scored: list[Scored] = []
    for key, value in values.items():
        metric, comma, chosen = key.rpartition(",")
        if comma and not metric.endswith("_stderr") and _score(value) is not None:
            error = values.get(f"{metric}_stderr,{chosen}")
            better = (found["higher_is_better"].get(name) or {}).get(metric)
            scored.append(
                Scored(metric=metric, filter=chosen, value=float(value), stderr=_score(error), higher_is_better=better)
            )
    return TaskResult(
        version=str(found["versions"].get(name, "")),
        num_fewshot=found["n-shot"].get(name),
        samples=int(values.get("sample_len", 0)),
        truncated=answers[name].truncated if name in answers else 0,
        is_group=name not in answers,
        metrics=scored,
    )


def _named(name: str, loaded: Loaded, results: Mapping[str, TaskResult]) -> Named:
    """A name stands for its own result, or, where it has none (a tag, a group without an aggregate), for its members'."""
    own = name in results and bool(results[name].metrics)
    return Named(results=[name] if own else list(loaded.members[name]), tasks=list(loaded.members[name]))


def _write_samples(samples: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Metrics, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = {task: result.metrics[0].metric for task, result in metrics.tasks.items()}
    rows = [row for task, logged in samples.items() for row in _rows(task, logged, first.get(task, ""))]
    pq.write_table(pa.Table.from_pylist(rows, schema=samples_schema()), path)


def _rows(task: str, logged: Sequence[Mapping[str, Any]], primary: str) -> Iterator[dict[str, Any]]:
    for sample in logged:
        values = {name: sample[name] for name in sample["metrics"]}
        responses, requests = sample["resps"], sample["arguments"]
        yield {
            "task": task,
            "sample": int(sample["doc_id"]),
            "filter": sample["filter"],
            "score": _score(values.get(primary)),
            "prompt": str(requests[0][0]),
            "target": _text(sample["target"]),
            "response": _text(responses[0][0] if len(responses) == 1 else [first[0] for first in responses]),
            "answer": _text(sample["filtered_resps"][0] if len(responses) == 1 else sample["filtered_resps"]),
            "metrics": _text(values),
            "requests": _text(requests),
            "responses": _text(responses),
            "document": _text(sample["doc"]),
            "digest": sample["doc_hash"],
        }


def _score(value: Any) -> float | None:
    """A number, if it is one: a sample's perplexity is a pair, its BLEU two texts, a missing standard error "N/A"."""
    value = value.item() if hasattr(value, "item") and not getattr(value, "shape", ()) else value
    return float(value) if isinstance(value, int | float) else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
