"""Calibration with a full model that DeepSpeed shards over two workers (ZeRO stage 3, gloo, CPU)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from overfill.importance import ImportanceAccumulator, ImportanceScores

WORKERS = 2
LENGTHS = ([7, 3], [5, 0], [2, 6], [0, 0])
"""Real tokens of the rows of each batch; dealt round robin, so that worker 1 ends with a batch of dummy rows."""


def full_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    return LlamaForCausalLM(config).eval()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(3, 50, (2, 7), generator=generator), torch.arange(7) < torch.tensor(lengths)[:, None])
        for lengths in LENGTHS
    ]


def worker(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORKERS), DS_ACCELERATOR="cpu")
    import deepspeed
    import deepspeed.ops
    import torch.distributed as dist

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    # By a file, for a port that was free a moment ago may be taken.
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-point", rank=rank, world_size=WORKERS)
    settings: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
    # Above zero, DeepSpeed leaves parameters that small whole on every worker.
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    model = full_model().requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=model, config=settings, dist_init_required=False)
    engine.eval()
    assert all(parameter.numel() == 0 for parameter in engine.module.parameters()), "nothing is sharded"
    accumulator = ImportanceAccumulator(engine.module, forward=engine)
    with accumulator:
        for tokens, mask in batches()[rank::WORKERS]:
            accumulator.update(tokens, mask)
    for tensor in accumulator.state_dict().values():
        dist.all_reduce(tensor)
    if rank == 0:
        accumulator.scores().save(Path(folder) / "scores.safetensors")
    dist.barrier()
    # Without Python's own end: there the threads of gloo groups that DeepSpeed still holds abort the process now and then.
    os._exit(0)


@pytest.mark.integration
def test_a_sharded_full_model_gives_the_scores_of_a_whole_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=WORKERS)
    sharded = ImportanceScores.load(tmp_path / "scores.safetensors")

    with ImportanceAccumulator(full_model()) as accumulator:
        for tokens, mask in batches():
            accumulator.update(tokens, mask)
    whole = accumulator.scores()
    assert (sharded.samples, sharded.tokens) == (whole.samples, whole.tokens) == (5, 23)
    for name in ("hidden", "intermediate", "kv_second_moment"):
        torch.testing.assert_close(getattr(sharded, name), getattr(whole, name), rtol=1e-6, atol=1e-9)
