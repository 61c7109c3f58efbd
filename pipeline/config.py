"""An experiment as frozen configs: what is read from one YAML file.

What the author wrote here is identity, except fields marked `identity: False` (where data lies, what hardware is
used): those come from the machine and change no result. Validation raises and never edits.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from overfill.config import Frozen, ImportanceConfig, PruneConfig
from overfill.dial import dial
from overfill.errors import UserError
from pipeline.config_tasks import TasksConfig
from pipeline.config_training import (
    LARGEST,
    NOT_IDENTITY,
    Count,
    DistillConfig,
    DType,
    Name,
    PretrainConfig,
    ReleasedConfig,
    Seed,
    TeacherConfig,
    TokenizerConfig,
    TrainingConfig,
)

__all__ = [
    "DistillConfig",
    "ExperimentConfig",
    "PretrainConfig",
    "ReleasedConfig",
    "TeacherConfig",
    "TokenizerConfig",
    "TrainingConfig",
]

Source = Literal["toy", "jsonl", "parquet", "hf"]
TOY_SAMPLES = 10**8
"""Most samples of a split of the toy corpus: a task makes 10,000 of them, and a driver holds the list of tasks."""
ToyTask = Literal["get", "sort", "reverse", "shift", "add"]


class ColumnsConfig(Frozen):
    """Which fields of a row hold the conversation: `messages`, or `prompt` and `completion`."""

    messages: str | None = None
    """Field with a list of {role, content} turns; every assistant turn becomes a sample."""
    prompt: str | None = None
    """Field with the user's text."""
    completion: str | None = None
    """Field with the assistant's answer."""

    @model_validator(mode="after")
    def _one_form(self) -> ColumnsConfig:
        pair = (self.prompt is not None, self.completion is not None)
        if pair[0] != pair[1] or (self.messages is None) != pair[0]:
            raise ValueError("name either `messages`, or both `prompt` and `completion`")
        return self


class DataConfig(Frozen):
    """The corpus for training, calibration and evaluation."""

    source: Source = "toy"
    """`toy` (generated), `jsonl` or `parquet` (files), `hf` (Hub dataset)."""
    path: Annotated[str | None, Field(json_schema_extra=NOT_IDENTITY)] = None
    """A file, or a folder with train.jsonl and test.jsonl (or .parquet). Its content counts in identities, not its place."""
    dataset: str | None = None
    """Hub dataset id, for `hf`."""
    subset: str | None = None
    """Hub dataset configuration, for `hf`."""
    split: str = "train"
    """Hub split to train on, for `hf`."""
    test_split: str | None = None
    """Hub split to evaluate on, for `hf`; without it `held_out` is taken from `split`."""
    revision: str | None = None
    """Hub commit, for `hf`; needed, so that the corpus cannot change under a finished stage."""
    columns: ColumnsConfig | None = None
    """Fields of a row; without it `messages` or `prompt`/`completion` are expected."""
    chat_template: str | None = None
    """Jinja chat template for a tokenizer that has none."""
    tasks: tuple[ToyTask, ...] = ("get", "sort", "reverse", "shift")
    """Tasks of the toy corpus."""
    train_samples: Count | None = None
    """Training samples (assistant turns) to take from the start of the source; all when empty (20,000 for `toy`)."""
    test_samples: Count = 512
    """Held-out samples (assistant turns) to take at most."""
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of rows held out when the source has no test file or split."""
    max_length: Annotated[int, Field(ge=8, le=LARGEST)] = 2048
    """Longest sample in tokens, prompt and response together; longer ones are counted and left out."""
    seed: Seed = 0
    """Seed of the toy corpus and of the held-out choice."""

    @model_validator(mode="after")
    def _source_has_its_fields(self) -> DataConfig:
        if self.source in ("jsonl", "parquet") and not self.path:
            raise ValueError(f"source `{self.source}` needs `path`: a file, or a folder with train and test files")
        if self.source in ("toy", "hf") and self.path:
            raise ValueError(
                f"source `{self.source}` reads no `path`; leave it out, or give source `jsonl` or `parquet`"
            )
        if self.source == "hf" and not (self.dataset and self.revision):
            raise ValueError("source `hf` needs `dataset` and `revision` (a commit of the dataset's repository)")
        if self.source == "toy" and not self.tasks:
            raise ValueError("source `toy` needs at least one of `tasks`")
        if self.source == "toy" and max(self.train_samples or 0, self.test_samples) > TOY_SAMPLES:
            raise ValueError(
                f"source `toy` has at most {TOY_SAMPLES:,} samples; lower `train_samples` or `test_samples`"
            )
        return self


class EvaluateConfig(TasksConfig):
    """Accuracy: on the held-out part of the corpus with greedy decoding, and on tasks of lm-evaluation-harness."""

    samples: Count = 512
    """Held-out samples."""
    max_new_tokens: Count = 128
    """Longest answer in tokens."""
    answer: str | None = None
    r"""Regular expression whose first group is the answer to compare (`#### (-?[\d,]+)`); empty compares whole texts."""
    dtype: DType = "fp32"
    """Weights and activations."""
    refresh: int | str = "none"
    """How often the full model re-reads what the student writes: none, a number of tokens, entropy>NATS, or exact (it
    verifies every token). For OverFill alone; the latency of the cell is measured with it."""
    weights: Literal["stored", "int8"] = "stored"
    """The student's linear layers: as stored, or rounded to 8 bits (on a CPU). The latency is measured with it."""

    @field_validator("refresh")
    @classmethod
    def _is_a_setting(cls, value: int | str) -> int | str:
        try:
            dial(value)
        except UserError as error:
            raise ValueError(str(error)) from error
        return value

    @field_validator("answer")
    @classmethod
    def _has_a_group(cls, value: str | None) -> str | None:
        import re

        if value is not None:
            try:
                groups = re.compile(value).groups
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"not a regular expression: {error}") from error
            if groups < 1:
                raise ValueError("needs a group in parentheses around the answer")
        return value


class BenchmarkConfig(Frozen):
    """Latency: a grid of batch x prompt x output, systems alternating in one process."""

    batch: tuple[Count, ...] = (1,)
    """Rows decoded at once."""
    prompt: tuple[Count, ...] = (128,)
    """Prompt lengths in tokens."""
    output: tuple[Annotated[int, Field(ge=2)], ...] = (32,)
    """Output lengths in tokens, the first included."""
    repeats: Annotated[int, Field(ge=1)] = 5
    """Measured repetitions, of which medians are taken."""
    warmup: Annotated[int, Field(ge=0)] = 2
    """Repetitions before, not counted."""
    dtype: DType = "fp32"
    """Weights and activations."""
    decoder: Literal["eager", "compiled"] = "eager"
    """How tokens are decoded: compiled is faster and takes a minute or more to compile, per shape."""

    @field_validator("batch", "prompt", "output")
    @classmethod
    def _not_empty(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value:
            raise ValueError("needs at least one value")
        return value


class StageResources(Frozen):
    """What a stage runs on. Never part of an identity: it changes speed, not results."""

    workers: Count = 1
    """Worker processes."""
    cpus_per_worker: Annotated[float, Field(gt=0.0)] = 0.5
    """CPUs that Ray reserves for a worker; half a CPU leaves room for the data stream on a small machine."""
    gpus_per_worker: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs of a worker."""
    accelerator: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]+$")] | None = None
    """Only on nodes with this type of GPU, in Ray's words (L4, A100, H100). A latency is a statement about a device, so
    for `benchmark` the type counts in its identity."""
    threads: Count = 1
    """CPU threads of a worker's tensor operations."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage: 1 shards optimizer states, 2 gradients too, 3 parameters too (and the full model)."""
    micro_batch: Count = 64
    """Sequences that a worker processes at once; the rest of its share is accumulated."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more work."""
    loss_chunks: Count = 1
    """Parts in which the loss over the vocabulary is computed; more parts, less memory."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 200
    """Optimizer steps between step checkpoints; 0 writes one at the end only."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """Newest step checkpoints that are kept."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Retries after a worker died or raised; each starts from the newest step checkpoint."""
    max_preemptions: Annotated[int, Field(ge=0)] = 20
    """Retries after a node was lost or taken away, which count for themselves. Mistakes of the user and too little memory
    are never retried."""


class ResourcesConfig(Frozen):
    """Resources per stage."""

    data: StageResources = StageResources(cpus_per_worker=0.25)
    """Tokenisation; `workers` is the number of concurrent tasks."""
    teacher: StageResources = StageResources()
    """Pre-training of a teacher."""
    calibrate: StageResources = StageResources()
    """Calibration."""
    prune: StageResources = StageResources()
    """Cutting the student."""
    distill: StageResources = StageResources()
    """Training of the student."""
    evaluate: StageResources = StageResources()
    """Accuracy on the held-out part of the corpus."""
    tasks: StageResources = StageResources()
    """Accuracy on tasks; the workers share out the documents."""
    benchmark: StageResources = StageResources()
    """Latency; it runs alone on its device."""
    max_concurrent: Count | None = None
    """Cells that run at once; empty takes as many as the cluster's CPUs and GPUs allow."""
    drivers: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = "head"
    """Where the sweep's driver and its trials run: `head` never leaves the head node; the name of a resource keeps them
    on nodes that have it; `anywhere` is any node, those that may be preempted too."""
    grace_s: Annotated[float, Field(ge=0.0)] = 30.0
    """Seconds that running stages have to save their position after Ctrl-C, SIGTERM or SIGHUP; 0 ends at once."""


class ObjectiveConfig(Frozen):
    """What a sweep looks for."""

    metric: str = "eval/exact_match"
    """Name of a metric that every cell has at its end; `gsm8k_cot_llama/exact_match` for one of `evaluate.tasks`."""
    mode: Literal["max", "min"] = "max"
    """Whether more or less of it is better."""


class AshaConfig(Frozen):
    """Early stopping of distillation by successive halving on the held-out response NLL (arXiv 1810.05934)."""

    grace_steps: Count = 100
    """Optimizer steps that every cell gets."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """Of this many cells one goes on at each rung."""


class RangeConfig(Frozen):
    """A distribution to draw an axis from, with `search: random`."""

    uniform: tuple[float, float] | None = None
    """Lower and upper bound."""
    log_uniform: tuple[float, float] | None = None
    """Lower and upper bound, both above 0, drawn evenly in the logarithm."""

    @model_validator(mode="after")
    def _one_distribution(self) -> RangeConfig:
        chosen = [pair for pair in (self.uniform, self.log_uniform) if pair is not None]
        if len(chosen) != 1 or chosen[0][0] >= chosen[0][1]:
            raise ValueError("give one of `uniform` or `log_uniform`, as [low, high] with low < high")
        if self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError("`log_uniform` needs bounds above 0")
        return self


MOST_CELLS = 100_000
"""Cells of a sweep: a slip in `axes` multiplies, and every cell is expanded before anything runs."""


class SweepConfig(Frozen):
    """Which cells an experiment has: axes over any dotted path of this file."""

    axes: dict[str, tuple[Any, ...] | RangeConfig] = Field(default_factory=dict)
    """Dotted path -> values; a path may name a whole section. `random` search also takes a distribution."""
    seeds: tuple[Seed, ...] = (0,)
    """Seeds of distillation (data order, random starts); every cell is run with each."""
    search: Literal["grid", "random"] = "grid"
    """All combinations, or `samples` random ones."""
    samples: Count = 8
    """Combinations drawn by `random` search."""
    seed: Seed = 0
    """Seed of the random search."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What the sweep looks for."""
    asha: AshaConfig | None = None
    """Stop weak cells early."""

    @model_validator(mode="after")
    def _axes_have_values(self) -> SweepConfig:
        for path, values in self.axes.items():
            if isinstance(values, RangeConfig) and self.search == "grid":
                raise ValueError(f"axis `{path}` is a distribution: `search: grid` needs a list of values")
            if not isinstance(values, RangeConfig) and not values:
                raise ValueError(f"axis `{path}` has no values")
            if path.split(".")[0] in ("sweep", "name", "seed", "resources"):
                raise ValueError(f"axis `{path}`: an axis may not vary `sweep`, `name`, `seed` or `resources`")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError("`seeds` needs at least one seed, each once")
        grid = math.prod(len(values) for values in self.axes.values() if not isinstance(values, RangeConfig))
        cells = len(self.seeds) * (grid if self.search == "grid" else self.samples)
        if cells > MOST_CELLS:
            raise ValueError(
                f"{cells:,} cells; a sweep has at most {MOST_CELLS:,}, so shorten `axes`, `seeds` or `samples`"
            )
        return self


class ExperimentConfig(Frozen):
    """One experiment file."""

    name: Name
    """Name of the sweep: in the store, in MLflow, in `overfill status NAME`."""
    description: str = ""
    """The hypothesis, for people."""
    teacher: TeacherConfig
    """The full model."""
    released: ReleasedConfig | None = None
    """The model of the method `released`."""
    data: DataConfig = DataConfig()
    """The corpus."""
    calibrate: ImportanceConfig = ImportanceConfig()
    """Channel importance."""
    prune: PruneConfig = PruneConfig()
    """Widths of the student."""
    distill: DistillConfig = DistillConfig()
    """Training of the student."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Accuracy."""
    benchmark: BenchmarkConfig = BenchmarkConfig()
    """Latency."""
    sweep: SweepConfig = SweepConfig()
    """Axes; without it the file is one cell."""
    resources: Annotated[ResourcesConfig, Field(json_schema_extra=NOT_IDENTITY)] = ResourcesConfig()
    """What the stages run on."""
    seed: Seed = 0
    """Seed of distillation; `sweep.seeds` overrides it."""

    @model_validator(mode="after")
    def _parts_fit(self) -> ExperimentConfig:
        pretrain = self.teacher.pretrain
        if pretrain is not None and pretrain.tokenizer.vocabulary is None and self.data.source != "toy":
            raise ValueError(
                "`teacher.pretrain.tokenizer.vocabulary` is needed unless `data.source` is `toy`; 1024 suits a small corpus"
            )
        if self.distill.method == "released" and self.released is None:
            raise ValueError("`distill.method` is `released`, but no model is named; add `released: {model, revision}`")
        return self
