"""Named shapes are the published models', and a ratio resolves to legal widths."""

from __future__ import annotations

import pytest

from overfill.architectures import checked_shape
from overfill.config import PruneConfig
from overfill.errors import UserError
from overfill.named_shapes import SHAPES, named_shape
from overfill.shapes import resolve_widths

PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b-v0.3": 7_248_023_552,
}
"""As the model cards and weight files say, tied embeddings counted once."""


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_a_named_shape_has_the_published_number_of_parameters(name):
    shape = named_shape(name)
    assert shape.full.parameters() == PARAMETERS[name]
    assert shape.widths is None and shape.student is None
    assert checked_shape(SHAPES[name], name).parameters() == PARAMETERS[name], "and it is one that can be cut"


def test_every_named_shape_is_checked():
    assert set(SHAPES) == set(PARAMETERS)


def test_a_ratio_means_both_widths_resolved_as_an_experiments():
    shape = named_shape("llama-3.2-3b:0.45")
    assert shape.widths == resolve_widths(shape.full, PruneConfig(hidden=0.45, intermediate=0.45))
    assert shape.student is not None
    assert (shape.student.hidden, shape.student.intermediate) == (1728, 4480)
    assert shape.student.parameters() == 1_268_367_552
    assert shape.student.kv_bytes_per_token("bf16") == shape.full.kv_bytes_per_token("bf16")


@pytest.mark.parametrize("text", ["llama-4:0.5", "llama", ""])
def test_an_unknown_name_lists_the_known_ones(text):
    with pytest.raises(UserError, match="qwen2.5-0.5b.*mistral-7b-v0.3") as caught:
        named_shape(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ratio", ["1", "-0.1", "half", "nan", ""])
def test_a_ratio_is_a_share_below_one(ratio):
    with pytest.raises(UserError, match="ratio"):
        named_shape(f"qwen3-4b:{ratio}")
