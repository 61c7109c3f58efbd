"""The table against the modules of `transformers`, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedConfig

from overfill.architectures import ARCHITECTURES, CUT, Axis, checked_shape, parameters, same_cache_geometry
from overfill.errors import UserError
from overfill.shapes import ModelShape

PLAIN: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "head_dim": 8,
    "sliding_window": None,
}


def test_the_table_names_every_parameter_of_the_model_with_its_shape(any_config: PreTrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(any_config)
    table = parameters(checked_shape(any_config.to_dict()))
    actual = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in table.items()} == actual


def test_the_table_counts_the_parameters_that_the_shape_counts(any_config: PreTrainedConfig) -> None:
    shape = checked_shape(any_config.to_dict())
    model = AutoModelForCausalLM.from_config(any_config)
    assert shape.parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert shape == ModelShape.from_config(any_config.to_dict())


def test_only_hidden_and_intermediate_channels_are_ever_cut(any_config: PreTrainedConfig) -> None:
    """The rows of the key and value projections are the geometry of the cache."""
    assert {Axis.HIDDEN, Axis.INTERMEDIATE} == CUT
    full = checked_shape(any_config.to_dict())
    narrow = full.pruned(16, 24)
    assert same_cache_geometry(narrow, full)
    before, after = parameters(full), parameters(narrow)
    for name, parameter in before.items():
        for axis, old, new in zip(parameter.axes, parameter.shape, after[name].shape, strict=True):
            assert (old != new) == (axis in CUT)
        if ".k_proj." in name or ".v_proj." in name:
            assert parameter.shape[0] == after[name].shape[0] == full.kv_heads * full.head_dim


@pytest.mark.parametrize("change", [{"layers": 3}, {"kv_heads": 4}, {"head_dim": 16}])
def test_another_cache_geometry_is_seen(change: dict[str, int]) -> None:
    from dataclasses import replace

    shape = checked_shape(PLAIN)
    assert not same_cache_geometry(shape, replace(shape, **change))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; known: llama, mistral, qwen2, qwen3"),
        ({"model_type": "mixtral"}, "'mixtral' is not supported"),
        ({"model_type": None}, "None is not supported"),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, "text_config marks a multi-modal model"),
        ({"vision_config": {"hidden_size": 3}}, "vision_config marks a multi-modal model"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window 4096 is not supported"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 128}, "sliding_window 128"),
        ({"model_type": "qwen3", "sliding_window": 64, "layer_types": ["sliding_attention"] * 2}, "sliding_window 64"),
        ({"quantization_config": {"bits": 4}}, "quantised weights cannot be cut"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide the 4 heads"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_sentence(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        checked_shape({**PLAIN, **fields}, "teacher/config.json")
    assert str(error.value).startswith("teacher/config.json: ") and "\n" not in str(error.value)


def test_a_mistral_that_does_not_mention_its_window_has_one() -> None:
    """`transformers` gives such a config a window of 4096 tokens."""
    silent = {key: value for key, value in PLAIN.items() if key != "sliding_window"} | {"model_type": "mistral"}
    with pytest.raises(UserError, match="sliding_window 4096"):
        checked_shape(silent)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_window_that_is_switched_off_is_no_obstacle(name: str) -> None:
    off = {"sliding_window": None} if name == "mistral" else {"sliding_window": 4096, "use_sliding_window": False}
    assert checked_shape({**PLAIN, **off, "model_type": name}).architecture == name
