"""A full model and a narrower student of the same KV geometry, tiny, random, for each way of attending."""

from __future__ import annotations

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

PAD, EOS = 0, 2
SIZES = {
    "vocab_size": 41,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
KINDS = ("llama", "qwen2", "qwen2-some-layers-slide", "qwen3", "mistral", "mistral-slides")


def config_of(kind: str) -> PreTrainedConfig:
    """The full model's config; windows are shorter than the sequences of the tests."""
    if kind == "llama":
        return LlamaConfig(**SIZES)
    if kind == "qwen2":
        return Qwen2Config(**SIZES)
    if kind == "qwen2-some-layers-slide":
        return Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    if kind == "qwen3":
        return Qwen3Config(**SIZES)
    return MistralConfig(**SIZES, sliding_window=4 if kind == "mistral-slides" else None)


def narrower(config: PreTrainedConfig) -> PreTrainedConfig:
    """The student's config: half the widths, the same KV geometry."""
    student = copy.deepcopy(config)
    student.hidden_size, student.intermediate_size = 16, 24
    return student


def build(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A model with every parameter random, in evaluation mode."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator) + name.endswith("norm.weight"))
    return model


def full_model(kind: str) -> PreTrainedModel:
    return build(config_of(kind), seed=1)


def student_model(kind: str) -> PreTrainedModel:
    return build(narrower(config_of(kind)), seed=2)


def row_logits(model: PreTrainedModel, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Logits [R, V] that predict the response, by one plain forward of an unpadded row."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0]
    return logits[len(prompt) - 1 : -1]


def continued_logits(
    full: PreTrainedModel, student: PreTrainedModel, prompt: list[int], response: list[int]
) -> torch.Tensor:
    """Logits [R - 1, V] of the student for y2..yR of an unpadded row, one token at a time on the full model's cache."""
    with torch.no_grad():
        cache = full(torch.tensor([prompt]), use_cache=True).past_key_values
        steps = [
            student(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1]
            for token in response[:-1]
        ]
    return torch.stack(steps) if steps else torch.zeros(0, student.config.vocab_size)
