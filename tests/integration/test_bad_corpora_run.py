"""Corpora that turn out to be damaged when a task reads them, in a whole run: a line per cell, no traceback."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import contents

from pipeline.corpus.tokenizer import character_tokenizer, save_tokenizer

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

EXPERIMENT = """\
name: bad
teacher: {{model: {model}}}
data: {{source: {source}, path: {path}}}
distill: {{method: full}}
sweep: {{axes: {{data: {corpora}}}}}
"""


def corpora(folder: Path) -> list[dict[str, str]]:
    """A file that was not copied to its end, one of other rows than were meant, one with a broken page."""
    rows = [{"prompt": f"sort: {number}", "completion": "ad"} for number in range(2000)]
    packed = gzip.compress("\n".join(map(json.dumps, rows)).encode())
    (folder / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "other.jsonl").write_bytes(b'{"text": "\xff"}\n{"text": 1}\n' * 50)
    pq.write_table(pa.Table.from_pylist(rows), folder / "broken.parquet", compression="snappy")
    content = bytearray((folder / "broken.parquet").read_bytes())
    content[20:400] = bytes(380)
    (folder / "broken.parquet").write_bytes(content)
    files = (("cut.jsonl.gz", "jsonl"), ("other.jsonl", "jsonl"), ("broken.parquet", "parquet"))
    return [{"source": source, "path": str(folder / name)} for name, source in files]


def test_each_cell_says_what_is_wrong_with_its_corpus(tmp_path):
    model, data = tmp_path / "model", tmp_path / "data"
    data.mkdir()
    save_tokenizer(character_tokenizer(), model)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 48, **sizes}))
    found = corpora(data)
    text = EXPERIMENT.format(model=model, corpora=json.dumps(found), **found[0])
    (tmp_path / "bad.yaml").write_text(text)
    before = contents(data)
    command = [sys.executable, "-m", "pipeline.cli", "run", "bad.yaml", "--store", str(tmp_path / "runs")]
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    environment = kept | {"PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "1000"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=500)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    failures = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert len(failures) == 3, done.stderr
    for name, words in (
        ("cut.jsonl.gz", "is the file whole?"),
        ("other.jsonl", "cannot be used: malformed"),
        ("broken.parquet", "cannot be read"),
    ):
        assert any(name in line and words in line for line in failures), f"{name}: {failures}"
    assert contents(data) == before and not list((tmp_path / "runs").glob("data/*/payload"))
