"""DeepSpeed engines: the only place that imports DeepSpeed, and only inside functions.

Student. The training loop computes sums over tokens and knows how many target tokens the global batch has, so the
gradient that it wants is grad(sum over all workers and micro-batches) / tokens. DeepSpeed averages gradients over
workers and, by default, over micro-batches; `StudentEngine.backward` multiplies by the number of workers and switches
the other division off, so the update does not depend on how a batch is split.

ZeRO stage 0 keeps torch's AdamW over whole parameters; the other stages shard its state.

State by name. `read` and `write` give and take the whole fp32 weight and moments of a parameter, however ZeRO shards
them: the form in which step checkpoints hold them. DeepSpeed's own checkpoints are pickles of flat shards that fit one
number of workers and one ZeRO stage.

Full model. Under ZeRO stage 3 it is an engine of its own without an optimizer, so that each worker holds its share
of it; below, a plain module in evaluation mode.

On a machine without a GPU no kernel is compiled: the optimizer is torch's, and DeepSpeed's shared-memory collectives,
which would be built at first use, are declared incompatible.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config_training import TrainingConfig
from pipeline.training.deepspeed_config import DTYPES, EngineSettings, deepspeed_config
from pipeline.training.quick_imports import UNUSED, without_modules

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)
"""What training keeps per parameter: the fp32 weight and AdamW's moments."""


def import_deepspeed() -> Any:
    """The `deepspeed` module, quiet and set up for this machine."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with without_modules(*UNUSED):
        import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if on_cpu:
        # Set before it is looked up, because looking it up tries the compiler on every kernel. None is compatible.
        deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})
    return deepspeed


class StudentEngine:
    """A module under DeepSpeed with AdamW. `engine(...)` calls the module; `backward` and `step` train it."""

    def __init__(
        self, module: nn.Module, config: TrainingConfig, settings: EngineSettings, device: torch.device
    ) -> None:
        deepspeed = import_deepspeed()
        self.settings = settings
        self.clip = config.clip
        self.plain = settings.effective_stage == 0
        _cast_parameters(module, DTYPES[settings.dtype])
        optimizer = torch.optim.AdamW(
            _parameter_groups(module, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
        )
        options = deepspeed_config(module, settings, clip=0.0 if self.plain else config.clip)
        _place(module, settings.effective_stage, options, device)
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=options, dist_init_required=False
        )
        self._create_state()

    @property
    def module(self) -> nn.Module:
        """The wrapped module."""
        return self.engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode."""
        self.engine.train(mode)

    def backward(self, loss_sum: Tensor, tokens: int) -> None:
        """Add the gradient of `loss_sum` / `tokens`, summed over workers and micro-batches."""
        self.engine.backward(loss_sum * (self.settings.workers / tokens), scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float | None:
        """End a micro-batch. The last one of a batch updates the weights and returns the gradient's norm, unclipped."""
        last = self.engine.is_gradient_accumulation_boundary()
        norm: float | None = None
        if last:
            for group in self.engine.optimizer.param_groups:
                group["lr"] = learning_rate
            if self.plain:
                limit = self.clip if self.clip > 0 else float("inf")
                norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), limit))
        self.engine.step()
        if last and not self.plain:
            norm = float(self.engine.get_global_grad_norm() or 0.0)
        return norm

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trained parameters by name, tied ones once, in the same order on every worker."""
        return [(name, tensor) for name, tensor in self.module.named_parameters() if tensor.requires_grad]

    def read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """The whole fp32 tensor of one of `KINDS`. A collective: every worker calls it, for the same parameter."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.plain:
            return parameter.detach() if kind == WEIGHT else self.engine.optimizer.state[parameter][kind]
        whole: Any = (
            safe_get_full_fp32_param(parameter) if kind == WEIGHT else safe_get_full_optimizer_state(parameter, kind)
        )
        return whole

    def write(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        """Set what `read` reads. Each worker passes the whole tensor and keeps its share.

        The module's own weights are to be set before the engine is made (in bf16 they are the rounded `WEIGHT`)."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        value = value.to(parameter.device)
        with torch.no_grad():
            if self.plain:
                self.read(parameter, kind).copy_(value)
            elif is_sharded(parameter):
                sharded: Any = parameter
                share = _share(value, sharded.ds_tensor.numel(), self.engine.global_rank)
                if kind == WEIGHT:
                    safe_set_local_fp32_param(parameter, share)
                else:
                    safe_set_local_optimizer_state(parameter, share, kind)
            elif kind == WEIGHT:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, kind)

    def set_updates(self, updates: int) -> None:
        """Make AdamW count as if it had taken `updates` steps, for its bias correction."""
        for tensor in self._optimized_tensors():
            self._adamw.state[tensor]["step"].fill_(float(updates))

    @property
    def _adamw(self) -> torch.optim.AdamW:
        return self.engine.optimizer if self.plain else self.engine.optimizer.optimizer

    def _create_state(self) -> None:
        """Make the moments that AdamW makes at its first step: DeepSpeed links them to parameters once, for `read`."""
        for tensor in self._optimized_tensors():
            moments = {kind: torch.zeros_like(tensor, memory_format=torch.preserve_format) for kind in MOMENTS}
            self._adamw.state[tensor] = {"step": torch.tensor(0.0), **moments}
        if hasattr(self.engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _optimized_tensors(self) -> list[Tensor]:
        """What AdamW updates: the parameters themselves, or this worker's flat shards of them."""
        optimizer = self.engine.optimizer
        if self.plain:
            return [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self.settings.effective_stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        return list(optimizer.single_partition_of_fp32_groups)


def frozen_engine(module: nn.Module, settings: EngineSettings, device: torch.device) -> tuple[Any, nn.Module]:
    """(what to call, the module) of a model that is only read: sharded over the workers under ZeRO stage 3."""
    module.requires_grad_(False).eval()
    _cast_parameters(module, DTYPES[settings.dtype])
    if settings.zero_stage < 3 or settings.workers == 1:
        return module.to(device), module
    options = deepspeed_config(module, settings, clip=0.0)
    _place(module, settings.zero_stage, options, device)
    engine, *_ = import_deepspeed().initialize(model=module, config=options, dist_init_required=False)
    engine.eval()
    return engine, engine.module


def whole_parameter(parameter: Tensor) -> Any:
    """Context in which a parameter that ZeRO stage 3 shards is whole on every worker."""
    return import_deepspeed().zero.GatheredParameters([parameter], modifier_rank=None)


def is_sharded(parameter: Tensor) -> bool:
    """Whether a worker holds only its share of the parameter."""
    return hasattr(parameter, "ds_id")


def _cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters, but not buffers: rotary frequencies in bf16 would misplace distant tokens."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def _place(module: nn.Module, zero_stage: int, options: dict[str, Any], device: torch.device) -> None:
    """Move a module to the device; under ZeRO stage 3 parameter by parameter, each worker keeping its share."""
    if zero_stage < 3:
        module.to(device)
        return
    import_deepspeed().zero.Init(module=module, config_dict_or_path=options)
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, buffer.to(device))


def _share(whole: Tensor, size: int, rank: int) -> Tensor:
    """A worker's part of a tensor under ZeRO stage 3: equal parts of the flat tensor, padded with zeros at its end."""
    flat = whole.flatten()[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(flat, (0, size - flat.numel()))


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
