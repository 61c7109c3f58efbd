"""`overfill bench`: what it refuses, what it prints, and the figure."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from overfill.named_shapes import SHAPES
from overfill.workload import SYSTEMS
from pipeline.bench import BenchRequest, check, numbers
from pipeline.bench_table import COLUMNS, cells, conditions, milliseconds, notes, print_point
from pipeline.cli import main
from pipeline.roofline import bandwidth, write_roofline

ROOT = Path(__file__).parents[2]
TINY = {
    **SHAPES["llama-3.2-3b"],
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 307,
}
FAST = ["--prompt", "6", "--output", "6", "--repeats", "1", "--warmup", "0", "--dtype", "fp32", "--decoder", "eager"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A named shape that is measured in no time."""
    monkeypatch.setitem(SHAPES, "tiny", TINY)


def row(system: str = "overfill", **changes: Any) -> dict[str, Any]:
    """A row as the command makes it."""
    values: dict[str, Any] = {
        **{"system": system, "batch": 1, "prompt": 128, "output": 32, "dtype": "bf16", "device": "cpu", "threads": 2},
        **{"decoder": "compiled", "repeats": 5, "ttft_s": 1.5, "tpot_s": 0.0456, "tokens_per_s": 12.345},
        **{"ttft_spread_s": [1.4, 1.6], "tpot_spread_s": [0.00412, 0.06], "acceptance_rate": None},
        **{"peak_bytes": 3 * 2**30, "weight_bytes": 2**30, "bytes_per_token": 10**9, "bound_s": 0.04},
        **{
            "bound_share": 0.877,
            "bound_share_spread": [0.843, 0.9],
            "bound_bytes_per_s": 25.1e9,
            "step_bytes_per_s": 22.04e9,
            "compile_s": 0.0,
            "speed_up": 2.345,
            "model": "tiny:0.5",
            "weights": "stored",
            "machine": "EPYC x 2",
        },
    }
    return values | changes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either a student folder or --shape"),
        (["folder", "--shape", "qwen3-4b:0.5"], "give either a student folder or --shape"),
        (["--shape", "qwen9"], "'qwen9' is not known.*llama-3.2-3b"),
        (["--shape", "qwen3-4b:2"], "ratio '2'"),
        (["--shape", "qwen3-4b:0.5", "--full", "x"], "--full"),
        (["--shape", "qwen3-4b:0.5", "--systems", "full,overfil"], "--systems: 'overfil'"),
        (["--shape", "qwen3-4b", "--systems", "exact"], "exact needs a student"),
        (["--shape", "qwen3-4b:0.5", "--systems", "transformers-assisted", "--batch", "2,4"], "one row at a time"),
        (["--shape", "qwen3-4b:0.5", "--systems", "overfill-refresh"], "first refresh at 64"),
        (["--shape", "qwen3-4b:0.5", "--batch", "1,x"], "--batch: 'x'"),
        (["--shape", "qwen3-4b:0.5", "--batch", "1,,2"], "--batch: .* empty place"),
        (["--shape", "qwen3-4b:0.5", "--prompt", "0"], "--prompt: '0'"),
        (["--shape", "qwen3-4b:0.5", "--output", "1"], "--output: '1' .* from 2 up"),
        (["--shape", "qwen3-4b:0.5", "--dtype", "fp16"], "--dtype: 'fp16'.*bf16, fp32"),
        (["--shape", "qwen3-4b:0.5", "--decoder", "fast"], "--decoder: 'fast'.*auto, eager, compiled"),
        (["--shape", "qwen3-4b:0.5", "--device", "tpu"], "--device: 'tpu'"),
        (["--shape", "qwen3-4b:0.5", "--device", "cuda:99"], "no such device"),
        (["--shape", "qwen3-4b:0.5", "--repeats", "0"], "--repeats: 0 is too small"),
        (["--shape", "qwen3-4b:0.5", "--warmup", "-1"], "--warmup: -1 is too small"),
        (["--shape", "qwen3-4b:0.5", "--threads", "0"], "--threads: 0 is too small"),
        (["--shape", "qwen3-4b:0.5", "--draft", "0"], "--draft: 0 is too small"),
        (["--shape", "qwen3-4b:0.5", "--draft", "999"], "--draft: 999 is too many"),
        (["--shape", "qwen3-4b:0.5", "--refresh", "0"], "refresh"),
        (["--shape", "qwen3-4b:0.5", "--refresh", "entropy<2"], "refresh"),
        (["--shape", "qwen3-4b:0.5", "--plot", "roof.doc"], r"--plot: roof.doc.*\.png"),
        (["no-such-folder"], "no-such-folder: no model here"),
    ],
)
def test_a_value_that_makes_no_sense_is_one_line_and_exit_code_2(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.bench.measure", lambda checked: pytest.fail("measured all the same"))
    with pytest.raises(SystemExit) as end:
        main(["bench", *arguments])
    assert end.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("overfill: ") and said.err.count("\n") == 1
    assert re.search(words, said.err)


def test_a_request_is_a_grid_of_systems():
    asked = BenchRequest(shape="llama-3.2-3b:0.45", batch="1,8", output="32,128", refresh="64")
    found = check(asked)
    assert [(p.batch, p.prompt, p.output) for p in found.points] == [
        (1, 128, 32),
        (1, 128, 128),
        (8, 128, 32),
        (8, 128, 128),
    ]
    assert found.systems == list(SYSTEMS) and found.refresh == 64
    assert check(BenchRequest(shape="llama-3.2-3b")).systems == ["full", "transformers-full"]
    assert check(BenchRequest(shape="qwen3-4b:.5", refresh="entropy>2.0")).refresh == "entropy>2"
    assert "overfill-refresh" not in check(BenchRequest(shape="qwen3-4b:.5", refresh="none", output="512")).systems
    assert numbers("--batch", " 1, 8,1") == [1, 8]


def test_json_is_one_object_per_line_and_nothing_else(tiny, capfd, tmp_path):
    figure = tmp_path / "new" / "roof.svg"
    arguments = ["--systems", "full,overfill,transformers-full,transformers-assisted", "--batch", "1,2", "--json"]
    code = exit_code(["bench", "--shape", "tiny:0.5", *FAST, *arguments, "--plot", str(figure)])
    out = capfd.readouterr().out
    assert code == 0 and out.endswith("\n")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(found["batch"], found["system"]) for found in rows] == [
        *((1, name) for name in ("full", "overfill", "transformers-full", "transformers-assisted")),
        *((2, name) for name in ("full", "overfill", "transformers-full")),
    ]
    for found in rows:
        assert set(row()) | {"versions", "commit"} == set(found)
        assert set(found["versions"]) == {"torch", "transformers", "overfill"}
        assert found["model"] == "tiny:0.5" and found["dtype"] == "fp32"
        assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", found["commit"])
        assert found["speed_up"] is not None or not found["tpot_s"]
    assert figure.stat().st_size > 0


def test_what_was_compiled_for_one_batch_size_is_given_back_before_the_next(tiny, monkeypatch, capfd):
    import torch

    from overfill import benchmark, systems

    log: list[Any] = []
    make, grid = systems.make_systems, benchmark.measure_grid
    monkeypatch.setattr(systems, "make_systems", lambda *a, **k: (log.append("make"), make(*a, **k))[1])
    monkeypatch.setattr(
        benchmark, "measure_grid", lambda s, points, *a: (log.append([p.batch for p in points]), grid(s, points, *a))[1]
    )
    monkeypatch.setattr(torch.compiler, "reset", lambda: log.append("reset"))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: log.append(threads))
    arguments = ["bench", "--shape", "tiny", *FAST, "--batch", "1,2", "--output", "2,3", "--systems", "full"]
    assert exit_code([*arguments, "--threads", "7"]) == 0
    assert log == [7, "make", [1, 1], "reset", "make", [2, 2], "reset"]


def test_people_get_a_table_per_point(tiny, capfd):
    arguments = ["--systems", "student,transformers-assisted", "--batch", "1,2"]
    assert exit_code(["bench", "--shape", "tiny:0.5", *FAST, *arguments]) == 0
    out = capfd.readouterr().out
    assert "batch 1, prompt 6, output 6" in out and "batch 2, prompt 6, output 6" in out
    assert len(re.findall(r"^student ", out, re.MULTILINE)) == 2
    assert out.count("transformers-assisted left out: transformers assists one row at a time") == 1
    assert out.count("tiny:0.5, fp32, cpu (") == 1 and "decoder: eager" in out


def test_a_student_folder_finds_its_full_model_in_the_manifest(tmp_path, capfd):
    import torch

    from overfill.checkpoint import FullModel, Manifest, save_student, weights_digest
    from overfill.random_models import random_model, related_student
    from overfill.shapes import ModelShape, widths_of

    full = random_model(TINY, torch.float32)
    full.save_pretrained(tmp_path / "full")
    widths = widths_of(ModelShape.from_config(TINY), 48, 96, 0.5, 0.5)
    source = FullModel(id=str(tmp_path / "full"), digest=weights_digest(tmp_path / "full"))
    save_student(related_student(full, widths), tmp_path / "student", Manifest.of(source, "llama", widths, None))
    command = ["bench", str(tmp_path / "student"), *FAST, "--json", "--systems", "overfill,exact", "--draft", "2"]
    capfd.readouterr()  # save_pretrained loads DeepSpeed where accelerate is installed, which greets on standard output
    assert exit_code(command) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [found["system"] for found in rows] == ["overfill", "exact"]
    assert rows[1]["acceptance_rate"] is not None and rows[0]["acceptance_rate"] is None
    (tmp_path / "full").rename(tmp_path / "moved")
    assert exit_code(command) == 2
    assert exit_code([*command, "--full", str(tmp_path / "moved")]) == 0


def test_help_and_bad_values_need_no_torch():
    program = (
        "import sys\nfrom pipeline.cli import main\n"
        "for arguments in ('--help', '--shape nope', '--shape qwen3-4b --batch x'):\n"
        "    try: main(['bench', *arguments.split()])\n"
        "    except SystemExit: pass\n"
        "loaded = [m for m in ('torch', 'ray', 'transformers', 'matplotlib') if m in sys.modules]\n"
        "assert not loaded, loaded"
    )
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "STUDENT_FOLDER" in out.stdout and "--systems" in out.stdout


def test_cells_of_the_table():
    assert len(cells(row())) == len(COLUMNS)
    assert cells(row()) == (
        "overfill",
        "1500 ms",
        "45.6 ms [4.12, 60.0]",
        "12.3",
        "3 GiB",
        "88% [84, 90]",
        "2.35x",
    )
    bare = row(peak_bytes=None, bound_share=None, speed_up=None)
    assert cells(bare)[4:] == ("–", "–", "–")
    assert [milliseconds(value) for value in (0.001234, 0.01234, 1.2345)] == ["1.23 ms", "12.3 ms", "1234 ms"]


def test_the_table_fits_a_terminal(capsys):
    print_point([row("transformers-assisted")], ["transformers-assisted"], None, Console(width=100))
    shown = capsys.readouterr().out
    assert "45.6 ms [4.12, 60.0]" in shown and "2.35x" in shown


def test_notes_say_what_is_not_in_the_table():
    from overfill.workload import Point

    point = Point(1, 128, 32, "bf16")
    rows = [row(compile_s=12.34), row("exact", acceptance_rate=0.812), row("transformers-full", decoder="eager")]
    text = "\n".join(notes(rows, ["overfill", "overfill-refresh", "exact"], point, 64))
    assert "exact: accepted 81% of the drafts" in text
    assert "compiled first: overfill 12.3 s" in text
    assert "overfill-refresh left out: 32 tokens end before the first refresh at 64" in text
    assert notes([row()], ["overfill"], point, 64) == ["GB/s of the steps, of reading alone: overfill 22 of 25.1"]
    assert notes([row(bound_share=None)], ["overfill"], point, 64) == []


def test_conditions_are_those_of_our_own_decoders():
    text = "\n".join(conditions([row(), row("transformers-full", decoder="eager")]))
    assert "tiny:0.5, bf16, cpu (EPYC x 2), threads: 2, decoder: compiled\n" in text
    assert "medians of 5 repetitions" in text and "peak: without copies" in text
    plain = "\n".join(conditions([row("transformers-full", decoder="eager")]))
    assert "decoder" not in plain


def test_the_roofline_names_what_was_measured_and_two_runs_agree_to_the_byte(tmp_path):
    rows = [
        row("full", bytes_per_token=4 * 10**9, bound_bytes_per_s=2e10, tpot_s=0.4),
        row("overfill", bytes_per_token=10**9, bound_bytes_per_s=2e10, tpot_s=0.08),
        row("overfill", bytes_per_token=2 * 10**9, bound_bytes_per_s=4e10, tpot_s=0.08, batch=8),
        row("exact", bytes_per_token=None, bound_bytes_per_s=None, tpot_s=0.1),
        row("transformers-assisted", bytes_per_token=None, bound_bytes_per_s=None, tpot_s=0.0),
    ]
    first, second = (write_roofline(rows, tmp_path / name / "roof.svg") for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    texts = re.findall(r">([^<>]+)</text>", first.read_text())
    assert {"full", "overfill", "exact", "memory, 20 GB/s", "1 x 128 + 32 tokens", "8 x 128 + 32 tokens"} <= set(texts)
    assert "transformers-assisted" not in texts, "it has no time per token"
    assert [text for text in texts if text.endswith(" GB")] == ["1 GB", "2 GB", "5 GB"], "labels with room between them"
    assert bandwidth(rows) == 2e10
    assert bandwidth(rows[3:]) is None
    assert write_roofline(rows[3:], tmp_path / "levels.png").stat().st_size > 0


def exit_code(arguments: list[str]) -> int:
    """What the command line ends with."""
    try:
        main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0
