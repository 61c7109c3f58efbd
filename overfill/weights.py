"""Weights of a model folder, tensor by tensor: lazy reading, sharded writing, one digest. Safetensors only.

An 8B teacher is cut on a machine whose memory holds neither it nor a copy: `WeightsFolder` maps the files and hands out
one tensor at a time, `write_weights` gathers tensors into shards of bounded size. The file layout is that of
`transformers` (`model.safetensors`, or `model.safetensors.index.json` beside `model-00001-of-0000N.safetensors`), so
`from_pretrained` reads what is written here. Pickled weights are refused: unpickling runs code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from overfill.architectures import Parameter, is_derived
from overfill.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30


class WeightsFolder:
    """The safetensors files of a model folder, read one tensor at a time.

    Raises UserError when the folder holds no safetensors weights, or when a file of its index is missing or torn."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._home: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in _weight_files(folder):
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    self._home[name] = path
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())

    def names(self) -> set[str]:
        """Names of all stored tensors."""
        return set(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header."""
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in its stored dtype."""
        # Opened anew, because pages of an open file count as this process's memory once they were read.
        with _open(self._home[name]) as file:
            return file.get_tensor(name)

    def digest(self, names: Iterable[str]) -> str:
        """sha256 over the named tensors' names, dtypes, shapes and bytes; independent of how files are sharded."""

        def line(name: str) -> str:
            tensor = self.read(name).contiguous()
            content = hashlib.sha256(tensor.flatten().view(torch.uint8).numpy()).hexdigest()
            return f"{name} {tensor.dtype} {tuple(tensor.shape)} {content}\n"

        # hashlib releases the interpreter lock; two threads keep memory at two tensors.
        with ThreadPoolExecutor(max_workers=2) as pool:
            return hashlib.sha256("".join(pool.map(line, sorted(names))).encode()).hexdigest()


def check_weights(source: WeightsFolder, wanted: Mapping[str, Parameter]) -> None:
    """Raise UserError unless the folder holds exactly the wanted parameters in the wanted shapes."""
    check_names(source.names(), wanted, str(source.folder))
    for name, parameter in wanted.items():
        if source.shape(name) != parameter.shape:
            raise UserError(f"{source.folder}: {name} is {source.shape(name)}, config.json says {parameter.shape}")


def check_names(have: set[str], wanted: Mapping[str, Parameter], where: str) -> None:
    """Raise UserError unless these are the names of the wanted parameters."""
    missing = sorted(wanted.keys() - have)
    # A tied output head may be stored beside the embedding that it equals.
    foreign = sorted(name for name in have - wanted.keys() if name != "lm_head.weight" and not is_derived(name))
    if missing or foreign:
        raise UserError(
            f"{where}: weights do not fit the config (missing: {', '.join(missing[:3]) or 'none'}; "
            f"unknown: {', '.join(foreign[:3]) or 'none'}); is it a plain causal language model, copied whole?"
        )


def write_weights(
    folder: Path,
    sizes: Mapping[str, int],
    tensor: Callable[[str], torch.Tensor],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors as `transformers` shards; memory holds one shard at a time.

    `sizes`: bytes of every tensor by name, in the order to write; `tensor` yields a tensor by its name.
    """
    shards = _shards(sizes, shard_bytes)
    names_of: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensor(name).contiguous() for name in names}, folder / file, metadata={"format": "pt"})
        names_of.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": names_of}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Greedy, in order; a tensor larger than a shard has one to itself."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing, though the folder's index names it; copy the folder again") from error
    except SafetensorError as error:
        raise UserError(f"{path}: torn or not a safetensors file ({error}); copy the folder again") from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX_FILE).is_file():
        try:
            files = sorted(set(json.loads((folder / INDEX_FILE).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{folder / INDEX_FILE}: not an index of weights; copy the folder again") from error
        return [folder / file for file in files]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a transformers model")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise UserError(f"{folder}: pickled weights are refused; save the model again as safetensors")
    raise UserError(f"{folder}: no {SINGLE_FILE}; give the folder of a transformers model")
