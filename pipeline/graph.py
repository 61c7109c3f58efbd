"""The one place that knows the order of the stages: a cell's config -> its stages, each with its identity.

    tokenizer ──► data ──► teacher ──► calibrate ──► prune ──► distill ──► evaluate, tasks
                                                        └──────────────────► benchmark

A teacher from the Hub is fetched by the `teacher` stage into the store, pinned by its revision; one in a local folder
is an external input, pinned by its content. The benchmark reads the untrained student: latency depends on shapes, so
one measurement serves every method and seed of a ratio.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from overfill.dial import NONE, dial
from overfill.errors import UserError
from overfill.shapes import ModelShape, PrunedWidths, resolve_widths
from pipeline.config import DataConfig, ExperimentConfig, TeacherConfig
from pipeline.config_tasks import TasksConfig
from pipeline.corpus.sources import corpus_files
from pipeline.fingerprint import digest_tree, identity_config
from pipeline.harness.names import SHIPPED, find
from pipeline.machine import device_description
from pipeline.paths import local_path
from pipeline.record import libraries
from pipeline.stage import External, Stage

SYSTEM = {"full": "full", "overfill": "overfill", "pruned": "student", "scratch": "student"}
"""Which system of an evaluation or a benchmark a method is."""
LATENCY_LIBRARIES = ("python", "torch", "transformers")
"""Libraries whose versions a latency depends on."""
TOY_VOCABULARY = 48
"""Upper bound of the toy tokenizer's vocabulary, for parameter counts before it is made."""

Input = Stage | External


def cell_stages(config: ExperimentConfig, teacher_shape: ModelShape | None = None) -> list[Stage]:
    """The stages of a cell (a config without sweep axes), in topological order.

    Raises UserError for files that are not there and for a teacher whose shape cannot be known."""
    method = config.distill.method
    files = _files(config.data)
    tokenizer = _tokenizer(config, files)
    data = _data(config.data, tokenizer, files)
    teacher = tokenizer if isinstance(tokenizer, External) else _teacher(config, tokenizer, data)
    label = config.teacher.label
    stages: list[Input] = [tokenizer, data, teacher]
    inputs: dict[str, Input] = {"teacher": teacher, "data": data}
    if method == "full":
        judged = [_evaluate(config, inputs, label), *_tasks(config, {"teacher": teacher}, label)]
        return _stages([*stages, *judged, _benchmark(config, {"teacher": teacher}, label)])
    widths = cell_widths(config, teacher_shape)
    scores = Stage(
        name="calibrate",
        version=1,
        config=identity_config(config.calibrate),
        inputs=dict(inputs),
        function="pipeline.stages.importance:run",
        label=label,
    )
    prune = _prune(teacher, scores, widths, f"{label}-{ratio_label(widths)}")
    distill = _distill(config, {**inputs, "student": prune, "scores": scores}, f"{label}-{ratio_label(widths)}")
    judged = [
        _evaluate(config, {**inputs, "student": distill}, distill.label),
        *_tasks(config, {"teacher": teacher, "student": distill}, distill.label),
    ]
    timed: dict[str, Input] = {"teacher": teacher, "student": prune}
    if depends_on_text(_student_reading(config)["refresh"]):
        timed = {"teacher": teacher, "student": distill, "data": inputs["data"]}
    benchmark = _benchmark(config, timed, prune.label if timed["student"] is prune else distill.label)
    return _stages([*stages, scores, prune, distill, *judged, benchmark])


def ratio_label(widths: PrunedWidths) -> str:
    """`0.75`, or `h0.75-i0.5` when the two requested ratios differ."""
    hidden, intermediate = round(widths.hidden_requested, 4), round(widths.intermediate_requested, 4)
    return f"{hidden:g}" if hidden == intermediate else f"h{hidden:g}-i{intermediate:g}"


def cell_widths(config: ExperimentConfig, shape: ModelShape | None = None) -> PrunedWidths:
    """The student's widths in this cell."""
    return resolve_widths(shape or teacher_shape(config), config.prune)


def teacher_shape(config: ExperimentConfig) -> ModelShape:
    """The full model's shape: from the file's `pretrain` or `shape`, a local folder, or the Hub's cache or network."""
    teacher = config.teacher
    if teacher.pretrain is not None:
        vocabulary = teacher.pretrain.tokenizer.vocabulary or TOY_VOCABULARY
        return ModelShape.from_config(
            teacher.pretrain.model_config_dict(vocabulary, config.data.max_length), "pretrain"
        )
    if teacher.shape is not None:
        return ModelShape.from_config(teacher.shape, "teacher.shape")
    file = _config_file(teacher)
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"teacher.model = {teacher.model}: its config.json cannot be read ({error})") from error
    return ModelShape.from_config(values, f"teacher.model = {teacher.model}")


def _config_file(teacher: TeacherConfig) -> Path:
    folder = local_path(str(teacher.model), "teacher.model")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"teacher.model = {folder}: no config.json there; give a transformers model folder")
        return folder / "config.json"
    if teacher.revision is None:
        raise UserError(
            f"teacher.model = {teacher.model}: no such folder; for a Hub id give `teacher.revision`, a commit"
        )
    from huggingface_hub import hf_hub_download  # only when a Hub model's shape is not in the file

    try:
        return Path(hf_hub_download(str(teacher.model), "config.json", revision=teacher.revision))
    except Exception as error:  # any of the Hub client's, urllib's or the file system's errors ends here
        raise UserError(
            f"teacher.model = {teacher.model}: its config.json is neither cached nor reachable "
            f"({type(error).__name__}); give its fields under `teacher.shape`"
        ) from error


def _stages(inputs: Iterable[Input]) -> list[Stage]:
    return list({s.identity: s for s in inputs if isinstance(s, Stage)}.values())


def _files(data: DataConfig) -> External | None:
    if data.path is None:
        return None
    path = local_path(data.path, "data.path")
    if data.source in ("jsonl", "parquet"):
        corpus_files(path, data.source)  # before anything is read: a wrong folder may hold the whole disk
    return External("files", _content(path, "data.path"), None, str(path))


def _folder(given: str | None, field: str) -> External | None:
    if given is None:
        return None
    path = local_path(given, field)
    if not path.is_dir():
        raise UserError(f"{field} = {given}: no such folder; give the one that holds the files")
    return External("files", _content(path, field), None, str(path))


@lru_cache(maxsize=64)
def _content(path: Path, field: str) -> str:
    if path.is_dir() and not any(path.iterdir()):
        raise UserError(f"{field} = {path}: is empty; put the corpus' or the model's files there")
    try:
        return digest_tree(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{field} = {path}: cannot be read ({reason}); give a folder that holds its files itself"
        ) from error


def _tokenizer(config: ExperimentConfig, files: External | None) -> Input:
    """The tokenizer: trained here, or that of the teacher, which then is the same input."""
    teacher = config.teacher
    if teacher.pretrain is not None:
        inputs: dict[str, Input] = {} if files is None else {"files": files}
        settings = {"data": _data_config(config.data), "vocabulary": teacher.pretrain.tokenizer.vocabulary}
        if config.data.source == "toy":
            settings["data"] = {"source": "toy"}
        return Stage("tokenizer", 1, settings, inputs, "pipeline.stages.tokenizer:run", config.data.source)
    folder = local_path(str(teacher.model), "teacher.model")
    if folder.is_dir():
        return External("model", _content(folder, "teacher.model"), None, str(folder))
    if teacher.revision is None:
        raise UserError(
            f"teacher.model = {teacher.model}: no such folder; for a Hub id give `teacher.revision`, a commit"
        )
    fetch = {"model": teacher.model, "revision": teacher.revision, "trust_remote_code": teacher.trust_remote_code}
    return Stage("teacher", 1, fetch, {}, "pipeline.stages.teacher:fetch", teacher.label)


def _data_config(data: DataConfig) -> dict[str, Any]:
    values = identity_config(data)
    if data.source != "toy":
        values.pop("tasks")
    return values


def _data(data: DataConfig, tokenizer: Input, files: External | None) -> Stage:
    inputs = {"tokenizer": tokenizer} if files is None else {"tokenizer": tokenizer, "files": files}
    return Stage("data", 1, _data_config(data), inputs, "pipeline.stages.data:run", data.source)


def _teacher(config: ExperimentConfig, tokenizer: Stage, data: Stage) -> Stage:
    if config.teacher.pretrain is None:
        return tokenizer  # the fetched model brought the tokenizer
    settings = {**identity_config(config.teacher.pretrain), "max_length": config.data.max_length}
    settings.pop("tokenizer")
    inputs: dict[str, Input] = {"tokenizer": tokenizer, "data": data}
    return Stage("teacher", 1, settings, inputs, "pipeline.stages.teacher:run", config.teacher.label)


def _prune(teacher: Input, scores: Stage, widths: PrunedWidths, label: str) -> Stage:
    settings = {
        "hidden": widths.hidden,
        "intermediate": widths.intermediate,
        "requested": [widths.hidden_requested, widths.intermediate_requested],
    }
    return Stage("prune", 1, settings, {"teacher": teacher, "scores": scores}, "pipeline.stages.prune:run", label)


def _distill(config: ExperimentConfig, inputs: dict[str, Input], label: str) -> Stage:
    settings = identity_config(config.distill)
    settings["loss"] = identity_config(config.distill.effective_loss)
    settings["seed"] = config.seed
    label = f"{label}-{config.distill.method}-s{config.seed}"
    return Stage("distill", 1, settings, inputs, "pipeline.stages.distill:run", label)


def _evaluate(config: ExperimentConfig, inputs: dict[str, Input], label: str) -> Stage:
    own = {
        name: value for name, value in identity_config(config.evaluate).items() if name not in TasksConfig.model_fields
    }
    settings = {**own, "system": SYSTEM[config.distill.method], **_student_reading(config)}
    return Stage("evaluate", 1, settings, dict(inputs), "pipeline.stages.evaluate:run", label)


def _tasks(config: ExperimentConfig, inputs: dict[str, Input], label: str) -> list[Stage]:
    """The stage of the tasks, if there are any. Which version of a task is meant is said by lm_eval's own version, and
    for tasks in files by their content."""
    asked = config.evaluate
    if not asked.tasks:
        return []
    folder, data = _folder(asked.task_path, "evaluate.task_path"), _folder(asked.task_data, "evaluate.task_data")
    found = find(asked.tasks, None if folder is None else Path(str(folder.location)))
    settings = {name: value for name, value in identity_config(asked).items() if name in TasksConfig.model_fields}
    settings |= {
        "tasks": sorted(asked.tasks),
        "dtype": asked.dtype,
        "system": SYSTEM[config.distill.method],
        "template": config.data.chat_template if asked.chat_template else None,
        "lm_eval": metadata.version("lm_eval"),
        "shipped": _content(SHIPPED, "evaluate.tasks")
        if any(known.folder == SHIPPED for known in found.values())
        else None,
        **_student_reading(config),
    }
    files = {"task_files": folder, "task_data": data}
    inputs = inputs | {name: source for name, source in files.items() if source is not None}
    return [Stage("tasks", 1, settings, inputs, "pipeline.stages.tasks:run", label)]


def _student_reading(config: ExperimentConfig) -> dict[str, int | str]:
    """How the student decodes: what a method does not have is not part of what it is."""
    method = config.distill.method
    if config.evaluate.weights == "int8" and (
        config.resources.evaluate.gpus_per_worker or config.resources.benchmark.gpus_per_worker
    ):
        raise UserError(
            "evaluate.weights: int8 is read on a CPU, but resources give evaluate or benchmark a GPU; use stored, or "
            "set their gpus_per_worker to 0"
        )
    return {
        "refresh": dial(config.evaluate.refresh) if method == "overfill" else NONE,
        "weights": config.evaluate.weights if method != "full" else "stored",
    }


def _benchmark(config: ExperimentConfig, inputs: dict[str, Input], label: str) -> Stage:
    resources = config.resources.benchmark
    settings = {
        **identity_config(config.benchmark),
        **_student_reading(config),
        "device": resources.accelerator or device_description(resources.gpus_per_worker),
        "threads": resources.threads,
        "versions": {name: version for name, version in libraries().items() if name in LATENCY_LIBRARIES},
    }
    refresh = settings["refresh"]
    if isinstance(refresh, int) and refresh >= config.benchmark.output[0]:
        raise UserError(
            f"evaluate.refresh: {refresh}, but benchmark.output is {config.benchmark.output[0]}, so that the latency of "
            f"no refresh would be measured; set benchmark.output to more than {refresh}"
        )
    return Stage("benchmark", 2, settings, inputs, "pipeline.stages.benchmark:run", label)


def depends_on_text(refresh: int | str) -> bool:
    """Whether the latency depends on what is written: on the student's training, and on the prompts."""
    return isinstance(refresh, str) and refresh != NONE
