"""Scores against a direct computation from recorded activations; merging, padding, dummy rows, files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from overfill.errors import UserError
from overfill.importance import ImportanceAccumulator, ImportanceScores
from overfill.shapes import PrunedWidths

Batch = tuple[Tensor, Tensor]


def batch_of(lengths: list[int], width: int, side: str = "right", seed: int = 0) -> Batch:
    """Random tokens [B, T] and a mask with the given number of real tokens on one side."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 53, (len(lengths), width), generator=generator)
    positions = torch.arange(width)
    rows = [positions < length if side == "right" else positions >= width - length for length in lengths]
    return tokens, torch.stack(rows)


def accumulate(model: PreTrainedModel, batches: list[Batch], **options: Any) -> ImportanceAccumulator:
    accumulator = ImportanceAccumulator(model, **options)
    with accumulator:
        for tokens, mask in batches:
            accumulator.update(tokens, mask)
    return accumulator


def direct_scores(model: PreTrainedModel, batches: list[Batch], across: str = "l2") -> dict[str, Tensor]:
    """Each sample alone and without padding, everything kept; formulas written out."""
    norms: dict[int, list[Tensor]] = {}
    inner: dict[int, list[Tensor]] = {}
    moments: list[Tensor] = []

    def keep(store: dict[int, list[Tensor]], key: int) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, out: store.setdefault(key, []).append(out[0].double().abs().mean(0))

    handles = []
    for index, layer in enumerate(model.model.layers):
        handles.append(layer.input_layernorm.register_forward_hook(keep(norms, 2 * index)))
        handles.append(layer.post_attention_layernorm.register_forward_hook(keep(norms, 2 * index + 1)))
        hook = keep(inner, index)
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(lambda m, a, hook=hook: hook(m, a, a[0])))
    with torch.no_grad():
        for tokens, mask in batches:
            for row, real in zip(tokens, mask, strict=True):
                if real.any():
                    cache = model(row[real][None], use_cache=True).past_key_values
                    squares = [[t[0].double().square().sum((0, 2)) for t in (y.keys, y.values)] for y in cache.layers]
                    moments.append(torch.stack([torch.stack(pair) for pair in squares]))  # [L, 2, T]
    for handle in handles:
        handle.remove()

    def over_samples(means: list[Tensor]) -> Tensor:
        stacked = torch.stack(means)
        return stacked.norm(dim=0) if across == "l2" else stacked.mean(0)

    return {
        "hidden": torch.stack([over_samples(means) for means in norms.values()]).sum(0),
        "intermediate": torch.stack([over_samples(means) for means in inner.values()]),
        "kv_second_moment": torch.cat(moments, dim=2).mean(2),
    }


def assert_scores(scores: ImportanceScores, expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(getattr(scores, name), value, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_of_padded_batches_equal_a_direct_computation_without_padding(
    any_model: PreTrainedModel, side: str
) -> None:
    batches = [batch_of([5, 9, 1], 9, side, seed=1), batch_of([4, 3], 6, side, seed=2)]
    scores = accumulate(any_model, batches).scores()
    assert_scores(scores, direct_scores(any_model, batches))
    assert (scores.samples, scores.tokens) == (5, 22)


def test_the_mean_over_samples_equals_a_direct_computation(llama: PreTrainedModel) -> None:
    batches = [batch_of([5, 9, 1], 9, seed=1), batch_of([4, 3], 6, seed=2)]
    scores = accumulate(llama, batches, across="mean").scores()
    assert_scores(scores, direct_scores(llama, batches, across="mean"))


def test_absolute_values_are_taken_before_the_mean(llama: PreTrainedModel) -> None:
    """The signed mean cancels: a channel that swings between -1 and 1 would score 0 and be cut."""
    batch = batch_of([6], 6)
    with ImportanceAccumulator(llama) as accumulator:
        norm = llama.get_submodule("model.layers.0.input_layernorm")
        alternating = torch.tensor([1.0, -1.0] * 3)[None, :, None].expand(1, 6, 32)
        # Registered after the accumulator's own: replay the hook on activations of our choosing.
        accumulator.update(*batch)
        before = accumulator.state_dict()["hidden_sum"][0].clone()
        next(iter(norm._forward_hooks.values()))(norm, (), alternating)
    torch.testing.assert_close(
        accumulator.state_dict()["hidden_sum"][0] - before, torch.ones(32, dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


def test_what_stands_in_the_padding_does_not_matter(llama: PreTrainedModel) -> None:
    tokens, mask = batch_of([5, 2], 8, "left")
    changed = torch.where(mask, tokens, (tokens + 7) % 53)
    first, second = (accumulate(llama, [(t, mask)]).scores() for t in (tokens, changed))
    assert torch.equal(first.hidden, second.hidden) and torch.equal(first.intermediate, second.intermediate)
    assert torch.equal(first.kv_second_moment, second.kv_second_moment)


def test_dummy_rows_are_not_counted(llama: PreTrainedModel) -> None:
    tokens, mask = batch_of([5, 0, 4], 7)
    with_dummy = accumulate(llama, [(tokens, mask), batch_of([0, 0], 3)]).scores()
    without = accumulate(llama, [(tokens[[0, 2]], mask[[0, 2]])]).scores()
    assert (with_dummy.samples, with_dummy.tokens) == (2, 9)
    torch.testing.assert_close(with_dummy.hidden, without.hidden, rtol=1e-6, atol=0)
    torch.testing.assert_close(with_dummy.kv_second_moment, without.kv_second_moment, rtol=1e-6, atol=0)


def test_two_merged_halves_equal_one_accumulator(llama: PreTrainedModel) -> None:
    batches = [batch_of([5, 9, 1], 9, seed=1), batch_of([4, 3], 6, seed=2), batch_of([2], 3, seed=3)]
    whole = accumulate(llama, batches)
    merged, other = accumulate(llama, batches[:1]), accumulate(llama, batches[1:])
    merged.merge(other)
    for name, total in whole.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], total, rtol=1e-14, atol=0)
    again = accumulate(llama, batches[:1])
    again.merge(other.state_dict())
    assert torch.equal(again.scores().hidden, merged.scores().hidden)


def test_summing_the_state_in_place_merges_workers(llama: PreTrainedModel) -> None:
    """What an all-reduce over `state_dict()` does."""
    one, two = accumulate(llama, [batch_of([5], 6, seed=1)]), accumulate(llama, [batch_of([4], 6, seed=2)])
    for name, tensor in one.state_dict().items():
        tensor += two.state_dict()[name]
    assert one.scores().samples == 2 and one.scores().tokens == 9


def test_sums_of_unlike_aggregations_do_not_merge(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="l2.*mean"):
        ImportanceAccumulator(llama).merge(ImportanceAccumulator(llama, across="mean"))


def test_memory_does_not_grow_with_samples(llama: PreTrainedModel) -> None:
    accumulator = accumulate(llama, [batch_of([5], 6)])
    size = sum(tensor.numel() for tensor in accumulator.state_dict().values())
    with accumulator:
        for seed in range(5):
            accumulator.update(*batch_of([5, 4], 6, seed=seed))
    assert sum(tensor.numel() for tensor in accumulator.state_dict().values()) == size
    assert accumulator.scores().samples == 11


def test_no_hook_stays_on_the_model(llama: PreTrainedModel) -> None:
    accumulate(llama, [batch_of([5], 6)])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())


def test_calibrating_outside_the_context_or_in_training_mode_is_refused(llama: PreTrainedModel) -> None:
    accumulator = ImportanceAccumulator(llama)
    with pytest.raises(RuntimeError, match="with accumulator"):
        accumulator.update(*batch_of([2], 2))
    with pytest.raises(RuntimeError, match="evaluation mode"), accumulator:
        llama.train()
        accumulator.update(*batch_of([2], 2))


def test_scores_of_nothing_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="no sample"):
        accumulate(llama, [batch_of([0], 3)]).scores()


def test_a_wrapped_model_is_called_through_its_wrapper(llama: PreTrainedModel) -> None:
    calls: list[dict[str, Any]] = []

    def wrapper(**arguments: Any) -> Any:
        calls.append(arguments)
        return llama(**arguments)

    batch = batch_of([4, 2], 5, "left")
    scores = accumulate(llama, [batch], forward=wrapper).scores()
    assert torch.equal(scores.hidden, accumulate(llama, [batch]).scores().hidden)
    assert len(calls) == 1 and calls[0]["logits_to_keep"] == 1
    assert calls[0]["position_ids"].tolist() == [[0, 0, 1, 2, 3], [0, 0, 0, 0, 1]]  # as if there were no padding
    assert calls[0]["past_key_values"].get_seq_length() == 0  # nothing was kept


def scores_of(hidden: list[float], intermediate: list[list[float]]) -> ImportanceScores:
    layers = len(intermediate)
    moment = torch.full((layers, 2), 3.0, dtype=torch.float64)
    one, two = torch.tensor(hidden, dtype=torch.float64), torch.tensor(intermediate, dtype=torch.float64)
    return ImportanceScores(one, two, moment, samples=4, tokens=9)


def test_the_best_channels_are_kept_in_ascending_order_ties_by_index() -> None:
    scores = scores_of([1.0, 5.0, 1.0, 1.0, 7.0], [[2.0, 2.0, 2.0], [0.0, 1.0, 2.0]])
    kept = scores.keep(PrunedWidths(3, 2, 0, 0, 0, 0, 0))
    assert kept.hidden.tolist() == [0, 1, 4]
    assert kept.intermediate.tolist() == [[0, 1], [1, 2]]


def test_more_channels_than_there_are_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match="cannot keep 4 of 3"):
        scores_of([1.0, 2.0, 3.0], [[1.0]]).keep(PrunedWidths(4, 1, 0, 0, 0, 0, 0))


@given(values=st.lists(st.integers(0, 3), min_size=1, max_size=40), data=st.data())
def test_keeping_equals_a_plain_sort_by_score_and_index(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    kept = scores_of([float(v) for v in values], [[0.0]]).keep(PrunedWidths(count, 1, 0, 0, 0, 0, 0))
    expected = sorted(sorted(range(len(values)), key=lambda index: (-values[index], index))[:count])
    assert kept.hidden.tolist() == expected


def test_scores_come_back_from_their_file(llama: PreTrainedModel, tmp_path: Path) -> None:
    scores = accumulate(llama, [batch_of([5, 3], 6)], across="mean").scores()
    scores.save(tmp_path / "scores.safetensors")
    loaded = ImportanceScores.load(tmp_path / "scores.safetensors")
    for name in ("hidden", "intermediate", "kv_second_moment"):
        assert torch.equal(getattr(loaded, name), getattr(scores, name))
    assert (loaded.samples, loaded.tokens, loaded.across) == (2, 8, "mean")


def test_equal_scores_are_equal_files_and_those_of_earlier_versions_can_be_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    scores, path = scores_of([1.0, 2.0], [[1.0]]), tmp_path / "scores.safetensors"
    written = set()
    for _ in range(8):
        scores.save(path)
        written.add(path.read_bytes())
    assert len(written) == 1
    earlier = {"format": "overfill-importance-1", "samples": "3", "tokens": "40", "across": "mean"}
    save_file(load_file(path), path, metadata=earlier)
    loaded = ImportanceScores.load(path)
    assert (loaded.hidden.tolist(), loaded.samples, loaded.tokens, loaded.across) == ([1.0, 2.0], 3, 40, "mean")


def test_missing_torn_and_foreign_score_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    with pytest.raises(UserError, match="no such file"):
        ImportanceScores.load(path)
    scores_of([1.0], [[1.0]]).save(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="torn"):
        ImportanceScores.load(path)
    from safetensors.torch import save_file

    save_file({"hidden": torch.ones(1)}, path)
    with pytest.raises(UserError, match="format None, wanted 'overfill-importance-1'"):
        ImportanceScores.load(path)
