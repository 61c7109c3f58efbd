"""Accuracy on tasks of lm-evaluation-harness: workers answer shards of the documents, then one evaluates all answers.

Finished shards are kept in `progress/shards`, so that a killed run goes on behind them (`pipeline.harness.shards`). The
payload is `metrics.json` and `samples.parquet`, every sample with its requests, answers and scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from overfill.errors import UserError
from pipeline.config_tasks import TasksConfig
from pipeline.corpus.chat import load_tokenizer
from pipeline.stage import External, Stage, StageRun
from pipeline.stages.evaluate import load_system
from pipeline.stages.folders import tokenizer_folder
from pipeline.stages.remote import Metrics, run_on_worker, run_on_workers

if TYPE_CHECKING:
    from pipeline.harness.adapter import ChatText, EngineLM
    from pipeline.harness.loading import Loaded, TaskSettings
    from pipeline.harness.shards import Documents

FILES, DATA = "task_files", "task_data"
"""Inputs: the user's folders of tasks and of their data."""
BATCHES_PER_SHARD = 4
"""Documents of a shard, in batches: enough to make batches of equal lengths, few enough to be soon done."""


def run(run: StageRun) -> Metrics:
    """Answer what is not answered yet, then evaluate; the record carries `eval/<task>/<metric>`."""
    workers = run.resources.workers
    run_on_workers([partial(answer_shards, worker=worker, workers=workers) for worker in range(workers)], run)
    return run_on_worker(evaluate_answers, run)


def answer_shards(run: StageRun, worker: int, workers: int) -> Metrics:
    """In a Ray worker: answer this worker's part of the shards, as far as they are not answered."""
    from pipeline.harness import shards

    _, documents = _requests(run, _chat_text(run))
    sizes = {task: len(found) for task, found in documents.items()}
    mine = shards.plan(sizes, BATCHES_PER_SHARD * run.resources.micro_batch)[worker::workers]
    missing = shards.missing(run.progress, mine)
    model = _model(run) if missing else None
    for shard in missing:
        assert model is not None  # something is missing
        answers = shards.answer(model, documents[shard.task][shard.start : shard.stop])
        run.sent(shards.keep(run.progress, shard, answers))
        done = sum(shards.answered(run.progress, task) for task in sizes)
        run.log_metrics(done, sum(sizes.values()), {})
    return {}


def evaluate_answers(run: StageRun) -> Metrics:
    """In a Ray worker: lm-eval's evaluation of all answers."""
    from pipeline.harness.aggregate import aggregate
    from pipeline.harness.results import record_metrics
    from pipeline.harness.shards import kept

    model = _chat_text(run)
    loaded, documents = _requests(run, model)
    answers = {task: kept(run.progress, task) for task in documents}
    for task, found in documents.items():
        if len(answers[task].documents) < len(found):
            raise RuntimeError(f"{task}: {len(answers[task].documents)} of {len(found)} documents are answered")
    return record_metrics(aggregate(loaded, answers, model, run.config["task_samples"], run.staging))


def check_tasks(stages: Iterable[Stage]) -> None:
    """Load the tasks of stages that are to run, before anything is trained for them.

    Raises UserError for a task that cannot be loaded: its data are out of reach, its files are wrong."""
    wanted = {_settings(stage.config, _locations(stage)) for stage in stages}
    load = ray.remote(_loading_problem).options(num_cpus=0.5, scheduling_strategy="DEFAULT")
    for problem in ray.get([load.remote(settings) for settings in wanted]):
        if problem:
            raise UserError(problem)


def _loading_problem(settings: TaskSettings) -> str:
    """In a Ray worker. An error travels as text: its type may not be importable where it arrives."""
    from pipeline.harness.loading import load

    try:
        load(settings)
    except UserError as error:
        return str(error)
    return ""


def _locations(stage: Stage) -> dict[str, Path]:
    given = {name: source for name, source in stage.inputs.items() if isinstance(source, External)}
    return {name: Path(source.location) for name, source in given.items() if source.location is not None}


def _settings(config: Mapping[str, Any], inputs: Mapping[str, Path]) -> TaskSettings:
    from pipeline.harness.loading import TaskSettings

    tasks = tasks_config(config)
    return TaskSettings(
        tasks=tasks.tasks,
        samples=tasks.task_samples,
        num_fewshot=tasks.num_fewshot,
        chat_template=tasks.chat_template,
        fewshot_as_multiturn=tasks.chat_template and tasks.fewshot_as_multiturn,
        system_instruction=tasks.system_instruction,
        seed=tasks.task_seed,
        folder=inputs.get(FILES),
        data=inputs.get(DATA),
    )


def tasks_config(config: Mapping[str, Any]) -> TasksConfig:
    """The part of a stage's config that says what is asked."""
    return TasksConfig.model_validate({name: config[name] for name in TasksConfig.model_fields if name in config})


def _requests(run: StageRun, model: ChatText) -> tuple[Loaded, Documents]:
    """The tasks, and by task the requests of each document."""
    from pipeline.harness.loading import build_requests, load
    from pipeline.harness.shards import documents_of

    settings = _settings(run.config, run.inputs)
    if settings.chat_template and not model.tokenizer.chat_template:
        raise UserError(
            "evaluate.chat_template: this tokenizer has no chat template; give one in `data.chat_template`, or set "
            "evaluate.chat_template to false"
        )
    loaded = load(settings)
    built = {name: build_requests(task, settings, model) for name, task in loaded.tasks.items()}
    return loaded, {name: documents_of(instances) for name, instances in built.items()}


def _chat_text(run: StageRun) -> ChatText:
    """With the tokenizer of the model that reads prompts, which is that of its students, too."""
    from pipeline.harness.adapter import ChatText

    return ChatText(load_tokenizer(tokenizer_folder(run.inputs["teacher"]), run.config["template"]))


def _model(run: StageRun) -> EngineLM:
    from pipeline.harness.adapter import EngineLM, Reading

    tasks = tasks_config(run.config)
    engine, full = load_system(run, run.config["dtype"], run.config["weights"])
    reading = Reading(
        batch=run.resources.micro_batch,
        dial=run.config["refresh"],
        max_new_tokens=tasks.task_max_new_tokens,
        seed=tasks.task_seed,
    )
    return EngineLM(engine, full, _chat_text(run).tokenizer, reading)
