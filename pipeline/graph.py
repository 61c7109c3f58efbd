"""The one place that knows the order of the stages: a cell's config -> its stages, each with its identity.

    tokenizer ──► data ──► teacher ──► calibrate ──► prune ──► distill ──► evaluate, tasks
                                                        └──────────────────► benchmark

Methods differ in what of this they have. The full model alone has neither scores nor a student, an untrained student no
`distill`, and assisted generation is the student of `overfill`, by identity. A released model has the end of the line
alone, on the same texts in its own tokens:

    released ──► held_out ──► evaluate
        └───────────────────► benchmark, beside the full model

A model from the Hub is fetched by a stage into the store, pinned by its revision; one in a local folder is an external
input, pinned by its content. The benchmark reads the untrained student: latency depends on shapes, so
one measurement serves every method and seed of a ratio.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from overfill.config import Method, Training
from overfill.dial import EXACT, NONE, dial
from overfill.errors import UserError
from overfill.shapes import ModelShape, PrunedWidths, resolve_widths
from pipeline.config import DataConfig, ExperimentConfig, ReleasedConfig, TeacherConfig
from pipeline.config_tasks import TasksConfig
from pipeline.corpus.sources import corpus_files
from pipeline.fingerprint import digest_tree, identity_config
from pipeline.harness.names import SHIPPED, find
from pipeline.machine import device_description
from pipeline.paths import local_path
from pipeline.record import libraries
from pipeline.stage import External, Stage

SYSTEM: dict[Method, str] = {
    "full": "full",
    "overfill": "overfill",
    "assisted": "overfill",
    "pruned": "student",
    "lora": "student",
    "untrained": "student",
    "untrained-overfill": "overfill",
    "scratch": "student",
    "released": "student",
}
"""Which system of an evaluation or a benchmark a method is; the released model stands where a student would."""
TRAINED_AS: dict[Method, Training] = {
    "overfill": "overfill",
    "assisted": "overfill",
    "pruned": "pruned",
    "lora": "lora",
    "scratch": "scratch",
}
"""How the student of a method is trained; the methods that are not here train none."""
WITHOUT_STUDENT: tuple[Method, ...] = ("full", "released")
"""Methods that measure no cut model."""
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
    if method == "released":
        return _stages([*stages, *_released(config, {**inputs, "tokenizer": tokenizer}, files)])
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
    student = _distill(config, {**inputs, "student": prune, "scores": scores}, prune.label) or prune
    own = f"{prune.label}-{method}" + ("" if student is prune else f"-s{config.seed}")
    judged = [
        _evaluate(config, {**inputs, "student": student}, own),
        *_tasks(config, {"teacher": teacher, "student": student}, own),
    ]
    timed: dict[str, Input] = {"teacher": teacher, "student": prune}
    if depends_on_text(_student_reading(config)["refresh"]):
        timed = {"teacher": teacher, "student": student, "data": data}
    benchmark = _benchmark(config, timed, own if "data" in timed else prune.label)
    return _stages([*stages, scores, prune, student, *judged, benchmark])


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
    return _given_shape(teacher, "teacher")


def released_shape(config: ExperimentConfig) -> ModelShape:
    """The released model's shape, from where `teacher_shape` finds the full model's."""
    assert config.released is not None  # by validation, where the method asks for it
    return _given_shape(config.released, "released")


def _given_shape(given: TeacherConfig | ReleasedConfig, section: str) -> ModelShape:
    if given.shape is not None:
        return ModelShape.from_config(given.shape, f"{section}.shape")
    file = _config_file(given, section)
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{section}.model = {given.model}: its config.json cannot be read ({error})") from error
    return ModelShape.from_config(values, f"{section}.model = {given.model}")


def _config_file(given: TeacherConfig | ReleasedConfig, section: str) -> Path:
    folder = local_path(str(given.model), f"{section}.model")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{section}.model = {folder}: no config.json there; give a transformers model folder")
        return folder / "config.json"
    revision = _revision(given, section)
    from huggingface_hub import hf_hub_download  # only when a Hub model's shape is not in the file

    try:
        return Path(hf_hub_download(str(given.model), "config.json", revision=revision))
    except Exception as error:  # any of the Hub client's, urllib's or the file system's errors ends here
        raise UserError(
            f"{section}.model = {given.model}: its config.json is neither cached nor reachable "
            f"({type(error).__name__}); give its fields under `{section}.shape`"
        ) from error


def _revision(given: TeacherConfig | ReleasedConfig, section: str) -> str:
    if given.revision is None:
        raise UserError(
            f"{section}.model = {given.model}: no such folder; for a Hub id give `{section}.revision`, a commit"
        )
    return given.revision


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
    return _given_model(teacher, "teacher")


def _given_model(given: TeacherConfig | ReleasedConfig, name: str) -> Input:
    """A model in a folder, or the stage of this name that fetches it from the Hub."""
    folder = local_path(str(given.model), f"{name}.model")
    if folder.is_dir():
        return External("model", _content(folder, f"{name}.model"), None, str(folder))
    trusted = isinstance(given, TeacherConfig) and given.trust_remote_code
    fetch = {"model": given.model, "revision": _revision(given, name), "trust_remote_code": trusted}
    return Stage(name, 1, fetch, {}, "pipeline.stages.teacher:fetch", given.label)


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


def _distill(config: ExperimentConfig, inputs: dict[str, Input], label: str) -> Stage | None:
    """The training of the method's student, None where it has none."""
    training = TRAINED_AS.get(config.distill.method)
    if training is None:
        return None
    settings = identity_config(config.distill) | {"method": training, "seed": config.seed}
    settings["loss"] = identity_config(config.distill.effective_loss)
    settings.pop("lora")
    if training == "lora":
        settings["lora"] = identity_config(config.distill.effective_lora)
    return Stage("distill", 1, settings, inputs, "pipeline.stages.distill:run", f"{label}-{training}-s{config.seed}")


def _released(config: ExperimentConfig, inputs: dict[str, Input], files: External | None) -> list[Input]:
    """The stages of a released model: itself, the held-out texts in its tokens, its accuracy and latency."""
    assert config.released is not None  # by validation
    model, label = _given_model(config.released, "released"), config.released.label
    texts = {**inputs, "released": model} | ({} if files is None else {"files": files})
    texts.pop("teacher")
    settings = {"data": _data_config(config.data), "samples": config.evaluate.samples}
    held_out = Stage("held_out", 1, settings, texts, "pipeline.stages.held_out:run", label)
    judged: dict[str, Input] = {"released": model, "held_out": held_out, "data": inputs["data"]}
    timed: dict[str, Input] = {"teacher": inputs["teacher"], "released": model}
    # On tasks, which bring their own texts, it is judged as a full model is.
    scored = [_evaluate(config, judged, label), *_tasks(config, {"teacher": model}, label)]
    return [model, held_out, *scored, _benchmark(config, timed, label)]


def _evaluate(config: ExperimentConfig, inputs: dict[str, Input], label: str) -> Stage:
    own = {
        name: value for name, value in identity_config(config.evaluate).items() if name not in TasksConfig.model_fields
    }
    settings = {**own, "system": SYSTEM[config.distill.method], **_student_reading(config)}
    return Stage("evaluate", 1, settings, dict(inputs), "pipeline.stages.evaluate:run", label)


def _tasks(config: ExperimentConfig, inputs: dict[str, Input], label: str) -> list[Stage]:
    """The stage of the tasks, if there are any. Which version of a task is meant is said by lm_eval's own version, and
    for tasks in files by their content."""
    asked, released = config.evaluate, config.distill.method == "released"
    if not asked.tasks:
        return []
    folder, data = _folder(asked.task_path, "evaluate.task_path"), _folder(asked.task_data, "evaluate.task_data")
    found = find(asked.tasks, None if folder is None else Path(str(folder.location)))
    settings = {name: value for name, value in identity_config(asked).items() if name in TasksConfig.model_fields}
    settings |= {
        "tasks": sorted(asked.tasks),
        "dtype": asked.dtype,
        "system": "full" if released else SYSTEM[config.distill.method],
        "template": config.data.chat_template if asked.chat_template and not released else None,
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
    alone, resources = SYSTEM[method] != "overfill", config.resources
    judging = [resources.evaluate, resources.benchmark, *([resources.tasks] if config.evaluate.tasks else [])]
    if config.evaluate.weights == "int8" and any(stage.gpus_per_worker for stage in judging):
        raise UserError(
            "evaluate.weights: int8 is read on a CPU, but resources give evaluate, tasks or benchmark a GPU; use stored, or "
            "set their gpus_per_worker to 0"
        )
    return {
        "refresh": NONE if alone else EXACT if method == "assisted" else dial(config.evaluate.refresh),
        "weights": "stored" if method in WITHOUT_STUDENT else config.evaluate.weights,
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
