from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.corpus.shards import TokenShards, write_samples
from pipeline.training import datasource, stream
from pipeline.training.stream import StepRows, StreamPlan, read_block, read_step, stream_steps

SEQUENCES = 7


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    generator = np.random.default_rng(0)

    def ids() -> list[int]:
        return generator.integers(0, 99, generator.integers(1, 20)).tolist()

    return write_samples(tmp_path_factory.mktemp("shards"), [(ids(), ids(), "") for _ in range(50)])


def plan(shards: TokenShards, *, workers: int = 1, micro_batch: int = 3, rank: int = 0, steps: int = 12) -> StreamPlan:
    return StreamPlan(shards.folder, SEQUENCES, 5, steps=steps, workers=workers, micro_batch=micro_batch, rank=rank)


def as_values(step: StepRows) -> tuple[object, ...]:
    rows = [[None if row is None else (row[0].tolist(), row[1].tolist()) for row in part] for part in step.rows]
    return step.step, [part.tolist() for part in step.samples], rows


def global_batch(shards: TokenShards, step: int, workers: int, micro_batch: int) -> set[tuple[int, tuple[int, ...]]]:
    found = []
    for rank in range(workers):
        mine = read_step(plan(shards, workers=workers, micro_batch=micro_batch, rank=rank), step)
        for samples, rows in zip(mine.samples, mine.rows, strict=True):
            found += [(int(s), tuple(r[0])) for s, r in zip(samples, rows, strict=True) if r is not None]
    assert len(found) == SEQUENCES
    return set(found)


@pytest.mark.parametrize(("workers", "micro_batch"), [(1, 1), (2, 3), (3, 2), (5, 8)])
def test_a_global_batch_is_the_same_however_it_is_dealt(shards: TokenShards, workers: int, micro_batch: int) -> None:
    for step in (0, 7, 11):
        assert global_batch(shards, step, workers, micro_batch) == global_batch(shards, step, 1, SEQUENCES)


def test_each_slot_holds_the_ids_of_its_sample(shards: TokenShards) -> None:
    step = read_step(plan(shards, workers=2, micro_batch=3, rank=1), 4)
    empty = 0
    for samples, rows in zip(step.samples, step.rows, strict=True):
        for sample, row in zip(samples, rows, strict=True):
            if row is None:
                empty += 1
                assert sample == -1
            else:
                expected = shards.read([sample])[0]
                assert np.array_equal(row[0], expected.prompt)
                assert np.array_equal(row[1], expected.response)
    assert empty == 3  # 7 sequences in 2 x 2 x 3 slots, three of the five empty ones are this rank's


def test_packing_steps_into_a_block_and_unpacking_them_changes_nothing(shards: TokenShards) -> None:
    asked = plan(shards, workers=2, micro_batch=3, rank=1)
    steps = [read_step(asked, step) for step in (3, 4, 5)]
    unpacked = list(stream._unpack(stream._pack(steps), asked.micro_batch))
    assert [as_values(step) for step in unpacked] == [as_values(step) for step in steps]


def test_a_block_holds_consecutive_steps_and_ends_with_the_run(shards: TokenShards) -> None:
    asked = plan(shards)
    [table] = stream.read_block(asked, 9)
    assert [step.step for step in stream._unpack(table, asked.micro_batch)] == [9, 10, 11]


def test_a_step_out_of_turn_stops_training(shards: TokenShards, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(reads: object) -> list[pa.Table]:
        return [stream._pack([read_step(plan(shards), step)]) for step in (2, 4)]

    monkeypatch.setattr(datasource, "stream_blocks", swapped)
    steps = stream_steps(plan(shards), 2)
    assert next(steps).step == 2
    with pytest.raises(RuntimeError, match="yielded step 4 where step 3 was due"):
        next(steps)


def test_a_stream_that_ends_early_stops_training(shards: TokenShards, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(reads: object) -> list[pa.Table]:
        return [stream._pack([read_step(plan(shards), 10)])]

    monkeypatch.setattr(datasource, "stream_blocks", short)
    with pytest.raises(RuntimeError, match="ended before step 11 of 12"):
        list(stream_steps(plan(shards), 10))


def test_a_finished_run_streams_nothing_and_starts_no_task(shards: TokenShards) -> None:
    assert list(stream_steps(plan(shards), 12)) == []


def test_small_steps_share_a_block_and_large_ones_do_not(shards: TokenShards) -> None:
    assert plan(shards).steps_per_block == stream.MOST_STEPS_PER_BLOCK
    large = StreamPlan(shards.folder, 100_000, seed=0, steps=5, workers=1, micro_batch=8, rank=0)
    assert large.steps_per_block == 1


def test_a_long_run_has_few_blocks_so_that_its_plan_is_made_quickly(shards: TokenShards) -> None:
    large = StreamPlan(shards.folder, 100_000, seed=0, steps=1_000_000, workers=1, micro_batch=8, rank=0)
    assert large.steps / large.steps_per_block <= stream.MOST_BLOCKS


def test_every_function_becomes_one_task_in_order() -> None:
    tables = [pa.table({"step": [step]}) for step in range(5)]
    tasks = datasource.BlockDatasource([partial(list, [table]) for table in tables]).get_read_tasks(2)
    assert [next(iter(task())) for task in tasks] == tables


def test_a_process_that_is_kept_reads_what_was_built_anew(tmp_path: Path) -> None:
    place = tmp_path / "train"
    write_samples(place, [([1], [number], "") for number in (2, 3)])
    plan = StreamPlan(place, 2, 0, steps=1, workers=1, micro_batch=2, rank=0)
    before = sorted(read_block(plan, 0)[0].column("response").to_pylist())
    place.rename(tmp_path / "altered")
    assert sorted(read_block(plan, 0)[0].column("response").to_pylist()) == before == [[2], [3]], "it has them open"
    write_samples(place, [([1], [number], "") for number in (4, 5)])
    assert sorted(read_block(plan, 0)[0].column("response").to_pylist()) == [[4], [5]]
