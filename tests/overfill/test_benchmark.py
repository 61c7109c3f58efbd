"""The instrument: one clock for every system, systems in turn, rows that say what was measured.

What the clock says is tested against systems whose times are known, on a clock that only they move.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from pairs import full_model, student_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from overfill import benchmark
from overfill.benchmark import (
    PAIRED,
    TokenClock,
    measure_grid,
    measure_point,
    measure_systems,
    pair_with_reads,
    time_generation,
)
from overfill.bound import MemoryReader, PairingClock
from overfill.checkpoint import FullModel, Manifest, save_student
from overfill.errors import UserError
from overfill.memory import peak_growth
from overfill.shapes import ModelShape, widths_of
from overfill.systems import System, make_systems
from overfill.workload import SYSTEMS, Point, grid, step_bytes

CPU = torch.device("cpu")
POINT = Point(batch=2, prompt=6, output=9, dtype="fp32")
FIELDS = {
    *("system", "batch", "prompt", "output", "dtype", "device", "threads", "decoder", "repeats"),
    *("ttft_s", "tpot_s", "tokens_per_s", "ttft_spread_s", "tpot_spread_s", "peak_bytes", "weight_bytes"),
    *("bytes_per_token", "bound_s", "bound_share", "bound_share_spread", "bound_bytes_per_s", "step_bytes_per_s"),
    *("speed_up", "compile_s", "acceptance_rate"),
}


class FakeTime:
    """A clock that stands still unless moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(benchmark.time, "perf_counter", fake.perf_counter)
    return fake


class FakeReader:
    """Reads a byte in a microsecond, and tells what it was asked for."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def seconds(self, size: float) -> float:
        self.log.append(f"read {size}")
        return size * 1e-6


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    return full_model("llama"), student_model("llama")


def fake(
    name: str, model: PreTrainedModel, generate: Callable, size: int | None = 1000, fits: Callable = lambda point: None
) -> System:
    return System(name, generate, (model,), lambda point: size, fits)


def ticking(
    clock: FakeTime, first: list[float], later: float, log: list[str] | None = None, name: str = ""
) -> Callable:
    """A system whose runs take `first[run]` to the first token and `later` for each after it."""
    runs = iter(first)

    def generate(ids: Tensor, output: int, streamer: TokenClock | None) -> None:
        if log is not None:
            log.append(name)
        if streamer is None:
            return
        streamer.put(ids)
        clock.now += next(runs)
        streamer.put(torch.zeros(len(ids), dtype=torch.long))
        for _ in range(output - 1):
            clock.now += later
            streamer.put(torch.zeros(len(ids), dtype=torch.long))
        streamer.end()
        clock.now += 1000.0  # what comes after the last token is not the answer's time

    return generate


def test_time_to_first_token_and_per_token_are_told_apart(clock, models):
    system = fake("full", models[0], ticking(clock, [2.0], 0.5))
    timing = time_generation(system, torch.ones(2, 6, dtype=torch.long), 9)
    assert (timing.ttft, timing.tpot, timing.total) == (2.0, 0.5, 6.0)


def test_several_tokens_at_once_count_as_many(clock, models):
    def generate(ids: Tensor, output: int, streamer: TokenClock) -> None:
        streamer.put(ids)
        for seconds, tokens in ((3.0, 2), (1.0, 1), (2.0, 5)):
            clock.now += seconds
            streamer.put(torch.zeros(1, tokens, dtype=torch.long))

    timing = time_generation(fake("exact", models[0], generate), torch.ones(1, 6, dtype=torch.long), 8)
    assert (timing.ttft, timing.tpot, timing.total) == (3.0, 3.0 / 6, 6.0)


def test_all_tokens_at_once_leave_no_time_per_token(clock, models):
    def generate(ids: Tensor, output: int, streamer: TokenClock) -> None:
        streamer.put(ids)
        clock.now += 3.0
        streamer.put(torch.zeros(1, 8, dtype=torch.long))

    system = fake("exact", models[0], lambda i, o, s: None if s is None else generate(i, o, s))
    assert time_generation(system, torch.ones(1, 6, dtype=torch.long), 8).tpot == 0.0
    (row,) = measure_point([system], Point(1, 6, 8, "fp32"), 1, 0, FakeReader([]))
    assert row["bound_share"] is None and row["speed_up"] is None and row["ttft_s"] == 3.0


@pytest.mark.parametrize("output", [8, 10])
def test_an_answer_of_another_length_is_no_measurement(clock, models, output):
    wrong = ticking(clock, [2.0], 0.5)
    system = fake("full", models[0], lambda ids, _, streamer: wrong(ids, 9, streamer))
    with pytest.raises(RuntimeError, match=f"9 tokens came out where {output}"):
        time_generation(system, torch.ones(2, 6, dtype=torch.long), output)


def test_systems_take_turns_and_memory_is_read_between_the_tokens_of_another_generation(clock, models):
    log: list[str] = []
    a = fake("full", models[0], ticking(clock, [1.0] * 9, 0.1, log, "a"), size=700)
    b = fake("student", models[1], ticking(clock, [1.0] * 9, 0.1, log, "b"), size=300)
    c = fake("exact", models[1], ticking(clock, [1.0] * 9, 0.1, log, "c"), size=None)
    measure_point([a, b, c], Point(2, 6, 3, "fp32"), 2, 1, FakeReader(log))
    measured = ["a", "a", *["read 700"] * 3, "b", "b", *["read 300"] * 3, "c"]
    assert log == ["a", "b", "c", *measured, *measured, "a", "b", "c"], "the last three measure memory"


def test_rows_are_medians_of_what_comes_after_the_warm_up(clock, models):
    full = fake("full", models[0], ticking(clock, [99.0, 1.0, 7.0, 5.0, 7.0, 2.0, 7.0], 0.5), size=250_000)
    baseline = fake("transformers-full", models[0], ticking(clock, [9.0] * 4, 0.75), size=None)
    row, other = measure_point([full, baseline], POINT, 3, 1, FakeReader([]))
    assert row["ttft_s"] == 2.0 and row["ttft_spread_s"] == [1.0, 5.0]
    assert row["tpot_s"] == 0.5 and row["tpot_spread_s"] == [0.5, 0.5]
    assert row["tokens_per_s"] == 2 * 9 / (2.0 + 8 * 0.5)
    assert row["bytes_per_token"] == 250_000 and row["bound_s"] == 0.25
    assert row["bound_share"] == 0.5 and row["bound_share_spread"] == [0.5, 0.5]
    assert row["bound_bytes_per_s"] == 1e6 and row["step_bytes_per_s"] == 5e5
    assert row["speed_up"] == 1.5 and other["speed_up"] == 1.0
    assert other["bytes_per_token"] is None and other["bound_s"] is None and other["bound_share"] is None
    assert row["weight_bytes"] == sum(p.numel() * 4 for p in models[0].parameters())


def test_a_machine_that_changes_its_speed_leaves_the_share_of_the_bound_as_it_is(clock, models):
    speeds = [1.0, 1.0, 0.5, 0.5, 2.0, 2.0]

    def read() -> float:
        clock.now += 100.0  # what is read is not a step's time
        return 0.3 / speeds[len(pairs.reads)]

    pairs = PairingClock(CPU, read)
    pairs.put(torch.zeros(1, 6))
    clock.now += 7.0  # the prompt's
    pairs.put(torch.zeros(1))
    for before, after in pairwise(speeds):
        clock.now += 0.4 * (1 / before + 1 / after) / 2
        pairs.put(torch.zeros(1))
    step, beside = pairs.means()
    assert beside / step == pytest.approx(0.75)
    assert step == pytest.approx(0.4 * (1 + 1.5 + 2 + 1.25 + 0.5) / 5)


def test_a_refresh_is_paired_over_the_whole_output_and_others_over_a_few_tokens(clock, models):
    log: list[str] = []
    point = Point(1, 6, 30, "fp32")
    for name, reads in (("overfill-refresh", 30), ("overfill", PAIRED)):
        system = fake(name, models[0], ticking(clock, [1.0] * 9, 0.1), size=8)
        log.clear()
        assert pair_with_reads(system, torch.ones(1, 6, dtype=torch.long), point, FakeReader(log)).size == 8
        assert len(log) == reads


def test_without_the_baseline_there_is_no_speed_up(clock, models):
    (row,) = measure_point([fake("full", models[0], ticking(clock, [1.0] * 2, 0.5))], POINT, 1, 0, FakeReader([]))
    assert row["speed_up"] is None


class Compiling:
    """An engine that compiles for three seconds in its first run."""

    decoder, compile_seconds = "compiled", 0.0


def test_compiling_is_counted_for_the_system_that_it_happened_in(clock, models):
    engine = Compiling()
    inner = ticking(clock, [1.0] * 9, 0.1)

    def generate(ids: Tensor, output: int, streamer: TokenClock | None) -> None:
        engine.compile_seconds = 3.0
        inner(ids, output, streamer)

    first = System("overfill", generate, models, lambda p: None, lambda p: None, engine)
    second = System("exact", generate, models, lambda p: None, lambda p: None, engine)
    plain = fake("transformers-full", models[0], ticking(clock, [1.0] * 9, 0.1))
    rows = measure_point([first, second, plain], POINT, 2, 1, FakeReader([]))
    assert [row["compile_s"] for row in rows] == [3.0, 0.0, 0.0]
    assert [row["decoder"] for row in rows] == ["compiled", "compiled", "eager"]
    assert measure_point([first], POINT, 1, 0, FakeReader([]))[0]["compile_s"] == 0.0, "the shape is known by now"


def test_a_system_sits_out_where_it_does_not_fit(clock, models, monkeypatch):
    monkeypatch.setattr(benchmark, "MemoryReader", lambda size, device: FakeReader([]))
    picky = fake(
        "transformers-assisted",
        models[0],
        ticking(clock, [1.0] * 9, 0.1),
        None,
        lambda p: "no" if p.batch > 1 else None,
    )
    always = fake("full", models[0], ticking(clock, [1.0] * 9, 0.1))
    found = list(measure_grid([always, picky], grid([1, 2], [6], [9], "fp32"), 1, 0))
    assert [[row["system"] for row in rows] for rows in found] == [["full", "transformers-assisted"], ["full"]]
    found = list(measure_grid([picky], grid([2, 1], [6], [9], "fp32"), 1, 0))
    assert [[row["batch"] for row in rows] for rows in found] == [[1]]


@pytest.fixture(scope="module")
def measured(models) -> Iterator[list[list[dict]]]:
    """Every system on real models: one row, and two."""
    systems = make_systems(*models, SYSTEMS, refresh=4, draft=3)
    return list(measure_grid(systems, grid([1, 2], [6], [9], "fp32"), 2, 1))


def test_every_system_gives_a_row_with_every_field(measured, models):
    alone, batched = measured
    assert [row["system"] for row in alone] == list(SYSTEMS)
    assert [row["system"] for row in batched] == [name for name in SYSTEMS if name != "transformers-assisted"]
    shapes = [ModelShape.from_config(model.config.to_dict()) for model in models]
    both = sum(shape.weight_bytes("fp32") for shape in shapes)
    for row in [*alone, *batched]:
        assert set(row) == FIELDS
        json.dumps(row, allow_nan=False)
        low, high = row["tpot_spread_s"]
        assert 0 < low <= row["tpot_s"] <= high
        assert row["ttft_s"] > 0 and row["speed_up"] > 0
        point = Point(row["batch"], row["prompt"], row["output"], row["dtype"])
        assert row["bytes_per_token"] == step_bytes(row["system"], *shapes, point, 4)
        if row["bytes_per_token"] is not None:
            low, high = row["bound_share_spread"]
            assert 0 < low <= row["bound_share"] <= high
            assert row["bound_s"] > 0 and row["bound_bytes_per_s"] > 0 and row["step_bytes_per_s"] > 0
        weights = {"full": shapes[0].weight_bytes("fp32"), "student": shapes[1].weight_bytes("fp32")}
        assert row["weight_bytes"] == weights.get(row["system"].removeprefix("transformers-"), both)
        assert (row["acceptance_rate"] is not None) == (row["system"] == "exact")
        assert row["decoder"] == "eager" and row["compile_s"] == 0.0


@pytest.mark.parametrize("batch", [1, 3])
def test_systems_that_promise_the_same_text_write_it(models, batch):
    full, student = models
    full.generation_config.eos_token_id = 2
    systems = {system.name: system for system in make_systems(full, student, SYSTEMS, refresh=4)}
    ids = torch.randint(3, 41, (batch, 6), generator=torch.Generator().manual_seed(4))
    texts = {name: s.generate(ids, 9, None) for name, s in systems.items() if not s.unfit(Point(batch, 6, 9, "fp32"))}
    texts = {name: getattr(text, "sequences", text) for name, text in texts.items()}
    for name, text in texts.items():
        assert text.shape == (batch, 15), f"{name} ends early"
    for name in {"exact", "full", "transformers-assisted"} & set(texts):
        assert torch.equal(texts[name], texts["transformers-full"]), name
    assert torch.equal(texts["student"], texts["transformers-student"])
    assert torch.equal(texts["overfill"][:, 6], texts["full"][:, 6]), "the full model writes the first token"
    assert not torch.equal(texts["overfill"], texts["full"])


def test_our_systems_are_one_loop_asked_differently(models, monkeypatch):
    asked: list[tuple] = []
    monkeypatch.setattr("overfill.systems.generate", lambda engine, ids, **options: asked.append((engine, options)))
    own = ["full", "student", "overfill", "overfill-refresh", "exact"]
    full, student = models
    for system in make_systems(full, student, own, refresh=4, draft=3):
        system.generate(torch.ones(1, 6, dtype=torch.long), 9, None)
    pairs = [(engine.prefill_model, engine.decode_model) for engine, _ in asked]
    assert pairs == [(full, full), (student, student), *[(full, student)] * 3]
    assert [options.get("refresh") for _, options in asked] == [None, None, None, 4, None]
    assert [options.get("exact", False) for _, options in asked] == [False] * 4 + [True]
    assert [options.get("draft_tokens") for _, options in asked] == [None] * 4 + [3]
    assert all(options["max_new_tokens"] == 9 and not options["do_sample"] for _, options in asked)


def test_an_end_token_that_the_models_would_write_does_not_end_them():
    full, student = full_model("llama"), student_model("llama")
    ids = torch.randint(3, 41, (1, 6), generator=torch.Generator().manual_seed(4))
    first = make_systems(full, student, ["transformers-full"])[0].generate(ids, 4, None)
    for model in (full, student):
        model.generation_config.eos_token_id = first[0, 6:].tolist()
    for system in make_systems(full, student, SYSTEMS, refresh=4):
        assert time_generation(system, ids, 9).ttft > 0, system.name  # or it raises


def test_a_fixed_draft_is_drafted_whatever_the_student_thinks_of_it(models, monkeypatch):
    (assisted,) = make_systems(*models, ["transformers-assisted"], draft=3)
    asked = []
    generate = models[1].generate
    monkeypatch.setattr(
        models[1], "generate", lambda *a, **k: (asked.append(k["max_new_tokens"]), generate(*a, **k))[1]
    )
    assisted.generate(torch.randint(3, 41, (1, 6)), 9, None)
    assert asked[0] == 3 and models[1].generation_config.assistant_confidence_threshold == 0.0


def test_one_reader_per_model_serves_every_engine(models):
    systems = {system.name: system for system in make_systems(*models, SYSTEMS, refresh=4)}
    two, full, student = (systems[name].engine for name in ("overfill", "full", "student"))
    assert systems["exact"].engine is two is systems["overfill-refresh"].engine
    assert two.full is full.full is full.student
    assert two.student is student.full is student.student
    assert two.full.model is models[0] and two.student.model is models[1]


def test_a_grid_beyond_the_models_positions_is_refused_before_anything_runs(models):
    system = fake("full", models[0], lambda *args: pytest.fail("ran"))
    with pytest.raises(UserError, match="70 tokens, the models have 64"):
        next(measure_grid([system], grid([1], [6, 60], [10], "fp32"), 1, 0))


def test_the_stages_measurement_reads_folders(models, tmp_path):
    full, student = models
    full.save_pretrained(tmp_path / "full")
    shape = ModelShape.from_config(full.config.to_dict())
    widths = widths_of(shape, student.config.hidden_size, student.config.intermediate_size, 0.5, 0.4)
    manifest = Manifest.of(FullModel(id="full", digest="0"), "llama", widths, None)
    save_student(student, tmp_path / "student", manifest)
    options = {"batches": [1], "prompts": [6], "outputs": [4], "repeats": 1, "warmup": 0}
    rows = measure_systems(tmp_path / "full", tmp_path / "student", **options, dtype="bf16", device="cpu")
    assert [row["system"] for row in rows] == ["full", "student", "overfill"]
    assert all(set(row) == FIELDS and row["dtype"] == "bf16" for row in rows)
    alone = measure_systems(tmp_path / "full", None, **options, dtype="fp32", device="cpu")
    assert [row["system"] for row in alone] == ["full"]


def test_a_released_model_is_timed_alone_beside_the_full_one_with_its_own_shape(models, tmp_path):
    full, _ = models
    full.save_pretrained(tmp_path / "full")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    other = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50, max_position_embeddings=20))
    other.save_pretrained(tmp_path / "other")
    options = {"batches": [1], "prompts": [6], "repeats": 1, "warmup": 0, "dtype": "fp32", "device": "cpu"}
    given = tmp_path / "full", None
    theirs, own = measure_systems(*given, **options, outputs=[4], released=tmp_path / "other")
    assert (theirs["system"], own["system"]) == ("full", "student")
    shape = ModelShape.from_config(other.config.to_dict())
    assert own["bytes_per_token"] == shape.decode_bytes("fp32", 6 + 2)
    assert own["weight_bytes"] == 4 * shape.parameters()
    with pytest.raises(UserError, match="prompt \\+ output is 21 tokens, the models have 20 positions"):
        measure_systems(*given, **options, outputs=[15], released=tmp_path / "other")


def test_a_reader_scales_what_is_larger_than_its_buffer(monkeypatch):
    reader = MemoryReader(8 * 4096, CPU)
    assert reader.buffer.shape == (8, 1024)
    parts: list[int] = []
    monkeypatch.setattr(reader, "_time", lambda kernel, part: (parts.append(part.numel() * 4), 2.0)[1])
    assert reader.seconds(8 * 4096) == 2.0
    assert reader.seconds(24 * 4096) == 6.0
    assert reader.seconds(2 * 4096 + 2048) == 2.5
    assert reader.seconds(1024) == 0.5
    assert parts == [8 * 4096, 8 * 4096, 2 * 4096, 4096]


def test_a_buffer_stops_at_the_cap_and_is_written():
    reader = MemoryReader(10**12, CPU, cap=2**20)
    assert reader.buffer.numel() * 4 == 2**20
    assert bool((reader.buffer == 1).all())
    assert MemoryReader(0, CPU).seconds(100) > 0


def test_every_kernel_reads_the_whole_buffer():
    from overfill.bound import KERNELS

    rows = torch.full((64, 1024), 1.0)
    for name, kernel in KERNELS.items():
        before = kernel(rows).clone()
        for place in ((0, 0), (63, 1023), (31, 500)):
            changed = rows.clone()
            changed[place] = 3.0
            assert not torch.equal(kernel(changed), before), name


def test_peak_growth_sees_memory_that_is_freed_again():
    def allocate() -> None:
        torch.ones(16 * 2**20).add_(1)  # 64 MiB, written, gone at the end

    grown = peak_growth(allocate, CPU)
    if grown is None:
        pytest.skip("this system does not say how much memory a process used at its peak")
    assert 60 * 2**20 < grown < 200 * 2**20
