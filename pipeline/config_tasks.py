"""Config of evaluation on tasks of lm-evaluation-harness; its fields stand in the section `evaluate`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from overfill.config import Frozen
from pipeline.config_training import NOT_IDENTITY, Count


class TasksConfig(Frozen):
    """Tasks of lm-evaluation-harness, and how they are put to the models."""

    tasks: tuple[str, ...] = ()
    """Names of lm-eval's registry (`gsm8k_cot_llama`, `ifeval`), of `task_path`, or `toy_get`, `toy_sort`, `toy_reverse`,
    `toy_shift`, `toy_add`, `toy` and `gsm8k_files`, which come with this project and need no network."""
    task_path: Annotated[str | None, Field(json_schema_extra=NOT_IDENTITY)] = None
    """Folder with tasks of your own, lm-eval's YAML; names there come before the registry's. Its content counts in
    identities, not its place. Data files are looked for beside the YAML."""
    task_data: Annotated[str | None, Field(json_schema_extra=NOT_IDENTITY)] = None
    """Folder for data files that do not lie beside their task's YAML: the train.jsonl and test.jsonl of `gsm8k_files`.
    Its content counts, not its place."""
    task_samples: Count | None = None
    """Documents of each task, from the first on; all when empty."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples in the prompt; empty takes each task's own number. A task that fixes 0 keeps it, as in lm-eval."""
    chat_template: bool = True
    """Put prompts into the tokenizer's chat template."""
    fewshot_as_multiturn: bool = True
    """Examples as turns of the conversation rather than in one user turn; with `chat_template`."""
    system_instruction: str | None = None
    """System text before everything."""
    task_max_new_tokens: Count = 256
    """Longest answer in tokens where a task does not say."""
    task_seed: int = 1234
    """Seed of the choice of examples and of sampled answers."""

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in value if value.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]!r} is named twice; name each task once")
        return value
