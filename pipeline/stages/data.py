"""The data stage: a corpus -> token shards, in an order that never changes.

Ray Data runs the job: the pieces of the corpus are its input, a task reads and tokenises one piece as a stream, and the
driver writes the blocks to disk as they come. `preserve_order` makes them come in the order of the pieces, and the
sample numbers are given here, by counting; so the shards are the same bytes for any number of tasks, CPUs or blocks.

Memory is bounded whatever the size of the corpus: a task holds one batch of rows, blocks are small (4 MiB), Ray Data
holds back tasks whose blocks are not yet consumed, and the driver holds a block or two and one row group. The driver is
the only writer, so the store need not be a folder that all workers see; writing token ids is never the bottleneck.
Local corpus files, on the other hand, must lie where every node sees them.

A task reserves a quarter of a CPU, so that the stage gets on beside training that holds most of a small machine. Ray
Data's tasks are started under the `SPREAD` strategy (its default), which keeps them out of the placement group of a
Ray Tune trial: that one has room for the trial's driver only, and they would wait for ever.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overfill.errors import UserError
from pipeline.config import DataConfig, StageResources
from pipeline.corpus.shards import ShardWriter
from pipeline.corpus.sources import CorpusSource, open_source
from pipeline.corpus.tokenise import UNREADABLE, TokeniseJob, unreadable
from pipeline.corpus.toy import Split
from pipeline.stage import StageRun, Stopped, in_this_process
from pipeline.stages.folders import tokenizer_folder

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

BLOCK_BYTES = 4 * 2**20
MOSTLY_SKIPPED = 0.95
"""Share of skipped rows above which the corpus is taken for misread."""
_HOPELESS = 10_000
"""Rows after which a corpus without a single sample is given up."""


@in_this_process
def run(run: StageRun) -> dict[str, float | int | str]:
    """Tokenise the corpus of `run.stage.config` (a `DataConfig`) with the tokenizer `run.inputs["tokenizer"]`.

    Writes `train/`, `test/` (`pipeline.corpus.shards`) and `summary.json`.

    Raises:
        UserError: the corpus cannot be read, or nearly all of its rows are skipped.
        Stopped: the run was asked to stop; nothing is kept, the stage starts anew.
    """
    config = data_config(run.config, run.inputs.get("files"))
    resources = run.resources if isinstance(run.resources, StageResources) else StageResources(cpus_per_worker=0.25)
    source = open_source(config)
    tokenizer = tokenizer_folder(run.inputs["tokenizer"]).absolute()
    limits: dict[Split, int | None] = {"train": config.train_samples, "test": config.test_samples}
    summary: dict[str, Any] = {}
    for split, limit in limits.items():
        place = run.located("tokenizer", tokenizer)
        job = TokeniseJob(source.split(split), place, config.chat_template, config.max_length)
        summary["end_of_turn"] = job.encoder().end_of_turn  # a bad template is found here, before any task
        summary[split] = _write_split(run, job, source, split, limit, resources)
    (run.staging / "summary.json").write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n")
    return {
        f"data/{split}_{name}": summary[split][name] for split in limits for name in ("samples", "tokens", "skipped")
    }


def data_config(config: Mapping[str, Any], files: Path | None) -> DataConfig:
    """The stage's config, with the place of its files on this machine."""
    return DataConfig.model_validate(dict(config) if files is None else {**config, "path": str(files)})


@dataclass
class SplitCount:
    """What has been seen of a split."""

    rows: int = 0
    """Samples and skipped turns or rows."""
    samples: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """Reason -> the first row that was skipped for it, in words."""

    def add(self, table: pa.Table) -> None:
        """Count the rows of a table of `pipeline.corpus.tokenise.RESULT_SCHEMA`."""
        reasons = [reason for reason in table.column("skipped").to_pylist() if reason is not None]
        self.rows += table.num_rows
        self.samples += table.num_rows - len(reasons)
        self.skipped.update(reasons)
        for reason in set(reasons) - self.examples.keys():
            first = table.column("skipped").to_pylist().index(reason)
            detail, fields = (table.column(name)[first].as_py() for name in ("detail", "fields"))
            self.examples[reason] = f"{detail} (row with fields: {fields})"

    @property
    def mostly_skipped(self) -> bool:
        return self.rows > 0 and self.samples < (1 - MOSTLY_SKIPPED) * self.rows

    def explain(self) -> str:
        """The reasons for skipping, most frequent first, with an example each."""
        reasons = [f"{reason} {count:,}, e.g. {self.examples[reason]}" for reason, count in self.skipped.most_common(3)]
        return "; ".join(reasons)


def _write_split(
    run: StageRun,
    job: TokeniseJob,
    source: CorpusSource,
    split: Split,
    limit: int | None,
    resources: StageResources,
) -> dict[str, Any]:
    count = SplitCount()
    with (
        ShardWriter(run.staging / split) as writer,
        contextlib.closing(_stream(job, resources)) as tables,
    ):
        for table in tables:
            if run.stop_requested():
                raise Stopped(f"data: stopped after {count.samples:,} samples of the {split} split")
            if limit is not None:
                table = first_samples(table, limit - count.samples)
            count.add(table)
            writer.write(table.filter(table.column("skipped").is_null()))
            if limit is not None and count.samples >= limit:
                break
            if count.samples == 0 and count.rows >= _HOPELESS:
                break
        _refuse_misread(source, split, count)
    return {
        "samples": writer.samples,
        "prompt_tokens": writer.prompt_tokens,
        "response_tokens": writer.response_tokens,
        "tokens": writer.prompt_tokens + writer.response_tokens,
        "skipped": sum(count.skipped.values()),
        "skipped_by_reason": dict(sorted(count.skipped.items())),
        "skipped_examples": dict(sorted(count.examples.items())),
    }


def _refuse_misread(source: CorpusSource, split: Split, count: SplitCount) -> None:
    if count.mostly_skipped:
        raise UserError(
            f"{source.name}: {count.rows - count.samples:,} of the first {count.rows:,} rows of the {split} split cannot "
            f"be used: {count.explain()}; see `data.columns` and `data.max_length`"
        )
    if count.samples == 0:
        way_out = "raise `data.held_out`" if source.test is None and split == "test" else "check the files"
        raise UserError(f"{source.name}: the {split} split has no rows; {way_out}")


def first_samples(table: pa.Table, samples: int) -> pa.Table:
    """The rows up to and including the given number of samples; skipped rows do not count."""
    positions: NDArray[np.int64] = table.column("skipped").is_null().to_numpy().nonzero()[0]
    return table if len(positions) <= samples else table.slice(0, int(positions[samples - 1]) + 1 if samples else 0)


def _stream(job: TokeniseJob, resources: StageResources) -> Generator[pa.Table, None, None]:
    """The tables of all pieces, in order. Closing the generator stops the tasks."""
    import ray.data

    pieces = len(job.rows.pieces)
    if not pieces:
        return
    dataset = ray.data.from_items([{"piece": number} for number in range(pieces)], override_num_blocks=pieces)
    context = dataset.context  # a copy of the process' own: nothing else that runs here is changed
    context.execution_options.preserve_order = True
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    tokens = dataset.map_batches(
        partial(_tokenise, job=job),
        batch_size=1,
        num_cpus=resources.cpus_per_worker,
        compute=ray.data.TaskPoolStrategy(size=min(resources.workers, pieces)),
    )
    batches = iter(tokens.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
    with contextlib.closing(batches):  # type: ignore[type-var]
        for table in batches:
            yield _checked(table)


def _checked(table: pa.Table) -> pa.Table:
    """The table, unless it carries a mistake of the user's that a task met, which is raised here."""
    row = table.column("skipped").index(UNREADABLE).as_py()
    if row >= 0:
        raise UserError(table.column("detail")[row].as_py())
    return table


def _tokenise(batch: Any, job: TokeniseJob) -> Iterator[pa.Table]:
    """The task: tokenise the pieces numbered in `batch["piece"]`.

    Ray turns an exception into a traceback in words, so what the user can mend travels as a row instead."""
    for piece in batch["piece"]:
        try:
            yield from job.tables(int(piece))
        except UserError as error:
            yield unreadable(str(error))
            return
