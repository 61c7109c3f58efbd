"""Memory in huge pages, for what a decode step streams through on a CPU.

A processor finds a page's place in memory by a table, and fetches ahead within a page only. Weights in pages of 4 KiB
are read at half to three quarters of the speed of the same bytes in pages of 2 MiB, whatever the kernel. Linux hands out
large ones to whoever asks by `madvise` (where `/sys/kernel/mm/transparent_hugepage/enabled` is `madvise` or `always`),
but neither PyTorch nor a mapped file of weights asks. Elsewhere this is ordinary memory.
"""

from __future__ import annotations

import ctypes
import mmap
from weakref import WeakSet

import torch
from torch import Tensor, nn

HUGE = 2 * 2**20
"""Bytes of a huge page on x86-64, and on Arm with pages of 4 KiB."""
ALIGNMENT = 64
"""Tensors begin at a multiple of so many bytes, a cache line."""


class Arena(mmap.mmap):
    """A stretch of private memory that begins at a huge page; given back with the last tensor in it."""

    begin: int
    """Bytes to the first huge page."""
    address: int
    """Of that page."""
    filled: int
    """Bytes handed out after it."""


_ARENAS: WeakSet[Arena] = WeakSet()


def reserve(size: int) -> Arena:
    """An arena of `size` bytes; pages of it take memory once they are written."""
    arena = Arena(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(arena))
    arena.begin = -start % HUGE
    arena.address, arena.filled = start + arena.begin, 0
    if hasattr(mmap, "MADV_HUGEPAGE"):
        arena.madvise(mmap.MADV_HUGEPAGE)
    _ARENAS.add(arena)
    return arena


def take(arena: Arena, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor in the arena, behind those taken before."""
    count = torch.Size(shape).numel()
    tensor = torch.frombuffer(arena, dtype=dtype, count=count, offset=arena.begin + arena.filled).view(shape)
    arena.filled += padded(tensor)
    return tensor


def padded(tensor: Tensor) -> int:
    """Bytes that a tensor takes in an arena."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


def move(model: nn.Module) -> None:
    """Move a model's parameters and buffers on the CPU into huge pages, one after another, in place.

    A parameter stays the object that it is, so whoever shares it shares its new place; what it held before is given
    back before the next one is moved."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    outside = [t for t in tensors if t.device.type == "cpu" and t.numel() and not is_inside(t)]
    if not outside:
        return
    arena = reserve(sum(padded(tensor) for tensor in outside))
    for tensor in outside:
        tensor.data = take(arena, tensor.shape, tensor.dtype).copy_(tensor.data)


def is_inside(tensor: Tensor) -> bool:
    """Whether a tensor lies in an arena."""
    place = tensor.data_ptr()
    return any(arena.address <= place < arena.address + arena.filled for arena in _ARENAS)
