"""The compiled decoder writes what the eager one writes. Each case compiles, which takes seconds: integration tests."""

from __future__ import annotations

import pytest
import torch
from pairs import PAD, full_model, student_model

from overfill import kernels
from overfill.engine import Engine
from overfill.generation import generate

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler"),
    pytest.mark.filterwarnings("ignore"),  # the compiler's own
]
PROMPTS = torch.tensor([[3, 14, 5, 9, 26, 8], [0, 0, 9, 8, 7, 13], [0, 0, 0, 0, 0, 4]])
MASK = PROMPTS != PAD


@pytest.mark.parametrize("kind", ["llama", "qwen2-some-layers-slide"])
def test_the_same_text_in_one_graph_however_long(kind: str) -> None:
    full, student = full_model(kind), student_model(kind)
    eager, compiled = Engine(full, student), Engine(full, student, "compiled")
    options = {"attention_mask": MASK, "eos_token_id": None}
    for count in (50, 58):  # over 64 columns only the second time, with the same graph
        expected = generate(eager, PROMPTS, max_new_tokens=count, **options)
        assert torch.equal(generate(compiled, PROMPTS, max_new_tokens=count, **options), expected)
        seconds = compiled.compile_seconds
        assert seconds > 0
    assert generate(compiled, PROMPTS, max_new_tokens=9, refresh=3, **options).equal(
        generate(eager, PROMPTS, max_new_tokens=9, refresh=3, **options)
    )
    assert compiled.compile_seconds == seconds


def test_exact_mode_verifies_in_one_graph_whatever_it_drafted() -> None:
    full, student = full_model("mistral-slides"), student_model("mistral-slides")
    options = {"attention_mask": MASK, "max_new_tokens": 20}
    expected = generate(Engine(full, full), PROMPTS, **options)
    compiled = Engine(full, student, "compiled")
    assert torch.equal(generate(compiled, PROMPTS, exact=True, **options), expected)
    assert len(compiled.full._steps) == 1


@pytest.mark.parametrize("weights", ["stored", "int8"])
def test_in_bf16_logits_are_close_to_the_eager_ones(weights: str) -> None:
    full, student = full_model("qwen3").bfloat16(), student_model("qwen3").bfloat16()
    eager, compiled = Engine(full, student), Engine(full, student, "compiled", weights)
    tokens, found = torch.tensor([7, 8, 9]), []
    for engine in (eager, compiled):
        _, state = engine.prefill(PROMPTS, MASK, room=4)
        found.append(torch.stack([engine.decode_one(state, tokens) for _ in range(3)]).float())
    difference = (found[0] - found[1]).abs().max() / found[0].abs().max()
    assert difference < (0.03 if weights == "stored" else 0.08)
    assert difference > 0  # another kernel has been at work
