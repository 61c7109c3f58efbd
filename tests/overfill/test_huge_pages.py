"""Weights in huge pages: the same numbers in the same objects, in memory that is given back."""

from __future__ import annotations

import gc
import mmap
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from overfill import huge_pages


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 7), nn.Linear(64, 65, dtype=torch.bfloat16), nn.BatchNorm1d(5))
    model[0].bias = None
    model.append(nn.Linear(33, 7, bias=False))
    model[3].weight = model[0].weight
    return model.requires_grad_(False)


def test_a_moved_model_is_the_same_model_in_another_place():
    model = layers()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    huge_pages.move(model)
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        assert tensor is tensors[name], name
        assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype, name
        assert huge_pages.is_inside(tensor) and tensor.data_ptr() % huge_pages.ALIGNMENT == 0, name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, "or a saved tensor would drag its neighbours along"
    assert model[3].weight is model[0].weight
    places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors.values())
    assert all(stop <= start for (_, stop), (start, _) in pairwise(places)), "none overlaps another"
    model[0].weight.add_(1)
    assert torch.equal(model[1].weight, before["1.weight"])


def test_what_was_moved_stays_and_what_came_later_follows():
    model = layers()
    huge_pages.move(model)
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    model.append(nn.Linear(3, 2))
    huge_pages.move(model)
    assert {n: p.data_ptr() for n, p in model.named_parameters() if not n.startswith("4")} == places
    assert huge_pages.is_inside(model[4].weight)


def test_memory_is_given_back_with_its_last_tensor():
    gc.collect()
    arenas = len(huge_pages._ARENAS)
    model = layers()
    huge_pages.move(model)
    kept = model[1].weight
    del model
    gc.collect()
    assert len(huge_pages._ARENAS) == arenas + 1
    assert bool(torch.isfinite(kept.float()).all())
    del kept
    gc.collect()
    assert len(huge_pages._ARENAS) == arenas


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on this system")
def test_the_kernel_is_asked_for_huge_pages():
    arena = huge_pages.reserve(8 * huge_pages.HUGE)
    assert arena.address % huge_pages.HUGE == 0
    mapping = next(
        part
        for part in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
        if int(part.split("-")[0], 16) <= arena.address < int(part.split("-")[1].split()[0], 16)
    )
    assert " hg" in re.search("VmFlags:.*", mapping).group()
