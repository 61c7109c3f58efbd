"""Training on Ray Train workers with DeepSpeed and Ray Data: two workers against one, a killed worker, an error."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from machine_metrics import of_the_machine
from ray import cloudpickle, tune
from training_toys import WITHOUT_RAY, distill_run, make_inputs, read_directly

from overfill.checkpoint import load_student
from overfill.config import ImportanceConfig
from overfill.errors import UserError
from overfill.importance import ImportanceScores
from pipeline.cluster import remove_abandoned_groups
from pipeline.fingerprint import identity_config
from pipeline.stage import External, Stage, StageRun
from pipeline.stages.remote import WorkerFailed, run_on_worker
from pipeline.submission.fitting import HEAD, driver_bundle
from pipeline.training.calibrate import SCORES_FILE, measure_in
from pipeline.training.distill import train_in
from pipeline.training.distributed import Place
from pipeline.training.launch import TrainingFailed, run_workers
from pipeline.training.session import Services
from pipeline.training.stream import StepRows, StreamPlan, stream_steps
from pipeline.tune import AfterDeath

pytestmark = pytest.mark.integration
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests

KILL_AT = 7


@ray.remote(num_cpus=0.01)
class Trial:
    """An actor that starts training, as a Tune trial does."""

    def fit(self, function: Callable[[dict[str, Any]], dict[str, Any]], run: StageRun) -> dict[str, Any]:
        return run_workers(function, run)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def lines(run: StageRun) -> dict[int, dict[str, float]]:
    """Step -> metrics, without those of the machine."""
    found: dict[int, dict[str, float]] = {}
    for line in run.metrics_path.read_text().splitlines():
        values = json.loads(line)
        found.setdefault(values["step"], {}).update(values["metrics"])
    return {step: {k: v for k, v in m.items() if not of_the_machine(k)} for step, m in found.items()}


def weights(run: StageRun) -> dict[str, torch.Tensor]:
    return dict(load_student(run.staging / "model").named_parameters())


def largest_difference(one: StageRun, other: StageRun) -> float:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def calibration(root: Path, like: StageRun) -> StageRun:
    config = identity_config(ImportanceConfig(samples=11))
    stage = Stage("calibrate", 1, config, {"teacher": External("x", "x")}, "pipeline.stages.importance:run")
    folders = {name: root / "calibration" / name for name in ("staging", "progress")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    return dataclasses.replace(like, stage=stage, **folders)


def share_of_full_model(run: StageRun, place: Place) -> float:
    """The part of the full model's elements that this worker holds under ZeRO stage 3."""
    from overfill.checkpoint import load_full_model
    from pipeline.training.deepspeed_config import EngineSettings
    from pipeline.training.engine import frozen_engine

    settings = EngineSettings(workers=2, zero_stage=3, dtype="fp32", micro_batch=1, accumulation=1)
    _, module = frozen_engine(load_full_model(run.inputs["teacher"] / "model"), settings, place.device)
    sharded: list[Any] = list(module.parameters())
    return sum(p.ds_tensor.numel() for p in sharded) / sum(p.ds_numel for p in sharded)


def recording(run: StageRun, stream: Callable[[StreamPlan, int], Iterator[StepRows]] = stream_steps) -> Services:
    """Services that write down which samples each worker was given; Ray Train, which knows of one run, hears nothing."""

    def recorded(plan: StreamPlan, first: int) -> Iterator[StepRows]:
        for rows in stream(plan, first):
            samples = [int(sample) for part in rows.samples for sample in part if sample >= 0]
            with (run.progress / f"seen-{plan.rank}.jsonl").open("a") as file:
                file.write(json.dumps([rows.step, samples]) + "\n")
            yield rows

    return Services(stream=recorded, report=lambda position: None, reclaimed=lambda: False)


def seen(run: StageRun) -> dict[int, list[int]]:
    """Step -> the samples of all workers, each as often as it was trained on."""
    found: dict[int, list[int]] = {}
    for path in run.progress.glob("seen-*.jsonl"):
        taken = [json.loads(line) for line in path.read_text().splitlines()]
        assert [step for step, _ in taken] == sorted(step for step, _ in taken), "a worker went back"
        for step, samples in taken:
            found.setdefault(step, []).extend(samples)
    return {step: sorted(samples) for step, samples in sorted(found.items())}


def stopping_after(step: int, run: StageRun) -> StageRun:
    """The same run, asked to stop after a step."""
    return dataclasses.replace(run, stop_requested=lambda: f'"step": {step}' in run.metrics_path.read_text())


def test_two_workers_learn_what_one_does_and_one_goes_on_where_two_stopped(
    tmp_path: Path, inputs: dict[str, Path], ray_cluster: None, one_worker: Place
) -> None:
    tokens = 8 * 60
    two = {"workers": 2, "micro_batch": 2, "checkpoint_every": 4}
    zero2 = distill_run(tmp_path / "zero2", inputs, resources={**two, "zero_stage": 2}, tokens=tokens)
    zero3 = distill_run(tmp_path / "zero3", inputs, resources={**two, "zero_stage": 3}, tokens=tokens)
    adapters = {"method": "lora", "tokens": tokens}
    lora = distill_run(tmp_path / "lora", inputs, resources={**two, "zero_stage": 3}, **adapters)
    broken = distill_run(tmp_path / "broken", inputs, resources={**two, "zero_stage": 2}, tokens=tokens)
    broken = stopping_after(6, broken)
    same = distill_run(tmp_path / "same", inputs, resources={**two, "zero_stage": 2}, tokens=tokens)
    fewer = distill_run(tmp_path / "fewer", inputs, resources={**two, "zero_stage": 3}, tokens=tokens)
    to_zero2 = distill_run(tmp_path / "fewer", inputs, resources={**two, "zero_stage": 2}, tokens=tokens)
    grown = distill_run(tmp_path / "grown", inputs, resources={"micro_batch": 6}, tokens=tokens)
    train_in(stopping_after(3, grown), grown.resources, one_worker, recording(grown, read_directly))
    by_two = distill_run(tmp_path / "grown", inputs, resources={**two, "zero_stage": 2}, tokens=tokens)
    scores = calibration(tmp_path, zero3)

    def in_one_group(arguments: dict[str, Any]) -> dict[str, Any]:
        """Several runs in the workers of one, for the price of one start."""
        from pipeline.training.distributed import process_group
        from pipeline.training.worker import import_training_libraries

        import_training_libraries()
        with process_group(0, threads=1) as place:
            share = share_of_full_model(zero3, place)
            measure_in(scores, scores.resources, place)
            train_in(zero3, zero3.resources, place, recording(zero3))
            stopped = train_in(broken, broken.resources, place, recording(broken))
            for part in (stopping_after(5, same), same, stopping_after(5, fewer), to_zero2, by_two, lora):
                train_in(part, part.resources, place, recording(part))
            result = train_in(arguments["run"], arguments["run"].resources, place, Services())
        return {"result": result, "stopped": stopped, "workers": place.workers, "share": share}

    returned = run_workers(in_one_group, zero2)
    assert returned["workers"] == 2
    assert 0.5 <= returned["share"] < 0.55  # padding, and tensors too small to be shared out
    assert returned["stopped"]["stopped"]
    assert returned["stopped"]["step"] == 6

    one = distill_run(tmp_path / "one", inputs, resources={"micro_batch": 6}, tokens=tokens)
    expected = train_in(one, one.resources, one_worker, recording(one, read_directly))
    for run in (zero2, zero3, same, fewer, grown):
        assert lines(run).keys() == lines(one).keys()
        for step, metrics in lines(one).items():
            assert lines(run)[step] == pytest.approx(metrics, rel=1e-4, abs=1e-6), (run.progress, step)
        assert largest_difference(run, one) < 1e-4
    assert returned["result"]["metrics"]["train/tokens"] == expected["metrics"]["train/tokens"]

    assert lines(same) == lines(zero2), "on as many workers a resumed run is the unbroken one, bit for bit"
    assert largest_difference(same, zero2) == 0.0

    alone = distill_run(tmp_path / "lora-one", inputs, resources={"micro_batch": 6}, **adapters)
    train_in(alone, alone.resources, one_worker, WITHOUT_RAY)
    assert largest_difference(lora, alone) < 1e-4

    resumed = distill_run(tmp_path / "broken", inputs, resources={"micro_batch": 3}, tokens=tokens)
    train_in(resumed, resumed.resources, one_worker, recording(resumed, read_directly))
    assert largest_difference(resumed, one) < 1e-4
    assert list(seen(one)) == list(range(8))
    for run in (zero3, same, fewer, grown, resumed):
        assert seen(run) == seen(one), run.progress

    by_one = calibration(tmp_path / "one", one)
    measure_in(by_one, by_one.resources, one_worker)
    a, b = (ImportanceScores.load(run.staging / SCORES_FILE) for run in (scores, by_one))
    assert (a.samples, a.tokens) == (b.samples, b.tokens)
    for name in ("hidden", "intermediate", "kv_second_moment"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-7)


def test_a_killed_worker_is_replaced_and_the_run_ends_bit_for_bit_as_an_unbroken_one(
    tmp_path: Path, inputs: dict[str, Path], ray_cluster: None, one_worker: Place
) -> None:
    run = distill_run(tmp_path / "killed", inputs, resources={"checkpoint_every": 3, "max_failures": 1})
    seen, marker = run.progress / "seen.jsonl", run.progress / "killed"

    def killed_once(plan: StreamPlan, first: int) -> Iterator[StepRows]:
        for rows in stream_steps(plan, first):
            if rows.step == KILL_AT and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            with seen.open("a") as file:
                file.write(json.dumps([rows.step, [part.tolist() for part in rows.samples]]) + "\n")
            yield rows

    def distill_killed(arguments: dict[str, Any]) -> dict[str, Any]:
        from pipeline.training.distributed import process_group
        from pipeline.training.worker import import_training_libraries

        import_training_libraries()
        with process_group(0, threads=1) as place:
            return train_in(arguments["run"], run.resources, place, Services(stream=killed_once))

    result = ray.get(Trial.remote().fit.remote(distill_killed, run))
    assert marker.exists()
    assert result["step"] == 12

    unbroken = distill_run(tmp_path / "unbroken", inputs)
    expected = train_in(unbroken, unbroken.resources, one_worker, WITHOUT_RAY)
    assert largest_difference(run, unbroken) == 0.0
    assert result["metrics"]["validation/nll"] == expected["metrics"]["validation/nll"]

    # Seven steps, then again from the checkpoint after six; always the samples of an unbroken run.
    samples = [json.loads(line) for line in seen.read_text().splitlines()]
    assert [step for step, _ in samples] == [0, 1, 2, 3, 4, 5, 6, *range(6, 12)]
    plan = StreamPlan(inputs["data"] / "train", sequences(unbroken), 3, steps=12, workers=1, micro_batch=4, rank=0)
    direct = {rows.step: [part.tolist() for part in rows.samples] for rows in read_directly(plan, 0)}
    assert all(direct[step] == found for step, found in samples)
    kept = sorted(folder.name[:13] for folder in (run.progress / run.stage.identity).glob("step-*"))
    assert kept == ["step-00000009", "step-00000012"]


def sequences(run: StageRun) -> int:
    from pipeline.corpus.order import sequences_per_batch
    from pipeline.corpus.shards import TokenShards

    return sequences_per_batch(run.config["batch_tokens"], TokenShards.open(run.inputs["data"] / "train").lengths)


def test_an_error_in_a_worker_is_one_line_with_the_place_of_the_logs(
    tmp_path: Path, inputs: dict[str, Path], ray_cluster: None
) -> None:
    run = distill_run(tmp_path, inputs, resources={"max_failures": 0})

    def fail(arguments: dict[str, Any]) -> dict[str, Any]:
        raise ValueError("the corpus has no token 7")

    with pytest.raises(TrainingFailed) as caught:
        run_workers(fail, run)
    assert str(caught.value) == (
        f"worker 0: ValueError: the corpus has no token 7; the workers' logs are in {run.attempt}"
    )


def test_a_model_that_does_not_fit_is_tried_once_and_says_what_to_lower(
    tmp_path: Path, inputs: dict[str, Path], ray_cluster: None
) -> None:
    run = distill_run(tmp_path, inputs, resources={"max_failures": 3, "micro_batch": 8})

    def fill(arguments: dict[str, Any]) -> dict[str, Any]:
        from pipeline.training.session import node_is_reclaimed

        with (run.progress / "tries").open("a") as file:
            file.write(f"{node_is_reclaimed()}\n")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(UserError, match=r"distill ran out of memory .* lower resources.distill.micro_batch \(now 8\)"):
        run_workers(fill, run)
    assert (run.progress / "tries").read_text() == "False\n"


def test_a_task_whose_worker_dies_is_done_again_in_a_clean_folder(
    tmp_path: Path, inputs: dict[str, Path], ray_cluster: None
) -> None:
    run = distill_run(tmp_path, inputs, resources={"max_failures": 1})

    def die_once(run: StageRun) -> dict[str, int]:
        (run.staging / "half").mkdir()
        if not (run.progress / "died").exists():
            (run.progress / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"files": len(list(run.staging.iterdir()))}

    assert run_on_worker(die_once, run) == {"files": 1}

    def die(run: StageRun) -> dict[str, int]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    with pytest.raises(WorkerFailed, match="The worker died unexpectedly"):
        run_on_worker(die, run)

    def fill(run: StageRun) -> dict[str, int]:
        raise MemoryError("17 GB")

    with pytest.raises(UserError, match=r"ran out of memory \(MemoryError: 17 GB\); lower"):
        run_on_worker(fill, run)


@ray.remote(num_cpus=0)
class Reserving:
    """An actor that reserves for its workers, as Ray Train does in a trial, and says its pid."""

    def reserve(self) -> int:
        self.group = ray.util.placement_group([{"CPU": 0.5}])
        ray.get(self.group.ready())
        return os.getpid()


def test_what_a_killed_trial_had_reserved_is_given_back_and_nothing_else(ray_cluster):
    """Ray itself would keep it until the driver ends, and a stage that wants a whole node would wait for ever."""
    own = ray.util.placement_group([{"CPU": 0.25}])
    killed, living = Reserving.remote(), Reserving.remote()
    pid, _ = ray.get([killed.reserve.remote(), living.reserve.remote()])
    assert remove_abandoned_groups() == 0
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while not remove_abandoned_groups():
        assert time.monotonic() < deadline, "Ray has not noticed that the trial is dead"
        time.sleep(0.1)
    states = [group["state"] for group in ray.util.placement_group_table().values()]
    assert states.count("REMOVED") >= 1
    assert ray.util.placement_group_table(own)["state"] == "CREATED"
    assert remove_abandoned_groups() == 0
    ray.kill(living)
    ray.util.remove_placement_group(own)


def test_a_trial_that_dies_for_good_does_not_keep_the_cpus_that_another_one_waits_for(ray_cluster, tmp_path):
    everything = ray.cluster_resources()["CPU"]

    def drive(config: dict[str, Any]) -> dict[str, Any]:
        if config["place"] == 0:
            group = ray.util.placement_group([{"CPU": 0.5}])
            ray.get(group.ready())
            (tmp_path / "reserved").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while not (tmp_path / "reserved").exists():
            time.sleep(0.05)
        whole_node = ray.remote(num_cpus=everything, scheduling_strategy="DEFAULT")(lambda: "free")
        return {"node": ray.get(whole_node.remote(), timeout=60)}

    tuner = tune.Tuner(
        tune.with_resources(drive, tune.PlacementGroupFactory([driver_bundle(HEAD)])),
        param_space={"place": tune.grid_search([0, 1])},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(storage_path=str(tmp_path / "tune"), callbacks=[AfterDeath([])], verbose=0),
    )
    dead, other = tuner.fit()
    assert dead.error is not None
    assert other.error is None
    assert (other.metrics or {})["node"] == "free"
