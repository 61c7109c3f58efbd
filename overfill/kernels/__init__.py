"""The C++ kernels, built once per machine with its own compiler and kept in the user's cache folder.

A build is written beside its place and renamed into it, so that a killed one leaves nothing that is taken for whole,
and its name is the digest of everything that it depends on.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from overfill.errors import UserError

SOURCE = Path(__file__).with_name("linear.cpp")
# Sums may be reordered. Not -ffast-math: linked into a library, it would change the rounding of the whole process.
ARITHMETIC = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
FLAGS = ("-O3", "-march=native", *ARITHMETIC, "-fopenmp", "-std=c++20", "-shared", "-fPIC")
_LOADED = [False]
LIBRARIES = ("-lc10", "-ltorch_cpu", "-ltorch")


def compiler() -> str | None:
    """The C++ compiler: `CXX` if set, else the first that is there; None where there is none."""
    return next(
        (path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None
    )


def load() -> None:
    """Make `linear_bf16`, `linear_int8` and `grouped_attention` of `torch.ops.overfill` available.

    They are built the first time, in under a minute.

    Raises:
        UserError: no compiler, or it fails.
    """
    if is_loaded():
        return
    path = library_path()
    try:
        if not path.is_file():
            _build(path)
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"decoder: kernels in {path.parent} ({reason}); set XDG_CACHE_HOME, or use eager") from error
    torch.library.register_fake("overfill::linear_bf16", _linear_shape)
    torch.library.register_fake(
        "overfill::linear_int8", lambda input, weight, scale, bias: _linear_shape(input, weight)
    )
    torch.library.register_fake(
        "overfill::grouped_attention", lambda query, *_: query.new_empty(query.transpose(1, 2).shape)
    )
    _LOADED[0] = True


def is_loaded() -> bool:
    """Whether `load` has been called."""
    return _LOADED[0]


def library_path() -> Path:
    """Where the library of this source, PyTorch, compiler and processor is kept."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "overfill"
    parts = (SOURCE.read_text(encoding="utf-8"), torch.__version__, _compiler_version(), " ".join(FLAGS), _processor())
    return root / f"linear-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.so"


def _compiler_version() -> str:
    found = compiler()
    if found is None:
        return ""
    return subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by machines of several kinds."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _build(path: Path) -> None:
    found = compiler()
    if found is None:
        raise UserError("decoder: compiled needs a C++ compiler (g++) and none is there; install it, or use eager")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        built = Path(folder) / path.name
        includes = [f"-I{part}" for part in include_paths()]
        libraries = [flag for part in library_paths() for flag in (f"-L{part}", f"-Wl,-rpath,{part}")]
        command = [found, *FLAGS, *includes, str(SOURCE), "-o", str(built), *libraries, *LIBRARIES]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
            raise UserError(f"decoder: {found} cannot build the kernels ({first.strip()}); use decoder=eager")
        built.replace(path)


def _linear_shape(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))
