"""Tasks by name as lm_eval's objects, with the experiment's settings applied and their requests built.

Everything random is seeded before each task, and requests are always built for all of a task's documents: few-shot
examples are drawn in the documents' order, so a worker that answers the second half must have drawn those of the first.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory

from overfill.errors import UserError
from pipeline.harness.names import SHIPPED, find, registry

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from lm_eval.tasks._index import Entry

    from pipeline.harness.adapter import ChatText

log = logging.getLogger(__name__)

FILE_FORMATS = ("json", "csv", "parquet", "text")
"""Builders of `datasets` that read files."""


@dataclass(frozen=True)
class TaskSettings:
    """What is asked, as a stage's config has it, and where this machine has its files."""

    tasks: tuple[str, ...]
    samples: int | None = None
    num_fewshot: int | None = None
    chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system_instruction: str | None = None
    seed: int = 1234
    folder: Path | None = None
    """The user's tasks."""
    data: Path | None = None
    """Where data files lie that are not beside their task."""


@dataclass(frozen=True)
class Loaded:
    """Tasks and groups."""

    tasks: dict[str, Task]
    groups: dict[str, Group]
    members: dict[str, tuple[str, ...]]
    """Name as it was asked for -> its tasks."""


def load(settings: TaskSettings) -> Loaded:
    """The tasks, with their data.

    Raises UserError for one whose data or metric cannot be had, and for one that no text model should run."""
    tasks: dict[str, Task] = {}
    groups: dict[str, Group] = {}
    members: dict[str, tuple[str, ...]] = {}
    for name in settings.tasks:
        found = _load_one(name, settings)
        tasks |= found["tasks"]
        groups |= found["groups"]
        members[name] = tuple(found["tasks"])
    for name, task in tasks.items():
        _refuse_unfit(name, task)
        _set_examples(task, settings)
    return Loaded(tasks, groups, members)


def _load_one(name: str, settings: TaskSettings) -> Any:
    _seed(settings.seed)
    manager = _manager(_folders(name, settings), settings.data)
    try:
        return manager.load([name])
    except UserError:
        raise
    except Exception as error:  # each task brings code, data and metrics of its own, and each their own errors
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise UserError(
            f"evaluate.tasks: {name} cannot be loaded ({type(error).__name__}: {line[:200]}); {_way_out(manager, name)}"
        ) from error


def _way_out(manager: TaskManager, name: str) -> str:
    entry = manager.task_index.get(name)
    path = ((entry.cfg if entry is not None else None) or {}).get("dataset_path")
    if path in FILE_FORMATS:
        return f"check {entry.yaml_path if entry is not None else 'its YAML'} against its data"
    source = f"the Hub's {path}" if path else "the Hub"
    return f"its data come from {source}: connect to the network, or give local files by evaluate.task_path"


def _folders(name: str, settings: TaskSettings) -> tuple[Path, ...]:
    """The folders to index: as few as will do, for lm_eval's own take seconds."""
    known = find([name], settings.folder)[name]
    local = tuple(path for path in (SHIPPED, settings.folder) if path is not None)
    if known.folder in local:
        return local
    return (known.folder,) if known.is_task else (registry(), *local)


@lru_cache(maxsize=8)
def _manager(folders: tuple[Path, ...], data: Path | None) -> TaskManager:
    manager = TaskManager(include_path=list(folders), include_defaults=False)
    manager._factory = _Factory(data)
    return manager


class _Factory(TaskFactory):
    """Finds data files beside the YAML that names them, where lm_eval would look in the working folder."""

    def __init__(self, data: Path | None) -> None:
        super().__init__()
        self._data = data

    def _load_full_config(self, entry: Entry, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config = super()._load_full_config(entry, overrides)
        arguments = config.get("dataset_kwargs") or {}
        if entry.yaml_path is None or config.get("dataset_path") not in FILE_FORMATS or "data_files" not in arguments:
            return config
        places = [Path(entry.yaml_path).parent, *([] if self._data is None else [self._data])]
        return config | {
            "dataset_kwargs": arguments | {"data_files": _placed(arguments["data_files"], places, entry.name)}
        }


def _placed(files: Any, places: Sequence[Path], task: str) -> Any:
    """The same structure of file names, each with the first folder that has it."""
    if isinstance(files, dict):
        return {split: _placed(part, places, task) for split, part in files.items()}
    if isinstance(files, list):
        return [_placed(part, places, task) for part in files]
    if Path(files).is_absolute() or "://" in files:
        return files
    found = [place / files for place in places if any(place.glob(files))]
    if not found:
        where = " nor in ".join(map(str, places))
        raise UserError(
            f"evaluate.tasks: {task} reads {files}, which is not in {where}; put it there, or give its folder as "
            "evaluate.task_data"
        )
    return str(found[0].absolute())


def _refuse_unfit(name: str, task: Task) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"evaluate.tasks: {name} runs the code that the model writes, which is not done here; leave it out"
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"evaluate.tasks: {name} needs images or sound; these models read text only; leave it out")


def _set_examples(task: Task, settings: TaskSettings) -> None:
    """The number of examples, by lm-eval's rule: a task that fixes none keeps none."""
    own = task.get_config("num_fewshot")
    if settings.num_fewshot is not None and own != 0:
        task.set_config("num_fewshot", settings.num_fewshot)
    elif own is None:
        task.set_config("num_fewshot", 0)


def build_requests(task: Task, settings: TaskSettings, model: ChatText) -> list[Instance]:
    """The requests of all the task's documents (up to `samples`), always the same; they stay in the task, too."""
    _seed(settings.seed)
    task.set_fewshot_seed(settings.seed)
    try:
        task.build_all_requests(
            limit=settings.samples,
            system_instruction=settings.system_instruction,
            apply_chat_template=settings.chat_template,
            fewshot_as_multiturn=settings.fewshot_as_multiturn,
            chat_template=model.apply_chat_template if settings.chat_template else None,
            tokenizer_name=model.tokenizer_name,
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"evaluate.tasks: {task.task_name}: no prompts can be made of its data ({type(error).__name__}: {error}); "
            "check its YAML against its data, and evaluate.num_fewshot"
        ) from error
    if any(instance.doc_id is None for instance in task.instances):
        raise UserError(
            f"evaluate.tasks: {task.task_name} does not say which document a request belongs to, so it cannot be divided "
            "among workers; leave it out"
        )
    return task.instances


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
