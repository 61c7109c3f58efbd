"""Adapters begin at nothing, leave the student frozen, and merge into its plain weights."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from overfill.config import LoraConfig
from overfill.lora import add_adapters, merged

TOKENS = torch.arange(6)[None]


def student() -> PreTrainedModel:
    """A tiny model with biases on its projections."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    config = AutoConfig.for_model("qwen2", **sizes, num_attention_heads=2, num_key_value_heads=1)
    return AutoModelForCausalLM.from_config(config).eval()


def adapted(lora: LoraConfig, seed: int = 0) -> PreTrainedModel:
    model = student()
    add_adapters(model, lora, seed)
    return model


def with_moved_adapters(lora: LoraConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = adapted(lora).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def test_a_student_with_new_adapters_says_what_it_said_and_only_they_are_trained() -> None:
    lora = LoraConfig(rank=3, targets=("q_proj", "down_proj"))
    model = adapted(lora)
    assert torch.equal(model(TOKENS).logits, student()(TOKENS).logits)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2
    assert trained["model.layers.1.mlp.down_proj.lora_A.default.weight"] == (3, 12)
    assert trained["model.layers.1.mlp.down_proj.lora_B.default.weight"] == (8, 3)


def test_the_seed_alone_decides_the_adapters() -> None:
    one, again, other = (dict(adapted(LoraConfig(), seed).named_parameters()) for seed in (7, 7, 8))
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(one[name], again[name])
    assert not torch.equal(one[name], other[name])
    model, before = student(), torch.get_rng_state()
    add_adapters(model, LoraConfig(), 7)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_those_of_the_plain_student_and_give_the_same_logits(dtype: torch.dtype) -> None:
    lora = LoraConfig(rank=2, alpha=5.0)
    model = with_moved_adapters(lora, dtype)
    plain = student().to(dtype)
    weights = merged(dict(model.named_parameters()), lora)
    assert weights.keys() == dict(plain.named_parameters()).keys()
    assert all(weight.dtype == dtype for weight in weights.values())
    plain.load_state_dict(weights)
    if dtype == torch.float32:
        torch.testing.assert_close(plain(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    theirs = model.model.layers[0].mlp.up_proj.base_layer.weight
    ours = plain.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)
