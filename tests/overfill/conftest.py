"""Tiny models of every supported architecture, with random weights everywhere (norms and biases too)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
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

SIZES = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-tied-biased": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama3-rope": lambda: LlamaConfig(
        **SIZES,
        head_dim=16,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2-tied": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3-tied": lambda: Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "qwen3-biased-mha": lambda: Qwen3Config(**{**SIZES, "num_key_value_heads": 4}, head_dim=8, attention_bias=True),
}


@pytest.fixture(params=sorted(CONFIGS))
def any_config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    """A config of each supported kind in turn."""
    return CONFIGS[request.param]()


@pytest.fixture
def any_model(any_config: PreTrainedConfig) -> PreTrainedModel:
    """A model of each supported kind in turn."""
    return randomised(any_config)


@pytest.fixture
def llama() -> PreTrainedModel:
    """One model, for what does not depend on the architecture."""
    return randomised(CONFIGS["llama"]())


@pytest.fixture
def model_of() -> Callable[[str], PreTrainedModel]:
    """A model by the name of its kind (a key of `CONFIGS`)."""
    return lambda kind: randomised(CONFIGS[kind]())


def randomised(config: PreTrainedConfig) -> PreTrainedModel:
    """Every parameter drawn at random: a fresh model's norms are one and its biases zero, which would hide mistakes."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + name.endswith("norm.weight"))
    return model
