"""The DeepSpeed configuration of an engine. Plain dictionaries; DeepSpeed itself is not imported."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LARGEST_BUCKET = 50_000_000
LARGEST_WHOLE_TENSOR = 100_000


@dataclass(frozen=True)
class EngineSettings:
    """What decides how an engine runs, and nothing that decides what it learns."""

    workers: int
    zero_stage: int
    dtype: str
    """fp32 or bf16."""
    micro_batch: int
    accumulation: int
    """Micro-batches of a worker per optimizer step."""

    @property
    def effective_stage(self) -> int:
        """The ZeRO stage that is used: in bf16 the master weights need an owner, so 0 and 1 run as 2."""
        return max(self.zero_stage, 2) if self.dtype == "bf16" else self.zero_stage


def deepspeed_config(module: nn.Module, settings: EngineSettings, clip: float) -> dict[str, Any]:
    """The configuration for training `module`, or only reading it, on this machine; clip 0.0: no clipping."""
    elements = _elements(module.parameters())
    bucket = max(1, min(LARGEST_BUCKET, elements))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": settings.effective_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": settings.dtype == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
    }
    if settings.effective_stage > 0:
        config["zero_optimization"] |= {
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": torch.cuda.is_available(),
        }
    if settings.effective_stage == 3:
        config["zero_optimization"] |= {
            "stage3_prefetch_bucket_size": bucket,
            # Tensors below this stay whole on every worker; a thousandth of the model keeps toy models sharded too.
            "stage3_param_persistence_threshold": min(LARGEST_WHOLE_TENSOR, elements // 1000),
            "stage3_max_live_parameters": 1_000_000_000,
        }
    return config


def _elements(parameters: Iterable[Tensor]) -> int:
    return sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in parameters)
