"""`overfill bench`: latency of two-stage decoding and of what it is compared with, on this machine.

Either a student folder with its full model, or a named shape with random weights. What is asked for is checked before
anything is loaded; results are printed point by point, as tables or as JSON lines.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

import overfill
from overfill.dial import EXACT, NONE, dial
from overfill.errors import UserError
from overfill.named_shapes import NamedShape, named_shape
from overfill.workload import Point, Refresh, chosen_systems, grid
from pipeline.bench_table import print_conditions, print_point
from pipeline.machine import cpu_description, gpu_description
from pipeline.objects.places import full_model_place, local_place
from pipeline.record import libraries, source_commit
from pipeline.stages.folders import model_folder
from pipeline.whole import verify_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = ("bf16", "fp32")
DECODERS = ("auto", "eager", "compiled")
WEIGHTS = ("stored", "int8")
VERSIONS = ("torch", "transformers")
FIGURE_TYPES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class BenchRequest:
    """The command line, as it was typed."""

    student: str | None = None
    """A student folder, or None with `shape`."""
    shape: str | None = None
    """A named shape, see `overfill.named_shapes`."""
    full: str | None = None
    """Where the full model lies, if not where the student's manifest says."""
    batch: str = "1"
    prompt: str = "128"
    output: str = "32"
    systems: str | None = None
    dtype: str = "bf16"
    device: str = "cpu"
    decoder: str = "auto"
    repeats: int = 5
    warmup: int = 1
    refresh: str = "64"
    draft: int | None = None
    threads: int | None = None
    weights: str = "stored"
    as_json: bool = False
    plot: str | None = None


@dataclass(frozen=True)
class Bench:
    """A request, checked."""

    points: list[Point]
    systems: list[str]
    refresh: Refresh
    shape: NamedShape | None
    student: Path | None
    request: BenchRequest


def bench(request: BenchRequest) -> None:
    """Measure and print. Raises UserError for what cannot be measured, before anything is loaded."""
    checked = check(request)
    console = Console(stderr=request.as_json)
    rows: list[dict[str, Any]] = []
    for measured in measure(checked):
        rows += measured
        if request.as_json:
            sys.stdout.writelines(json.dumps(row, allow_nan=False) + "\n" for row in measured)
            sys.stdout.flush()
        else:
            print_point(measured, checked.systems, checked.refresh, console)
    if not request.as_json:
        print_conditions(rows, console)
    if request.plot is not None:
        from pipeline.roofline import write_roofline

        console.print(f"roofline: {write_roofline(rows, Path(request.plot))}", highlight=False, soft_wrap=True)


def check(request: BenchRequest) -> Bench:
    """Read the request; torch is loaded only for what it alone knows. Raises UserError."""
    if (request.student is None) == (request.shape is None):
        raise UserError("bench: give either a student folder or --shape NAME:RATIO, for example llama-3.2-3b:0.45")
    if request.shape is not None and request.full is not None:
        raise UserError("--full: is for a student folder; a named shape has no weights to load")
    _one_of("--dtype", request.dtype, DTYPES)
    _one_of("--decoder", request.decoder, DECODERS)
    _one_of("--weights", request.weights, WEIGHTS)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", request.device):
        raise UserError(f"--device: {request.device!r} is not known; give cpu or cuda")
    for name, value, least in (
        ("--repeats", request.repeats, 1),
        ("--warmup", request.warmup, 0),
        ("--threads", request.threads, 1),
        ("--draft", request.draft, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"{name}: {value} is too small; give {least} or more")
    if request.plot is not None and Path(request.plot).suffix not in FIGURE_TYPES:
        raise UserError(f"--plot: {request.plot} has none of the endings {', '.join(FIGURE_TYPES)}")
    batches, prompts = numbers("--batch", request.batch), numbers("--prompt", request.prompt)
    points = grid(batches, prompts, numbers("--output", request.output, least=2), request.dtype)
    shape = None if request.shape is None else named_shape(request.shape)
    student = None if request.student is None else model_folder(local_place(request.student))
    if student is not None:
        verify_model(student)
    names = None if request.systems is None else words("--systems", request.systems)
    refresh = _refresh(request.refresh)
    systems = chosen_systems(names, points, refresh, student=shape is None or shape.widths is not None)
    _check_with_torch(request)
    return Bench(points, systems, refresh, shape, student, request)


def measure(checked: Bench) -> Iterator[list[dict[str, Any]]]:
    """The rows of each grid point, as soon as they are measured."""
    import torch
    from transformers.utils import logging

    from overfill.benchmark import measure_grid
    from overfill.systems import make_systems

    logging.set_verbosity_error()  # assisted generation warns about how it calls itself
    request = checked.request
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    full, student = load(checked)
    versions = {"overfill": overfill.__version__} | {name: libraries()[name] for name in VERSIONS}
    machine = gpu_description() if request.device.startswith("cuda") else cpu_description()
    name = str(checked.student) if checked.shape is None else request.shape
    context = {
        "model": name,
        "weights": request.weights,
        "machine": machine,
        "versions": versions,
        "commit": source_commit(),
    }
    for _, points in groupby(checked.points, lambda point: point.batch):
        # Every batch size is compiled on its own: what was compiled for the last one is given back first.
        systems = make_systems(
            full, student, checked.systems, request.decoder, checked.refresh, request.draft, request.weights
        )
        for rows in measure_grid(systems, list(points), request.repeats, request.warmup):
            yield [{**row, **context} for row in rows]
        del systems
        torch.compiler.reset()
        gc.collect()


def load(checked: Bench) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """The full model and the student: from their folders, or with random weights."""
    from overfill.benchmark import DTYPES as TORCH_DTYPES

    dtype, device = TORCH_DTYPES[checked.request.dtype], checked.request.device
    if checked.shape is not None:
        from overfill.random_models import random_model, related_student

        model = random_model(checked.shape.config, dtype, device)
        return model, None if checked.shape.widths is None else related_student(model, checked.shape.widths)
    from overfill.checkpoint import load_full_model, load_student, read_manifest

    folder = checked.student
    assert folder is not None
    manifest = read_manifest(folder)
    given = full_model_place(folder, checked.request.full)
    location = None if given is None else model_folder(Path(given).expanduser())
    student = load_student(folder, dtype=dtype, device=device)
    return load_full_model(manifest, location=location, dtype=dtype, device=device), student


def numbers(option: str, text: str, least: int = 1) -> list[int]:
    """`1,8` as numbers. Raises UserError for anything else, and for numbers below `least`."""
    found = words(option, text)
    for word in found:
        if not word.isdecimal() or int(word) < least:
            raise UserError(f"{option}: {word!r} is not a whole number from {least} up; give a list such as 1,8")
    return [int(word) for word in found]


def words(option: str, text: str) -> list[str]:
    """A comma list, each word once. Raises UserError for an empty one."""
    found = list(dict.fromkeys(word.strip() for word in text.split(",")))
    if "" in found:
        raise UserError(f"{option}: {text!r} has an empty place; separate values by single commas")
    return found


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{option}: {value!r} is not known; known: {', '.join(known)}")


def _refresh(text: str) -> Refresh:
    """`64` as a number, `none` as None, a rule in its one spelling. Raises UserError for anything else."""
    setting = dial(text)
    if setting == EXACT:
        raise UserError("--refresh: exact is a system of its own; add it to --systems")
    return None if setting == NONE else setting


def _check_with_torch(request: BenchRequest) -> None:
    """What only the method itself knows to be wrong."""
    import torch

    from overfill.reader import choose_decoder
    from overfill.speculative import MOST_DRAFTED

    if request.draft is not None and request.draft > MOST_DRAFTED:
        raise UserError(f"--draft: {request.draft} is too many; give at most {MOST_DRAFTED}")
    kind, _, index = request.device.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {request.device}: no such device on this machine; leave it out to run on the CPU")
    if request.weights == "int8" and kind != "cpu":
        raise UserError("--weights: int8 is for a CPU; leave it out, or --device")
    choose_decoder(request.decoder, torch.device(request.device))
