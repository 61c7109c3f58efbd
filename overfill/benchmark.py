"""Latency of systems by one instrument: a streamer that looks at the clock whenever tokens come out.

TTFT is the time from the prompt to the first token, TPOT the time per token after it; both are reported apart, because
OverFill's first token costs what the full model's does and its others what the student's do (arXiv 2508.08446,
section 5). The systems alternate within every repetition, so that a machine that slows down slows all of them; medians
are taken. After each timed generation comes a short one in which memory is read between the tokens (`overfill.bound`):
the share of the bound is taken within it. Prompts are random tokens unless some are given, and nothing ends early:
latency depends on shapes, not on what is said, except where the student's text is judged (`exact`,
`transformers-assisted`, a refresh by entropy).

Letters: B batch, P prompt, N new tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from overfill.bound import MemoryReader, PairingClock, wait
from overfill.checkpoint import load_full_model, load_student
from overfill.dial import NONE
from overfill.errors import UserError
from overfill.memory import peak_growth
from overfill.systems import System, make_systems
from overfill.workload import EXACT, FULL, OVERFILL, PLAIN_FULL, REFRESH, STUDENT, Point, grid

PAIRED = 9
"""Tokens of the generation in which memory is read between them, eight steps: as long as a refresh wants where there is
one, else no longer than this."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Row = dict[str, Any]


@dataclass(frozen=True)
class Timing:
    """One generation, in seconds."""

    ttft: float
    """From the prompt to the first token, or to the first tokens where several come at once."""
    tpot: float
    """Mean time of each token after those; 0 where none came after."""
    total: float
    """From the prompt to the last token."""
    acceptance_rate: float | None = None
    """Share of drafted tokens that were accepted, where the system says."""


@dataclass(frozen=True)
class Pairing:
    """Steps of one generation beside reads of as many bytes."""

    size: int
    """Bytes."""
    step: float
    """Mean seconds of a step."""
    read: float
    """Mean seconds of the reads before and after each."""


class TokenClock(BaseStreamer):
    """Records when tokens come out; takes any batch, and several tokens at once.

    `generate` puts the prompt first, which is passed over; then a vector [B], one token per row, or from assisted
    decoding a matrix [B, n]. On CUDA a token is out when the device has finished it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []
        self.counts: list[int] = []
        self._prompt_is_past = False

    def put(self, value: Tensor) -> None:
        """Note the time of the next token or tokens."""
        wait(self.device)
        now = time.perf_counter()
        if not self._prompt_is_past:
            self._prompt_is_past = True
            return
        self.times.append(now)
        self.counts.append(value.shape[1] if value.ndim == 2 else 1)

    def end(self) -> None:
        """Nothing more comes."""

    def timing(self, start: float, output: int, acceptance_rate: float | None = None) -> Timing:
        """The timing of a generation of `output` tokens per row that began at `start`.

        Raises RuntimeError when another number of tokens came out: the measurement would be of something else.
        """
        if sum(self.counts) != output:
            raise RuntimeError(f"{sum(self.counts)} tokens came out where {output} were asked for")
        later = output - self.counts[0]
        tpot = (self.times[-1] - self.times[0]) / later if later else 0.0
        return Timing(self.times[0] - start, tpot, self.times[-1] - start, acceptance_rate)


def measure_systems(
    full: Path,
    student: Path | None,
    *,
    batches: Sequence[int],
    prompts: Sequence[int],
    outputs: Sequence[int],
    repeats: int,
    warmup: int,
    dtype: str,
    device: str,
    decoder: str = "eager",
    weights: str = "stored",
    refresh: int | str = NONE,
    texts: Sequence[Sequence[int]] = (),
    released: Path | None = None,
) -> list[Row]:
    """Time the full model and, with a student folder, the student alone and OverFill on every grid point.

    Args:
        released: in place of a student, the folder of any other model, which is then the `student` alone.
        weights: the student's, `stored` or `int8`.
        refresh: a setting of `overfill.dial`; other than `none`, OverFill with it is timed as well.
        texts: token ids of prompts to measure with, see `prompts_of`; random tokens without.

    Returns one row per grid point and system, see `measure_point`. Raises UserError where a grid point is longer than
    the models' positions, or the decoder or the weights cannot be had.
    """
    place = torch.device(device)
    full_model = load_full_model(full, dtype=DTYPES[dtype], device=place)
    if released is not None:
        student_model = load_full_model(released, dtype=DTYPES[dtype], device=place)
    else:
        student_model = None if student is None else load_student(student, dtype=DTYPES[dtype], device=place)
    names = [FULL] if student_model is None else [FULL, STUDENT] if student is None else [FULL, STUDENT, OVERFILL]
    names += [] if refresh == NONE or student is None else [EXACT] if refresh == EXACT else [REFRESH]
    dial = refresh if REFRESH in names else None
    systems = make_systems(full_model, student_model, names, decoder, dial, weights=weights)
    points = grid(batches, prompts, outputs, dtype)
    return [row for rows in measure_grid(systems, points, repeats, warmup, texts) for row in rows]


def measure_grid(
    systems: Sequence[System],
    points: Sequence[Point],
    repeats: int,
    warmup: int,
    texts: Sequence[Sequence[int]] = (),
) -> Iterator[list[Row]]:
    """The rows of one grid point after another, as they are measured; points that no system fits are passed over.

    Raises UserError before the first when a point is longer than the models' positions."""
    longest = min(system.max_positions for system in systems)
    for point in points:
        if point.prompt + point.output > longest:
            raise UserError(
                f"benchmark: prompt + output is {point.prompt + point.output} tokens, the models have {longest} "
                "positions; shorten either"
            )
    sizes = [system.step_bytes(point) or 0 for system in systems for point in points]
    reader = MemoryReader(max(sizes), systems[0].device)
    for point in points:
        fitting = [system for system in systems if not system.unfit(point)]
        if fitting:
            yield measure_point(fitting, point, repeats, warmup, reader, texts)


def measure_point(
    systems: Sequence[System],
    point: Point,
    repeats: int,
    warmup: int,
    reader: MemoryReader,
    texts: Sequence[Sequence[int]] = (),
) -> list[Row]:
    """One row per system, in their order. All times are medians over `repeats` repetitions, after `warmup` others.

    Fields: `system, batch, prompt, output, dtype, device, threads, decoder, repeats`; `ttft_s, tpot_s` and their
    `ttft_spread_s, tpot_spread_s` ([lowest, highest]); `tokens_per_s` (new tokens of all rows over the whole time);
    `peak_bytes` (weights that the system holds and what it allocated beside them; null where nobody counts),
    `weight_bytes` (parameters; what a compiled decoder packs again is not counted); `bytes_per_token` (what a decode
    step must read); `bound_s` (the time to read as many), `bound_share` (that over the time of the steps beside which
    it was read), `bound_share_spread`, and the bytes per second that the two came to, `bound_bytes_per_s` and
    `step_bytes_per_s`, all null where a step has no fixed number, or tokens come all at once; `speed_up` (TPOT of
    `transformers-full` over the system's; null where that was not measured); `compile_s` (spent while this system ran
    at this point); `acceptance_rate`.
    """
    vocabulary = min(model.config.vocab_size for system in systems for model in system.models)
    ids = prompts_of(point, vocabulary, texts)
    timings: dict[str, list[Timing]] = {system.name: [] for system in systems}
    pairings: dict[str, list[Pairing]] = {system.name: [] for system in systems}
    compiled = {system.name: 0.0 for system in systems}
    for repetition in range(warmup + repeats):
        for system in systems:
            before = system.compile_seconds
            timing = time_generation(system, ids, point.output)
            compiled[system.name] += system.compile_seconds - before
            if repetition >= warmup:
                timings[system.name].append(timing)
                pairing = pair_with_reads(system, ids, point, reader)
                pairings[system.name] += [] if pairing is None else [pairing]
    rows = [
        {
            **_conditions(system, point, repeats),
            **_times(timings[system.name], point),
            **_memory(system, ids, point),
            **_bound(system, point, pairings[system.name]),
            "compile_s": compiled[system.name],
        }
        for system in systems
    ]
    baseline = next((row["tpot_s"] for row in rows if row["system"] == PLAIN_FULL), None)
    return [{**row, "speed_up": _ratio(baseline, row["tpot_s"])} for row in rows]


def prompts_of(point: Point, vocabulary: int, texts: Sequence[Sequence[int]] = ()) -> Tensor:
    """Prompts int64 [B, P] for a grid point: random tokens; or of `texts`, row after row, as many as fill P tokens, the
    last one whole at the end."""
    if not texts:
        return torch.randint(0, vocabulary, (point.batch, point.prompt), generator=torch.Generator().manual_seed(0))
    rows: list[list[int]] = []
    remaining = cycle(texts)
    for _ in range(point.batch):
        row: list[int] = []
        while len(row) < point.prompt:
            row += [int(token) for token in next(remaining)]
        rows.append(row[-point.prompt :])
    return torch.tensor(rows)


@torch.no_grad()
def time_generation(system: System, prompt_ids: Tensor, output: int) -> Timing:
    """Generate `output` tokens greedily after `prompt_ids` [B, P], all real tokens.

    Raises RuntimeError when the system ends early."""
    ids = prompt_ids.to(system.device)
    clock = TokenClock(system.device)
    wait(system.device)
    start = time.perf_counter()
    result = system.generate(ids, output, clock)
    return clock.timing(start, output, getattr(result, "acceptance_rate", None))


@torch.no_grad()
def pair_with_reads(system: System, prompt_ids: Tensor, point: Point, reader: MemoryReader) -> Pairing | None:
    """Decode steps after `prompt_ids` [B, P], each between two reads of what it must read; None where that has no fixed
    number, or where all tokens come at once."""
    short = point if system.name == REFRESH else replace(point, output=min(point.output, PAIRED))
    size = system.step_bytes(short)
    if size is None:
        return None
    clock = PairingClock(system.device, lambda: reader.seconds(size))
    system.generate(prompt_ids.to(system.device), short.output, clock)
    return Pairing(size, *clock.means()) if clock.steps else None


def _conditions(system: System, point: Point, repeats: int) -> Row:
    return {
        "system": system.name,
        "batch": point.batch,
        "prompt": point.prompt,
        "output": point.output,
        "dtype": point.dtype,
        "device": system.device.type,
        "threads": torch.get_num_threads(),
        "decoder": system.decoder,
        "repeats": repeats,
    }


def _times(timings: Sequence[Timing], point: Point) -> Row:
    ttft, tpot = [t.ttft for t in timings], [t.tpot for t in timings]
    rates = [t.acceptance_rate for t in timings if t.acceptance_rate is not None]
    return {
        "ttft_s": median(ttft),
        "tpot_s": median(tpot),
        "tokens_per_s": point.batch * point.output / median(t.total for t in timings),
        "ttft_spread_s": [min(ttft), max(ttft)],
        "tpot_spread_s": [min(tpot), max(tpot)],
        "acceptance_rate": median(rates) if rates else None,
    }


def _memory(system: System, ids: Tensor, point: Point) -> Row:
    ids = ids.to(system.device)
    growth = peak_growth(lambda: system.generate(ids, point.output, None), system.device)
    weights = sum(_weight_bytes(model) for model in system.models)
    return {"peak_bytes": None if growth is None else weights + growth, "weight_bytes": weights}


def _bound(system: System, point: Point, pairings: Sequence[Pairing]) -> Row:
    shares = [pairing.read / pairing.step for pairing in pairings]
    return {
        "bytes_per_token": system.step_bytes(point),
        "bound_s": median(pairing.read for pairing in pairings) if pairings else None,
        "bound_share": median(shares) if pairings else None,
        "bound_share_spread": [min(shares), max(shares)] if pairings else None,
        "bound_bytes_per_s": median(pairing.size / pairing.read for pairing in pairings) if pairings else None,
        "step_bytes_per_s": median(pairing.size / pairing.step for pairing in pairings) if pairings else None,
    }


def _ratio(value: float | None, by: float) -> float | None:
    return None if value is None or by == 0 else value / by


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
