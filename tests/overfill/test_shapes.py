"""Legal widths and counts, against figures that are known from elsewhere."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overfill.config import PruneConfig
from overfill.errors import UserError
from overfill.shapes import ModelShape, quantum, resolve_widths

LLAMA_3B = ModelShape("llama", 3072, 8192, 28, 24, 8, 128, 128256, tied=True)
LLAMA_8B = ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256, tied=False)
TOY = ModelShape("llama", 128, 352, 4, 4, 4, 32, 48, tied=True)


def test_parameter_counts_are_those_of_the_released_models():
    assert LLAMA_3B.parameters() == 3_212_749_824
    assert LLAMA_8B.parameters() == 8_030_261_248


@pytest.mark.parametrize(
    ("shape", "ratio", "hidden", "intermediate"), [(LLAMA_3B, 0.45, 1728, 4480), (LLAMA_8B, 0.43, 2304, 8192)]
)
def test_the_papers_ratios_come_to_the_nearest_legal_widths(shape, ratio, hidden, intermediate):
    widths = resolve_widths(shape, PruneConfig(hidden=ratio, intermediate=ratio))
    assert (widths.hidden, widths.intermediate) == (hidden, intermediate)


def test_nothing_asked_keeps_every_channel_even_where_the_width_is_no_multiple():
    odd = ModelShape("qwen2", 100, 250, 2, 3, 1, 32, 50, tied=False)
    widths = resolve_widths(odd, PruneConfig())
    assert (widths.hidden, widths.intermediate, widths.ratio_effective) == (100, 250, 0.0)


@given(
    heads=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40]),
    blocks=st.integers(1, 128),
    intermediate=st.integers(16, 30000),
    ratio=st.floats(0.01, 0.97),
)
def test_any_ratio_is_legal_and_as_near_as_the_alignment_allows(heads, blocks, intermediate, ratio):
    shape = ModelShape("llama", heads * blocks, intermediate, 2, heads, 1, 64, 1000, tied=True)
    widths = resolve_widths(shape, PruneConfig(hidden=ratio, intermediate=ratio))
    multiple = math.lcm(heads, quantum(shape.hidden))
    assert widths.hidden == shape.hidden or widths.hidden % multiple == 0
    assert widths.hidden % heads == 0
    assert 0 < widths.hidden <= shape.hidden
    assert abs(widths.hidden - shape.hidden * (1 - ratio)) <= max(multiple / 2, multiple - shape.hidden * (1 - ratio))
    assert widths.intermediate % quantum(intermediate) == 0 or widths.intermediate == intermediate


def test_a_target_parameter_count_finds_the_nearest_shape():
    widths = resolve_widths(LLAMA_3B, PruneConfig(parameters=1_243_000_000))
    reached = LLAMA_3B.pruned(widths.hidden, widths.intermediate).parameters()
    assert abs(reached - 1_243_000_000) < 0.05 * 1_243_000_000


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        (PruneConfig(hidden=4096), "prune.hidden: 4096 channels is more than the model's 3072"),
        (PruneConfig(parameters=10**10), "prune.parameters: 10000000000 is more than the model's"),
        (PruneConfig(parameters=1000), "cannot be reached; the nearest legal shape"),
    ],
)
def test_what_cannot_be_is_refused_with_both_numbers(prune, message):
    with pytest.raises(UserError, match=message):
        resolve_widths(LLAMA_3B, prune)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_counts_equal_those_of_transformers(architecture, tied):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        architecture,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=100,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = ModelShape.from_config(config.to_dict())
    assert shape.parameters() == sum(p.numel() for p in model.parameters())


def test_a_decode_step_reads_every_matrix_once_and_the_cache():
    matrices = 4 * (4 * 128 * 128 + 3 * 128 * 352) + 48 * 128
    assert TOY.decode_bytes("bf16", context=10) == 2 * matrices + 10 * 2 * 4 * 4 * 32 * 2


def test_an_unknown_architecture_is_refused_by_name():
    with pytest.raises(UserError, match="model_type 'gpt2' is not supported; known: llama, mistral, qwen2, qwen3"):
        ModelShape.from_config({"model_type": "gpt2"})
    with pytest.raises(UserError, match="field 'hidden_size' is missing"):
        ModelShape.from_config({"model_type": "llama"})
