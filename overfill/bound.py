"""The bound of decoding, measured: how long this process takes to read a number of bytes from memory.

A decode step multiplies every weight with one vector per row, so reading the weights is what it cannot do without. The
read uses the same threads, under the same conditions, from huge pages like the weights (`overfill.huge_pages`); a
figure from a data sheet is never reached and says nothing about a machine that others use too.

There memory is not one speed: a virtual machine's two cores read 34 GB/s while its host runs them on one complex of
cores, 59 while on two, and the host moves them every few seconds. So a read is only compared with the steps right
beside it: `PairingClock` reads after every token, and the share is that of the reads' time in the steps' time.

Several kernels of PyTorch read a buffer whole; the fastest here is taken. Which one that is differs: sums use every
thread of a CPU, a matrix-vector product only one of them and is the fastest where there is one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from overfill import huge_pages

CAP = 2 * 2**30
"""Largest buffer in bytes: far beyond every cache. More bytes are scaled from it."""
ROW = 1024
"""Numbers per row of the buffer, float32; the bytes read are a multiple of it, 4 KiB."""
ROUNDS = 5
"""Times that every kernel reads the buffer before one is chosen; they take turns."""
KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "matrix-vector": lambda rows: torch.mv(rows, rows.new_ones(rows.shape[1])),
    "integer sum": lambda rows: rows.view(torch.int32).sum(dtype=torch.int32),
    "sum": lambda rows: rows.sum(),
    "wide integer sum": lambda rows: rows.view(torch.int64).sum(),
}
"""Ways to read a float32 matrix [rows, ROW] once, by name."""


class MemoryReader:
    """A buffer to be read, and the kernel that reads it fastest."""

    def __init__(self, largest: int, device: torch.device, cap: int = CAP) -> None:
        """`largest`: the most bytes that will be asked for; the buffer is as large, up to `cap`."""
        self.device = device
        shape = (max(1, min(largest, cap) // (4 * ROW)), ROW)
        # Written, not only allocated: pages that nobody wrote to are all the same page of zeros.
        self.buffer = _empty(shape, device).fill_(1.0)
        rounds = [{name: self._time(kernel, self.buffer) for name, kernel in KERNELS.items()} for _ in range(ROUNDS)]
        # Places within a round, not times: memory may be twice as fast in the next one.
        places = [sorted(times, key=times.__getitem__) for times in rounds]
        self.kernel = min(KERNELS, key=lambda name: sum(order.index(name) for order in places))

    def seconds(self, size: float) -> float:
        """Seconds to read `size` bytes once, scaled when the buffer is smaller or rounded."""
        rows = min(len(self.buffer), max(1, int(size) // (4 * ROW)))
        return self._time(KERNELS[self.kernel], self.buffer[:rows]) * size / (4 * ROW * rows)

    def _time(self, kernel: Callable[[Tensor], Tensor], part: Tensor) -> float:
        wait(self.device)
        start = time.perf_counter()
        kernel(part)
        wait(self.device)
        return time.perf_counter() - start


class PairingClock(BaseStreamer):
    """Reads memory whenever a token comes out, so that every decode step stands between two reads.

    A step's time begins when the read before it has ended."""

    def __init__(self, device: torch.device, read: Callable[[], float]) -> None:
        """`read` reads as many bytes as a step and returns the seconds it took."""
        self.device = device
        self.read = read
        self.steps: list[float] = []
        self.reads: list[float] = []
        self._prompt_is_past = False
        self._start = 0.0

    def put(self, value: Tensor) -> None:
        """Note the step of the next token, except the first's, which is the prompt's; then read."""
        wait(self.device)
        now = time.perf_counter()
        if not self._prompt_is_past:
            self._prompt_is_past = True
            return
        if self.reads:
            self.steps.append(now - self._start)
        self.reads.append(self.read())
        self._start = time.perf_counter()

    def end(self) -> None:
        """Nothing more comes."""

    def means(self) -> tuple[float, float]:
        """Mean seconds of a step, and of the reads on both sides of it."""
        beside = [(before + after) / 2 for before, after in pairwise(self.reads)]
        return fmean(self.steps), fmean(beside)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _empty(shape: tuple[int, int], device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.empty(shape, device=device)
    return huge_pages.take(huge_pages.reserve(4 * shape[0] * shape[1]), shape, torch.float32)
