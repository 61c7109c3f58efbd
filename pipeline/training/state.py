"""Saving and restoring the state of training: trained weights, moments, position, random generators.

The tensors are whole and by name (`engine.StudentEngine.read`), each written by one rank: parameters are dealt to ranks
by size, so that ranks write in parallel and none holds more than its part. A run may therefore resume on another
number of workers or ZeRO stage; on one worker in fp32 it goes on bit for bit.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.training import checkpoints
from pipeline.training.checkpoints import Position, StepFolders
from pipeline.training.distributed import Place
from pipeline.training.engine import KINDS, WEIGHT, StudentEngine

_RANDOM = "random/"


def save(engine: StudentEngine, steps: StepFolders, position: Position, place: Place, keep: int) -> None:
    """Write a step checkpoint and remove old ones. A collective; it is complete when this returns."""
    folder = steps.root / place.from_first(checkpoints.new_name(position.step))
    folder.mkdir(parents=True, exist_ok=True)
    named = engine.parameters()
    writer = _writers(dict(named), place.workers)
    mine: dict[str, Tensor] = {}
    for name, parameter in named:
        for kind in KINDS:
            tensor = engine.read(parameter, kind)
            if writer[name] == place.rank:
                mine[f"{kind}/{name}"] = tensor.detach().cpu().contiguous()
    file = folder / f"rank-{place.rank:05d}.safetensors"
    save_file(mine | _random_state(place), file)
    files = [file, checkpoints.write_position(folder, position)] if place.first else [file]
    steps.sent(folder, [*files, checkpoints.write_manifest(folder, place.rank, place.workers, files)])
    place.barrier()
    if place.first:
        steps.complete(folder, place.workers, keep)
    place.barrier()
    steps.leave(folder)


def load_weights(module: nn.Module, folder: Path) -> None:
    """Set the trained weights of a module that is not in an engine yet. Frozen ones are not in a checkpoint: they are
    what the run was given."""
    with torch.no_grad(), SavedTensors(folder) as saved:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(saved.read(f"{WEIGHT}/{name}"))


def restore(engine: StudentEngine, folder: Path, place: Place) -> Position:
    """Set master weights, moments and random generators of an engine whose module has the checkpoint's weights."""
    position = checkpoints.read_position(folder)
    engine.set_updates(position.step)
    with SavedTensors(folder) as saved:
        for name, parameter in engine.parameters():
            for kind in KINDS:
                engine.write(parameter, kind, saved.read(f"{kind}/{name}"))
        _set_random_state(saved, place)
    return position


class SavedTensors:
    """The tensors of a checkpoint, read one by one. A context manager."""

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        for path in checkpoints.rank_files(folder):
            file: Any = self._stack.enter_context(safe_open(path, framework="pt"))
            self._files.update(dict.fromkeys(file.keys(), file))

    def __enter__(self) -> SavedTensors:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU. Raises KeyError when the checkpoint has none of this name."""
        return self._files[name].get_tensor(name)


def _writers(parameters: dict[str, nn.Parameter], workers: int) -> dict[str, int]:
    """Parameter name -> the rank that writes it: largest first, each to the rank with the least so far."""
    load = [0] * workers
    writer: dict[str, int] = {}
    sizes = {name: int(getattr(tensor, "ds_numel", tensor.numel())) for name, tensor in parameters.items()}
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        rank = min(range(workers), key=load.__getitem__)
        writer[name], load[rank] = rank, load[rank] + size
    return writer


def _random_state(place: Place) -> dict[str, Tensor]:
    def entries() -> Iterator[tuple[str, Tensor]]:
        yield "torch", torch.get_rng_state()
        if place.device.type == "cuda":
            yield "cuda", torch.cuda.get_rng_state(place.device)
        _, keys, *rest = cast("tuple[Any, ...]", np.random.get_state(legacy=True))
        yield "numpy", torch.from_numpy(np.concatenate([keys, rest]).astype(np.float64))  # 32-bit keys: exact
        yield "python", torch.tensor(random.getstate()[1], dtype=torch.int64)

    return {f"{_RANDOM}{place.rank}/{name}": tensor for name, tensor in entries()}


def _set_random_state(saved: SavedTensors, place: Place) -> None:
    """Set the generators; a rank that the checkpoint does not know keeps its own."""
    prefix = f"{_RANDOM}{place.rank}/"
    if f"{prefix}torch" not in saved:
        return
    torch.set_rng_state(saved.read(f"{prefix}torch"))
    if place.device.type == "cuda" and f"{prefix}cuda" in saved:
        torch.cuda.set_rng_state(saved.read(f"{prefix}cuda"), place.device)
    *keys, position, has_gauss, gauss = saved.read(f"{prefix}numpy").tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), int(position), int(has_gauss), gauss))
    random.setstate((3, tuple(saved.read(f"{prefix}python").tolist()), None))
