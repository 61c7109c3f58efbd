"""What training costs, read from the records of finished runs: speed, padding, memory, and time that is not compute.

    python benchmarks/training.py STORE [STORE ...]

Run a sweep first (`make quickstart` for toy lengths, sweeps/gsm8k.yaml for those of GSM8K), on a machine that does
nothing else. Per method and teacher, medians over the cells: useful (not padding) tokens per second, the share of
padding in what the models read, milliseconds per step, the worker's peak memory, and of the stage's wall time the
seconds outside the training loop (worker start, imports, models, saving). For whole cells: wall time of all the cell's
own stages minus time in loops. A table for people, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pipeline.corpus.order import BatchOrder, sequences_per_batch
from pipeline.corpus.shards import TokenShards
from pipeline.machine import cpu_description
from pipeline.record import source_commit
from pipeline.store import Store

PADDING_STEPS = 200
COLUMNS = ("corpus", "of", "method", "cells", "tokens_per_s", "padding", "step_ms", "peak_mb", "loop_s", "other_s")


def measure(root: Path) -> list[dict[str, Any]]:
    """One row per kind of training in a store."""
    store = Store(root)
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for stage in ("teacher", "distill"):
        for path in sorted(root.glob(f"{stage}/*/payload/record.json")):
            record = json.loads(path.read_text())
            if record["attempt"] == 1 and "train/seconds" in record["metrics"]:
                described = json.loads((path.parents[1] / "identity.json").read_text())
                groups[_key(store, record, described)].append(_row(store, record, described))
    return [_medians(key, rows) for key, rows in groups.items()]


def _key(store: Store, record: dict[str, Any], described: dict[str, Any]) -> tuple[str, str, str]:
    corpus = store.record(record["inputs"]["data"])
    teacher = record["inputs"].get("teacher")
    label = record["label"] if teacher is None else store.record(teacher).label
    return corpus.label, label, _config(described).get("method", "pretrain")


def _config(described: dict[str, Any]) -> dict[str, Any]:
    return described["description"]["config"]


def _row(store: Store, record: dict[str, Any], described: dict[str, Any]) -> dict[str, Any]:
    metrics, config = record["metrics"], _config(described)
    shards = TokenShards.open(store.find(record["inputs"]["data"], "data") / "payload" / "train")
    seconds, seed = metrics["train/seconds"], int(config.get("seed", 0))
    return {
        "tokens_per_s": metrics["train/tokens"] / seconds,
        "padding": padding_share(shards, config["batch_tokens"], seed, metrics["train/steps"]),
        "step_ms": 1000 * seconds / metrics["train/steps"],
        "peak_mb": metrics.get("train/peak_bytes", float("nan")) / 2**20,
        "loop_s": seconds,
        "other_s": record["seconds"] - seconds,
    }


def padding_share(shards: TokenShards, batch_tokens: int, seed: int, steps: int) -> float:
    """Share of positions that hold padding, prompts and responses padded apart, over the first steps of a run."""
    sequences = sequences_per_batch(batch_tokens, shards.lengths)
    order = BatchOrder(shards.prompt_lengths, shards.response_lengths, sequences, seed)
    real = read = 0
    for step in range(min(steps, PADDING_STEPS)):
        samples = order.batch(step)
        prompts, responses = shards.prompt_lengths[samples], shards.response_lengths[samples]
        real += int(prompts.sum() + responses.sum())
        read += len(samples) * int(prompts.max() + responses.max())
    return 1 - real / read


def _medians(key: tuple[str, str, str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    values = {name: median(row[name] for row in rows) for name in rows[0]}
    return dict(zip(COLUMNS[:3], key, strict=True)) | {"cells": len(rows)} | values


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    cells = [[_text(row[name]) for name in COLUMNS] for row in rows]
    widths = np.max([[len(text) for text in line] for line in [list(COLUMNS), *cells]], axis=0)
    for line in [list(COLUMNS), *cells]:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1%}" if 0 < value < 1 else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="+", type=Path, help="folders of finished runs")
    rows = [row for store in parser.parse_args().stores for row in measure(store.absolute())]
    show(rows)
    print(json.dumps({"benchmark": "training", "device": cpu_description(), "commit": source_commit(), "rows": rows}))


if __name__ == "__main__":
    main()
