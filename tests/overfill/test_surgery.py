"""Cutting models: against independent slicing, against `transformers`, against the folder path, and its refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from overfill.config import PruneConfig
from overfill.errors import UserError
from overfill.importance import ImportanceScores, KeptChannels
from overfill.shapes import ModelShape, PrunedWidths, resolve_widths
from overfill.surgery import prune, prune_folder, random_student

TOKENS = torch.arange(2 * 7).reshape(2, 7) % 50


def random_scores(config: PreTrainedConfig, seed: int = 0) -> ImportanceScores:
    generator = torch.Generator().manual_seed(seed)
    layers = config.num_hidden_layers
    return ImportanceScores(
        hidden=torch.rand(config.hidden_size, generator=generator, dtype=torch.float64),
        intermediate=torch.rand(layers, config.intermediate_size, generator=generator, dtype=torch.float64),
        kv_second_moment=torch.ones(layers, 2, dtype=torch.float64),
        samples=1,
        tokens=1,
    )


def widths(config: PreTrainedConfig, hidden: float | int = 0.5, intermediate: float | int = 0.4) -> PrunedWidths:
    shape = ModelShape.from_config(config.to_dict())
    return resolve_widths(shape, PruneConfig(hidden=hidden, intermediate=intermediate))


def sliced_by_hand(model: PreTrainedModel, kept: KeptChannels) -> dict[str, Tensor]:
    """The student's weights by plain indexing, written without the table of the source."""
    h = kept.hidden
    out: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        module, kind = name.rsplit(".", 2)[-2:]
        if module in ("embed_tokens", "lm_head"):
            out[name] = weight[:, h]
        elif module in ("input_layernorm", "post_attention_layernorm", "norm"):
            out[name] = weight[h]
        elif module in ("q_norm", "k_norm"):
            out[name] = weight
        elif module in ("q_proj", "k_proj", "v_proj"):
            out[name] = weight[:, h] if kind == "weight" else weight
        elif module == "o_proj":
            out[name] = weight[h]
        else:
            i = kept.intermediate[int(name.split(".")[2])]
            if module == "down_proj":
                out[name] = weight[h][:, i] if kind == "weight" else weight[h]
            else:
                out[name] = weight[i][:, h] if kind == "weight" else weight[i]
    return out


def test_pruned_weights_equal_an_independent_slicing(any_model: PreTrainedModel) -> None:
    student, kept = prune(any_model, random_scores(any_model.config), widths(any_model.config))
    expected = sliced_by_hand(any_model, kept)
    assert student.state_dict().keys() == expected.keys()
    for name, weight in student.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)


def test_pruning_keeps_the_highest_scores_of_every_layer(llama: PreTrainedModel) -> None:
    scores = random_scores(llama.config)
    student, kept = prune(llama, scores, widths(llama.config))
    dropped = torch.ones(llama.config.hidden_size, dtype=torch.bool).index_fill(0, kept.hidden, False)
    assert scores.hidden[kept.hidden].min() > scores.hidden[dropped].max()
    assert len({tuple(row.tolist()) for row in kept.intermediate}) == 3  # chosen per layer
    assert kept.intermediate.shape == (3, student.config.intermediate_size)


def test_a_pruned_student_loads_with_transformers_and_gives_equal_logits(
    any_model: PreTrainedModel, tmp_path: Path
) -> None:
    student, _ = prune(any_model, random_scores(any_model.config), widths(any_model.config))
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, student(TOKENS).logits, rtol=0, atol=0)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == any_model.config.tie_word_embeddings


def test_the_student_continues_on_the_full_models_cache(any_model: PreTrainedModel) -> None:
    student, _ = prune(any_model, random_scores(any_model.config), widths(any_model.config))
    with torch.no_grad():
        cache = any_model(TOKENS, use_cache=True).past_key_values
        own = student(TOKENS, use_cache=True).past_key_values
        for theirs, mine in zip(cache.layers, own.layers, strict=True):
            assert theirs.keys.shape == mine.keys.shape and theirs.values.shape == mine.values.shape
        logits = student(TOKENS[:, :1], past_key_values=cache, use_cache=True).logits
    assert logits.isfinite().all() and cache.get_seq_length() == 8


def test_nothing_pruned_is_bit_identical(any_model: PreTrainedModel) -> None:
    student, kept = prune(any_model, random_scores(any_model.config), widths(any_model.config, 0.0, 0.0))
    assert kept.hidden.tolist() == list(range(32))
    full = any_model.state_dict()
    assert all(torch.equal(weight, full[name]) for name, weight in student.state_dict().items())
    with torch.no_grad():
        assert torch.equal(student(TOKENS).logits, any_model(TOKENS).logits)


def test_a_student_generates_with_the_settings_of_its_full_model(llama: PreTrainedModel) -> None:
    llama.generation_config.eos_token_id = [2, 7]  # as chat models have it, beside the config's single one
    student, _ = prune(llama, random_scores(llama.config), widths(llama.config))
    assert student.generation_config.eos_token_id == [2, 7]


def test_pruning_leaves_the_full_model_alone(llama: PreTrainedModel) -> None:
    before = {name: weight.clone() for name, weight in llama.state_dict().items()}
    config = llama.config.to_dict()
    student, _ = prune(llama, random_scores(llama.config), widths(llama.config, 0.0, 0.0))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in llama.state_dict().items())
    assert llama.config.to_dict() == config


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hidden=st.floats(0.0, 0.95), intermediate=st.floats(0.0, 0.95), kind=st.sampled_from(["llama", "qwen3-tied"]))
def test_any_legal_width_runs_and_keeps_the_cache_geometry(
    model_of: Callable[[str], PreTrainedModel], hidden: float, intermediate: float, kind: str
) -> None:
    model = model_of(kind)
    student, kept = prune(model, random_scores(model.config), widths(model.config, hidden, intermediate))
    assert len(kept.hidden) == student.config.hidden_size
    attention, full = student.model.layers[0].self_attn, model.model.layers[0].self_attn
    assert attention.k_proj.out_features == full.k_proj.out_features
    assert attention.head_dim == full.head_dim and student.config.head_dim == full.head_dim
    with torch.no_grad():
        assert student(TOKENS).logits.isfinite().all()


@pytest.mark.parametrize("shard_bytes", [1 << 30, 4096])
def test_cutting_a_folder_equals_cutting_the_model(
    any_model: PreTrainedModel, tmp_path: Path, shard_bytes: int
) -> None:
    any_model.save_pretrained(tmp_path / "full", max_shard_size="6KB" if shard_bytes == 4096 else "1GB")
    (tmp_path / "full" / "tokenizer.json").write_text("{}")
    scores, narrow = random_scores(any_model.config), widths(any_model.config)
    student, kept = prune(any_model, scores, narrow)
    again = prune_folder(tmp_path / "full", scores, narrow, tmp_path / "student", shard_bytes)
    assert torch.equal(kept.hidden, again.hidden) and torch.equal(kept.intermediate, again.intermediate)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student", local_files_only=True)
    assert all(torch.equal(weight, student.state_dict()[name]) for name, weight in loaded.state_dict().items())
    assert (len(list((tmp_path / "student").glob("*.safetensors"))) > 1) == (shard_bytes == 4096)
    assert (tmp_path / "student" / "tokenizer.json").read_text() == "{}"
    assert loaded.generation_config.eos_token_id == any_model.generation_config.eos_token_id


def test_cutting_a_bf16_folder_keeps_bf16(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.to(torch.bfloat16).save_pretrained(tmp_path / "full")
    prune_folder(tmp_path / "full", random_scores(llama.config), widths(llama.config), tmp_path / "student")
    stored = load_file(tmp_path / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").dtype is torch.bfloat16


def test_a_tied_head_and_old_rotary_buffers_in_a_folder_are_left_out(
    model_of: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    model = model_of("llama-tied-biased")
    model.save_pretrained(tmp_path / "full")
    file = tmp_path / "full" / "model.safetensors"
    stored = load_file(file)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(stored, file, metadata={"format": "pt"})
    prune_folder(tmp_path / "full", random_scores(model.config), widths(model.config), tmp_path / "student")
    names = set(load_file(tmp_path / "student" / "model.safetensors"))
    assert "lm_head.weight" not in names and not any("rotary" in name for name in names)


def test_a_folder_with_missing_or_foreign_weights_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "full")
    file = tmp_path / "full" / "model.safetensors"
    stored = load_file(file)
    norm = stored.pop("model.norm.weight")
    save_file(stored, file)
    arguments = (random_scores(llama.config), widths(llama.config), tmp_path / "student")
    with pytest.raises(UserError, match="missing: model.norm.weight"):
        prune_folder(tmp_path / "full", *arguments)
    save_file({**stored, "model.norm.weight": norm, "model.extra.weight": norm.clone()}, file)
    with pytest.raises(UserError, match="unknown: model.extra.weight"):
        prune_folder(tmp_path / "full", *arguments)
    save_file({**stored, "model.norm.weight": norm[:-1].clone()}, file)
    with pytest.raises(UserError, match=r"model.norm.weight is \(31,\), config.json says \(32,\)"):
        prune_folder(tmp_path / "full", *arguments)


def test_scores_of_another_model_are_refused(llama: PreTrainedModel) -> None:
    other = LlamaConfig(hidden_size=64, intermediate_size=48, num_hidden_layers=3)
    with pytest.raises(UserError, match="calibrate this model"):
        prune(llama, random_scores(other), widths(llama.config))


def test_widths_that_transformers_refuses_are_refused_with_the_way_out(llama: PreTrainedModel) -> None:
    illegal = PrunedWidths(18, 48, 0.4, 0.0, 0.4, 0.0, 0.2)
    with pytest.raises(UserError, match="18 channels is not a multiple of the 4 heads"):
        prune(llama, random_scores(llama.config), illegal)
    too_wide = PrunedWidths(36, 48, 0.0, 0.0, 0.0, 0.0, 0.0)
    with pytest.raises(UserError, match="exceed"):
        prune(llama, random_scores(llama.config), too_wide)


def test_a_random_student_has_the_pruned_shape_and_depends_on_its_seed_alone(any_model: PreTrainedModel) -> None:
    narrow = widths(any_model.config)
    student, _ = prune(any_model, random_scores(any_model.config), narrow)
    torch.manual_seed(1)
    first = random_student(any_model.config, narrow, seed=5, dtype=torch.float32)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))  # the global random state was left alone
    again = random_student(any_model.config, narrow, seed=5, dtype=torch.float32)
    other = random_student(any_model.config, narrow, seed=6, dtype=torch.float32)
    assert {n: p.shape for n, p in first.named_parameters()} == {n: p.shape for n, p in student.named_parameters()}
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)
