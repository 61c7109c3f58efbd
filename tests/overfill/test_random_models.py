"""Random models: finite, reproducible, of the right shape, without a network; and a student that resembles them."""

from __future__ import annotations

import socket

import pytest
import torch
from transformers import PreTrainedModel

from overfill.config import PruneConfig
from overfill.named_shapes import SHAPES
from overfill.random_models import random_model, related_student
from overfill.shapes import ModelShape, resolve_widths

SMALL = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 307,
}


def small(name: str) -> dict[str, object]:
    """A named model's config with small sizes."""
    return {**SHAPES[name], **SMALL}


def logits(model: PreTrainedModel) -> torch.Tensor:
    """[1, 64, V] for a fixed prompt."""
    ids = torch.randint(0, 307, (1, 64), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(ids).logits.float()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-3.2-3b", "qwen2.5-7b", "qwen3-4b", "mistral-7b-v0.3"])
def test_a_random_model_is_whole_finite_and_fetches_nothing(name, dtype, no_network):
    model = random_model(small(name), dtype)
    shape = ModelShape.from_config(small(name))
    assert sum(p.numel() for p in model.parameters()) == shape.parameters()
    assert all(p.dtype is dtype and not p.requires_grad for p in model.parameters())
    assert not model.training
    out = logits(model)
    assert out.isfinite().all()
    assert 0.3 < float(out.std()) < 10
    assert len(out.argmax(-1).unique()) > 4, "the model says different things at different places"


def test_no_row_of_a_matrix_is_another():
    # A power of two: rows would repeat if the block's length were one as well.
    sizes = {"vocab_size": 16_384, "hidden_size": 128, "num_attention_heads": 8}
    model = random_model({**small("llama-3.2-3b"), **sizes}, torch.float32)
    table = model.get_input_embeddings().weight
    assert table.numel() > 1_048_573, "the block is used more than once"
    assert len(table.unique(dim=0)) == len(table)


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, same, other = (random_model(small("qwen3-4b"), torch.float32, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(logits(one), logits(same))
    assert not torch.equal(logits(one), logits(other))


def test_the_student_is_narrower_and_mostly_agrees():
    full = random_model(small("llama-3.2-3b"), torch.float32)
    shape = ModelShape.from_config(full.config.to_dict())
    widths = resolve_widths(shape, PruneConfig(hidden=0.45, intermediate=0.45))
    student = related_student(full, widths)
    cut = shape.pruned(widths.hidden, widths.intermediate)
    assert sum(p.numel() for p in student.parameters()) == cut.parameters() < 0.6 * shape.parameters()
    weight = student.model.layers[1].mlp.gate_proj.weight
    assert torch.equal(weight, full.model.layers[1].mlp.gate_proj.weight[: widths.intermediate, : widths.hidden])
    assert agreement(full, student) > 0.6
    assert agreement(full, random_model(cut_config(widths.hidden, widths.intermediate), torch.float32, seed=9)) < 0.2


def agreement(one: PreTrainedModel, other: PreTrainedModel) -> float:
    """Share of places where both would write the same token."""
    return float((logits(one).argmax(-1) == logits(other).argmax(-1)).float().mean())


def cut_config(hidden: int, intermediate: int) -> dict[str, object]:
    return {**small("llama-3.2-3b"), "hidden_size": hidden, "intermediate_size": intermediate}
