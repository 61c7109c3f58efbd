"""The bound of decoding, measured: how long this process takes to read a number of bytes from memory.

A decode step multiplies every weight with one vector per row, so reading the weights is what it cannot do without. The
read is measured beside the systems, with the same threads, under the same conditions; a figure from a data sheet is
never reached and says nothing about a machine that others use too. Several kernels of PyTorch read a buffer whole; the
fastest here is taken. Which one that is differs: sums use every thread of a CPU, a matrix-vector product only one of
them and is the fastest where there is one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

CAP = 2 * 2**30
"""Largest buffer in bytes: far beyond every cache. More bytes are scaled from it."""
ROW = 1024
"""Numbers per row of the buffer, float32; the bytes read are a multiple of it, 4 KiB."""
ROUNDS = 4
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
        rows = max(1, min(largest, cap) // (4 * ROW))
        # Written, not only allocated: pages that nobody wrote to are all the same page of zeros.
        self.buffer = torch.full((rows, ROW), 1.0, device=device)
        times: dict[str, list[float]] = {name: [] for name in KERNELS}
        for _ in range(ROUNDS):
            for name, kernel in KERNELS.items():
                times[name].append(self._time(kernel, self.buffer))
        self.kernel = min(times, key=lambda name: min(times[name]))

    def seconds(self, size: float, tries: int = 3) -> float:
        """Seconds to read `size` bytes: the best of several reads, scaled when the buffer is smaller or rounded."""
        rows = min(len(self.buffer), max(1, int(size) // (4 * ROW)))
        part = self.buffer[:rows]
        best = min(self._time(KERNELS[self.kernel], part) for _ in range(tries))
        return best * size / (4 * ROW * rows)

    def _time(self, kernel: Callable[[Tensor], Tensor], part: Tensor) -> float:
        wait(self.device)
        start = time.perf_counter()
        kernel(part)
        wait(self.device)
        return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
