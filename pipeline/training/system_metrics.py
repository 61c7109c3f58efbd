"""Load of the machine that rank 0 trains on, by the names that MLflow's UI shows under System metrics."""

from __future__ import annotations

import psutil
import torch

MEGABYTE = 1e6


def system_metrics() -> dict[str, float]:
    """CPU since the last call in percent, memory in use in megabytes, and those of the worker's GPU where it has one."""
    found = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": psutil.virtual_memory().used / MEGABYTE,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["system/gpu_0_memory_usage_megabytes"] = (total - free) / MEGABYTE
        if _has_nvml():
            found["system/gpu_0_utilization_percentage"] = float(torch.cuda.utilization())
    return found


def _has_nvml() -> bool:
    try:
        import pynvml  # noqa: F401 - what torch.cuda.utilization asks
    except ImportError:
        return False
    return True
