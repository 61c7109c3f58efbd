"""What this machine is, as text: processor, GPUs and their driver. No torch, no ray.

The latency benchmark's identity counts these, because a latency is a statement about a machine.
"""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path


@lru_cache
def cpu_description() -> str:
    """Processor's model and number of usable cores."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model} x {usable_cpus()}"


def usable_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


@lru_cache
def gpu_description() -> str:
    """Names and driver of the GPUs that `nvidia-smi` lists; `gpu` where this machine has none to ask."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "gpu"
    return "; ".join(sorted({line.strip() for line in listed.splitlines() if line.strip()})) or "gpu"


def device_description(gpus: float) -> str:
    """The device that a stage with `gpus` GPUs per worker runs on."""
    return gpu_description() if gpus > 0 else cpu_description()
