"""Low-rank adapters on a student (LoRA, arXiv 2106.09685), by `peft`, and merging them into plain weights.

With adapters in place, a target's weight is called `….base_layer.weight`, and beside it stand `….lora_A.default.weight`
[rank, in] and `….lora_B.default.weight` [out, rank]; everything but these two is frozen. B begins at zero, so that the
student begins as it was cut.

Merging works on tensors by name, because after training the whole tensors are on one worker and the modules may hold
only their shares (ZeRO-3). It adds in fp32 and rounds once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from torch import Tensor
from transformers import PreTrainedModel

from overfill.config import LoraConfig

_BASE, _A, _B = ".base_layer", ".lora_A.default.weight", ".lora_B.default.weight"


def add_adapters(student: PreTrainedModel, lora: LoraConfig, seed: int) -> None:
    """Put adapters on a student's targets, in place, and freeze all else. The same seed gives the same adapters."""
    alpha: Any = lora.alpha  # declared an integer, but it is only divided
    config = PeftLoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=list(lora.targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, student)


def merged(weights: Mapping[str, Tensor], lora: LoraConfig) -> dict[str, Tensor]:
    """A student's plain weights from those of one with adapters: W + (alpha / rank) B A, in W's dtype."""
    plain: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith((_A, _B)):
            continue
        owner, base, kind = name.rpartition(_BASE)
        if base and kind == ".weight":
            update = weights[owner + _B].float() @ weights[owner + _A].float()
            tensor = (tensor.float() + lora.alpha / lora.rank * update).to(tensor.dtype)
        plain[owner + kind] = tensor
    return plain
