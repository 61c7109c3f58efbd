"""Linear layers that read their weights at the speed of memory, on a CPU.

PyTorch's own bf16 kernels reach a quarter to a half of it for a few rows, and for many rows, on a processor without
bf16 arithmetic, a fraction of what the same product costs in fp32. `fast_twin` is a model with the same weights (the
same tensors, not copies) whose linear layers take the better way by the number of rows; `int8` keeps each output
channel in 8 bits with a scale (symmetric, rounded to nearest), which halves what a token must read.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from overfill import kernels

WEIGHTS = ("stored", "int8")
MOST_ROWS = 32
"""Up to so many rows the kernel wins over widening the weights for a general matrix product."""
MOST_ROWS_BESIDE_BF16 = 4
"""The same where the processor multiplies bf16 itself: with 4 rows the kernel reads at 75 to 84 % of memory speed and
PyTorch's product at 44 to 64 %, with 8 rows at 36 to 46 % and 55 to 59 %."""


class FastLinear(nn.Module):
    """`nn.Linear` in bf16 over the same parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.native = _has_bf16_arithmetic()
        self.most_rows = MOST_ROWS_BESIDE_BF16 if self.native else MOST_ROWS

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        if input.numel() <= self.most_rows * input.shape[-1]:
            return torch.ops.overfill.linear_bf16(input, self.weight, self.bias)
        if self.native:
            return F.linear(input, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias).to(input.dtype)


class Int8Linear(nn.Module):
    """`nn.Linear` with its weight rounded to 8 bits, one scale per output channel; activations stay as they are."""

    weight: Tensor
    """int8 [N, K]."""
    scale: Tensor
    """fp32 [N]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        wide = linear.weight.detach().float()
        scale = wide.abs().amax(dim=1).clamp_min(1e-12) / 127
        self.register_buffer("weight", (wide / scale[:, None]).round().to(torch.int8), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        if input.numel() <= MOST_ROWS * input.shape[-1]:
            return torch.ops.overfill.linear_int8(input, self.weight, self.scale, self.bias)
        weight = self.weight.float() * self.scale[:, None]
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), weight, bias).to(input.dtype)


def fast_twin(model: PreTrainedModel, weights: str = "stored") -> PreTrainedModel:
    """The model with fast linear layers; everything else, and what is not rounded, is shared with it.

    Layers that the kernels do not fit stay what they are: inputs that are no multiple of 16, and another dtype than
    bf16, unless the weights are rounded.

    Raises:
        UserError: the kernels cannot be built.
    """
    kernels.load()
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo=shared)
    for parent in list(twin.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and layer.in_features % 16 == 0:
                if weights == "int8":
                    setattr(parent, name, Int8Linear(layer))
                elif layer.weight.dtype == torch.bfloat16 and layer.weight.is_contiguous():
                    setattr(parent, name, FastLinear(layer))
    return twin


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a decode step reads: all but an input embedding that is not the head as well."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    if embedding is not head:
        tensors.pop(id(embedding), None)
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _has_bf16_arithmetic() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
