"""The CPU kernels against plain products, and the twin that uses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pairs import build, config_of
from torch import nn
from transformers import AttentionInterface

from overfill import attention, fast_linear, huge_pages, kernels
from overfill.engine import Engine
from overfill.errors import UserError
from overfill.fast_linear import FastLinear, Int8Linear, fast_twin, weight_bytes
from overfill.reader import Reader, choose_decoder

needs_compiler = pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler")
CPU = torch.device("cpu")


def layer(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16).requires_grad_(False)


@needs_compiler
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9, 32, 33])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 1), (48, 17), (1728, 72)])
def test_products_are_right_for_any_shape(
    rows: int, inputs: int, outputs: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels.load()
    monkeypatch.setattr(fast_linear, "_has_bf16_arithmetic", lambda: native)
    linear, x = layer(inputs, outputs), torch.randn(rows, inputs, dtype=torch.bfloat16)
    expected = F.linear(x.float(), linear.weight.float(), linear.bias.float())
    torch.testing.assert_close(FastLinear(linear)(x).float(), expected, atol=1e-2, rtol=1e-2)
    shaped = FastLinear(linear)(x[:, None])
    assert shaped.shape == (rows, 1, outputs)
    assert shaped.dtype == torch.bfloat16


@needs_compiler
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_int8_is_the_nearest_of_255_steps_per_channel(rows: int) -> None:
    kernels.load()
    linear, x = layer(64, 40, bias=False), torch.randn(rows, 64, dtype=torch.bfloat16)
    rounded = Int8Linear(linear)
    wide = rounded.weight.float() * rounded.scale[:, None]
    step = linear.weight.float().abs().amax(1, keepdim=True) / 127
    assert bool(((wide - linear.weight.float()).abs() <= 0.51 * step).all())
    assert int(rounded.weight.abs().max()) == 127
    torch.testing.assert_close(rounded(x).float(), F.linear(x.float(), wide), atol=1e-2, rtol=1e-2)


@needs_compiler
@pytest.mark.parametrize(
    ("groups", "length", "columns", "width"), [(1, 1, 3, 16), (3, 1, 70, 32), (2, 5, 200, 128), (1, 9, 64, 48)]
)
def test_grouped_attention_is_attention(groups: int, length: int, columns: int, width: int) -> None:
    kernels.load()
    torch.manual_seed(groups)
    q = torch.randn(2, length, 4 * groups, width, dtype=torch.bfloat16).transpose(1, 2)
    store = torch.randn(2, columns + 9, 2, 4, width, dtype=torch.bfloat16).permute(0, 2, 3, 1, 4)[..., :columns, :]
    mask = torch.rand(2, 1, length, columns) > 0.4
    mask[..., columns // 2] = True
    found = torch.ops.overfill.grouped_attention(q, store[0], store[1], mask, 0.3)
    k, v = (part.float().repeat_interleave(groups, dim=1) for part in store)
    expected = F.scaled_dot_product_attention(q.float(), k, v, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(found.float(), expected.transpose(1, 2), atol=1e-2, rtol=1e-2)


@needs_compiler
def test_a_compiled_engine_attends_through_the_kernel_and_an_eager_one_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels.load()
    calls: list[int] = []
    real = attention.grouped_attention_on_cpu
    monkeypatch.setitem(
        AttentionInterface._global_mapping, attention.ON_CPU, lambda *a, **k: (calls.append(1), real(*a, **k))[1]
    )
    model, ids = build(config_of("llama"), seed=1), torch.tensor([[3, 4, 5, 6]])
    for decoder in ("eager", "compiled"):
        Engine(model, model, decoder).prefill(ids, ids > 0, room=1, chunk=2)
        assert len(calls) == (0 if decoder == "eager" else 2 * 3)  # two chunks, three layers


@needs_compiler
def test_loading_the_kernels_leaves_the_rounding_of_the_process_alone() -> None:
    kernels.load()
    tiny = torch.tensor([1e-40])  # denormal: flushed to zero by a library that was linked with -ffast-math
    assert float(tiny * 1.0) != 0.0


@needs_compiler
def test_a_twin_shares_every_weight_that_it_does_not_round_and_leaves_the_model_alone() -> None:
    model = build(config_of("qwen3"), seed=1).to(torch.bfloat16)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    twin = fast_twin(model)
    assert {name: parameter.data_ptr() for name, parameter in twin.named_parameters()} == before
    assert not any(isinstance(module, FastLinear) for module in model.modules())
    assert sum(isinstance(module, FastLinear) for module in twin.modules()) == 7 * 3 - 3 + 1  # down: 40 inputs
    rounded = fast_twin(model, "int8")
    assert sum(isinstance(module, Int8Linear) for module in rounded.modules()) == 7 * 3 - 3 + 1
    assert 0.5 < weight_bytes(rounded) / weight_bytes(model) < 0.75


@needs_compiler
@pytest.mark.parametrize("weights", ["stored", "int8"])
def test_a_compiled_reader_streams_its_weights_from_huge_pages(weights: str) -> None:
    model = build(config_of("qwen3"), seed=1).to(torch.bfloat16)
    expected = {name: parameter.clone() for name, parameter in model.named_parameters()}
    reader = Reader(model, "compiled", weights)
    assert all(huge_pages.is_inside(tensor) for tensor in (*reader.model.parameters(), *reader.model.buffers()))
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
    if weights == "stored":
        assert all(huge_pages.is_inside(parameter) for parameter in model.parameters()), "shared, not copied"
    assert not any(map(huge_pages.is_inside, Reader(build(config_of("qwen3"), seed=1), "eager").model.parameters()))


def test_a_step_reads_the_head_and_not_the_embedding_unless_they_are_one() -> None:
    config = config_of("llama")
    apart = build(config, seed=1)
    config.tie_word_embeddings = True
    tied = build(config, seed=1)
    assert weight_bytes(apart) == weight_bytes(tied)


def test_a_build_that_fails_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'kernel: error: no such luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="no such luck"):
        kernels._build(kernels.library_path())
    assert list((tmp_path / "cache" / "overfill").iterdir()) == []


def test_without_a_compiler_auto_is_eager_and_compiled_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(kernels, "_LOADED", [False])
    monkeypatch.delenv("CXX", raising=False)
    assert choose_decoder("auto", CPU) == "eager"
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        choose_decoder("compiled", CPU)


@pytest.mark.parametrize(
    ("decoder", "weights", "words"),
    [("fast", "stored", "decoder: 'fast'"), ("eager", "int4", "int4")],
)
def test_what_is_not_possible_is_refused(decoder: str, weights: str, words: str) -> None:
    model = build(config_of("llama"), seed=1)
    with pytest.raises(UserError, match=words):
        Engine(model, model, decoder, weights)
