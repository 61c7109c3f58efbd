"""The whole pipeline as a user runs it: a sweep from nothing, again with nothing to do, and killed in the middle."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from machine_metrics import of_the_machine

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

EXPERIMENT = """\
# Hypothesis: the pipeline works.
name: tiny
description: every stage of every method, as small as it goes
teacher:
  name: small
  pretrain:
    {hidden: 48, intermediate: 96, layers: 2, heads: 4, kv_heads: 2, tokens: 30_000, batch_tokens: 1280, learning_rate: 3e-3}
data: {source: toy, train_samples: 600, test_samples: 40, max_length: 64}
calibrate: {samples: 32}
prune: {hidden: 0.5, intermediate: 0.5}
distill: {tokens: 64_000, batch_tokens: 1280, learning_rate: 3e-3, evaluate_every: 20}
evaluate: {samples: 40, max_new_tokens: 12}
benchmark: {prompt: [16], output: [6], repeats: 3}
sweep:
  axes: {distill.method: [full, overfill, pruned, scratch, assisted, lora, untrained, untrained-overfill, released]}
released: {name: other, model: released}
resources:
  distill: {checkpoint_every: 5}
"""
METHODS = ["full", "overfill", "pruned", "scratch", "assisted", "lora", "untrained", "untrained-overfill", "released"]
KEYS = {
    *("teacher", "method", "ratio", "ratio_effective", "seed", "parameters", "exact_match", "exact_match_interval"),
    *("perplexity", "ttft_s", "tpot_s", "speed_up", "peak_bytes", "agreement", "state"),
}
METRICS = {"eval/exact_match", "eval/perplexity", "latency/ttft_s", "latency/tpot_s", "shape/parameters"}


def overfill(*arguments: str, store: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.cli", *arguments, "--store", str(store)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=store.parent, env=environment())
    assert done.returncode == code, f"{arguments}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def in_this_process(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    """What a command prints, without the seconds in which a new process imports what this one has."""
    from pipeline.cli import main

    capsys.readouterr()
    try:
        main([*arguments])
    except SystemExit as end:
        assert (end.code or 0) == code
    else:
        assert code == 0
    return capsys.readouterr()


def environment() -> dict[str, str]:
    names = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "OVERFILL_STORE")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return kept | {"PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "140"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an experiment file."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "tiny.yaml").write_text(EXPERIMENT, encoding="utf-8")
    make_released_model(folder / "released")
    return folder


def make_released_model(folder: Path) -> None:
    """A model with random weights, another shape and another tokenizer than the teacher's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline.corpus.tokenizer import save_tokenizer, train_byte_level_bpe

    save_tokenizer(train_byte_level_bpe(["sort: dbca", "reverse: abcd", "get 1 of: b a c"] * 30, 275), folder)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=275, **shape, max_position_embeddings=96)).save_pretrained(folder)


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A store in which the experiment has run, and what it printed."""
    return place / "runs", overfill("run", "tiny.yaml", store=place / "runs")


def records(store: Path, stage: str) -> dict[str, dict]:
    """Label -> record of every artifact of a stage."""
    found = [json.loads(path.read_text()) for path in store.glob(f"{stage}/*/payload/record.json")]
    return {record["label"]: record for record in found}


def test_every_cell_is_evaluated_timed_and_compared(finished):
    store, printed = finished
    rows = json.loads(overfill("report", "tiny", "--json", store=store).stdout)
    assert [row["method"] for row in rows] == METHODS
    for row in rows:
        assert set(row) >= KEYS
        assert row["state"] == "done"
        low, high = row["exact_match_interval"]
        assert 0 <= low <= row["exact_match"] <= high <= 1
        assert row["perplexity"] > 1
        assert row["tpot_s"] > 0
        assert row["ttft_s"] > 0
    full, *students, released = rows
    assert full["agreement"] == 1.0
    assert {row["parameters"] for row in students} == {rows[1]["parameters"]}
    assert rows[1]["parameters"] < full["parameters"]
    assert released["agreement"] is None
    assert released["parameters"] not in (full["parameters"], rows[1]["parameters"])
    for words in (
        "OverFill",
        "pruned only",
        "full model",
        "pruned, LoRA",
        "released model",
        "overfill ui",
        "pareto.png",
    ):
        assert words in printed.stdout + printed.stderr
    assert (store / "sweeps" / "tiny" / "pareto.png").stat().st_size > 10_000


def test_one_calibration_serves_all_and_nothing_is_left_behind(finished):
    store, _ = finished
    assert {stage: len(records(store, stage)) for stage in ("tokenizer", "data", "teacher", "calibrate", "prune")} == {
        "tokenizer": 1,
        "data": 1,
        "teacher": 1,
        "calibrate": 1,
        "prune": 1,
    }
    assert len(records(store, "distill")) == 4
    assert len(records(store, "evaluate")) == 9
    assert len(records(store, "benchmark")) == 4, "alone, of the ratio, assisted, beside the released model"
    assert not list(store.glob("*/*/staging-*"))


def test_assisted_generation_says_what_the_full_model_says_and_a_released_one_answers_the_same_questions(finished):
    import pyarrow.parquet as parquet

    store, _ = finished

    def samples(label: str) -> list[dict]:
        (folder,) = store.glob(f"evaluate/{label}_*")
        return parquet.read_table(folder / "payload" / "samples.parquet").to_pylist()

    full, assisted, released = (samples(label) for label in ("small", "small-0.5-assisted-s0", "other"))
    for one, other in zip(full, assisted, strict=True):
        assert (one["sample"], one["prediction"]) == (other["sample"], other["prediction"])
        assert one["response_nll"] == pytest.approx(other["response_nll"])
    asked = [[(row["sample"], row["reference"]) for row in found] for found in (full, released)]
    assert asked[0] == asked[1]
    measured = records(store, "evaluate")["small-0.5-assisted-s0"]["metrics"]
    assert 0 <= measured["eval/acceptance_rate"] <= 1


def test_a_trained_student_is_a_model_folder_that_finds_its_full_model(finished):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from overfill import TwoStageForCausalLM

    store, _ = finished
    folder = next(store.glob("distill/*overfill*")) / "payload" / "model"
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 24
    two_stage = TwoStageForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "sort: dbca"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert two_stage.generate(**ids, max_new_tokens=4, min_new_tokens=4).shape[1] == ids["input_ids"].shape[1] + 4
    assert not [
        path for path in store.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl") and "payload" in str(path)
    ]
    del torch


def test_generate_answers_from_a_folder(finished):
    store, _ = finished
    folder = next(store.glob("distill/*overfill*")) / "payload" / "model"
    command = [sys.executable, "-m", "pipeline.cli", "generate", str(folder), "sort: dbca", "--max-new-tokens", "5"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    wrong = subprocess.run([*command[:4], str(store), "x"], capture_output=True, text=True, env=environment())
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1


def test_running_again_finds_everything_done_without_ray(finished):
    store, _ = finished
    before = {path: path.stat().st_mtime_ns for path in store.glob("*/*/attempts/*")}
    program = (
        "import sys\nfrom pipeline.cli import main\n"
        f"try: main(['run', 'tiny.yaml', '--store', {str(store)!r}])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "loaded = [m for m in ('torch', 'ray', 'mlflow', 'transformers') if m in sys.modules]\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=store.parent, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert "all 9 cells are done already" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in store.glob("*/*/attempts/*")} == before


def test_status_and_plan_say_that_all_is_done(finished):
    store, _ = finished
    assert "9" in overfill("status", store=store).stdout
    assert "9 cells, 13 stages: 13 reuse" in overfill("plan", "tiny.yaml", store=store).stdout


def test_mlflow_has_one_parent_and_comparable_children(finished):
    from mlflow import MlflowClient

    store, _ = finished
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(parents) == 1
    assert len(children) == len(METHODS)
    for run in runs:
        assert run.info.status == "FINISHED"
    for run in children:
        assert set(run.data.metrics) >= METRICS, run.data.tags["method"]
    trained = next(run for run in children if run.data.tags["method"] == "overfill")
    steps = [point.step for point in client.get_metric_history(trained.info.run_id, "train/loss")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 50


def test_mlflow_has_the_corpus_and_answers_with_the_student(finished, monkeypatch, capsys):
    import mlflow

    store, _ = finished
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()], "tags.method = 'overfill'")
    uses = {given.tags[0].value: given.dataset for given in run.inputs.dataset_inputs}
    assert set(uses) == {"training", "evaluation"}
    assert json.loads(uses["training"].profile)["samples"] == 600
    (logged,) = run.outputs.model_outputs
    model = mlflow.pyfunc.load_model(f"models:/{logged.model_id}")
    prompts = ["sort: dbca", "reverse: abc"]
    answers = model.predict(prompts, params={"max_new_tokens": 5})
    folder = next(store.glob("distill/*overfill*")) / "payload" / "model"
    for prompt, answer in zip(prompts, answers, strict=True):
        said, _ = in_this_process(capsys, "generate", str(folder), prompt, "--max-new-tokens", "5")
        assert said.strip() == answer.strip()


def test_a_student_is_registered_once_and_loads_by_its_name(finished, monkeypatch, capsys):
    import mlflow

    store, _ = finished
    label = "small · 0.5 · overfill · seed 0"
    words = ("register", "tiny", "--as", "toy-student", "--cell", label)
    first = overfill(*words, store=store).stdout
    place = ("--store", str(store))
    again, _ = in_this_process(capsys, *words, *place)
    assert first == again == f"{label}: models:/toy-student/1\n"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
    assert len(mlflow.pyfunc.load_model("models:/toy-student/1").predict(["sort: dbca"])) == 1
    _, full = in_this_process(capsys, "register", "tiny", "--cell", "small · full", *place, code=2)
    assert full.startswith("overfill: small · full: no student was logged with it")
    _, unknown = in_this_process(capsys, "register", "tiny", "--cell", "x", *place, code=2)
    assert unknown.count("\n") == 1


@pytest.fixture(scope="module")
def broken(finished, place) -> Path:
    """A store whose run was killed, and then asked to end, while the student was in training."""
    reference, _ = finished
    store = place / "broken"
    for shared in ("tokenizer", "data", "teacher", "calibrate", "prune", ".claims"):
        shutil.copytree(reference / shared, store / shared, symlinks=True)
    killed = driver("killed", store)
    wait_for(lambda: newest_step(store) >= 3, killed, seconds=300)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    # Ray's agents try for a minute to reach what was killed with the driver; what trains must be gone before the next run.
    assert left_after(15, "killed", but="Agent") == []
    return store


def driver(name: str, store: Path) -> subprocess.Popen[str]:
    """A run of one cell that takes its time, with a step checkpoint after every step; its processes know their name."""
    command = [sys.executable, "-m", "pipeline.cli", "run", "tiny.yaml", "--store", str(store), "--set", "name=broken"]
    command += ["--set", "sweep.axes={distill.method: [overfill]}", "--set", "resources.distill.checkpoint_every=1"]
    command += ["--set", "released="]
    marked = environment() | {"OVERFILL_TEST": f"{os.getpid()}-{name}"}
    return subprocess.Popen(
        command, cwd=store.parent, env=marked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def newest_step(store: Path) -> int:
    """Step of the newest step checkpoint of the student's training; 0 without one."""
    markers = store.glob("distill/*/progress/**/complete.json")
    return max((int(marker.parent.name.split("-")[1]) for marker in markers), default=0)


def test_sigterm_saves_the_position_and_leaves_no_process(broken):
    at = newest_step(broken)
    asked = driver("asked", broken)
    wait_for(lambda: newest_step(broken) >= at + 3, asked, seconds=300)
    asked.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    _, said = asked.communicate(timeout=60)
    assert asked.returncode == 130, said
    assert time.monotonic() - begun < 45
    assert "asked to end: waiting up to 30 s for distill small · 0.5 · overfill · seed 0 (step" in said
    assert said.splitlines()[-1] == "overfill: interrupted; the same command goes on from here"
    assert "Traceback" not in said
    outcome = json.loads(next(broken.glob("distill/*/attempts/0002/outcome.json")).read_text())
    assert outcome["status"] == "interrupted"
    assert outcome["error"] == f"asked to end: stopped after step {newest_step(broken)}"
    assert run_states(broken) == {"broken": "KILLED", "small · 0.5 · overfill · seed 0": "KILLED"}
    assert left_after(15, "asked") == []
    assert not list((broken / "tune").glob("interrupt-*"))


def left_after(seconds: float, driver: str, but: str = "nothing") -> list[str]:
    """What still runs of a driver after so many seconds at most."""
    deadline = time.monotonic() + seconds
    while left := [name for name in processes_of(driver) if but not in name]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return left


def processes_of(driver: str) -> list[str]:
    """What a driver has started, itself included."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if f"OVERFILL_TEST={os.getpid()}-{driver}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_text())
    return found


def run_states(store: Path) -> dict[str, str]:
    """Name -> state of every MLflow run."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("overfill").experiment_id])
    assert len({run.info.run_name for run in runs}) == len(runs), "a run has a twin"
    return {run.info.run_name: run.info.status for run in runs}


def test_a_run_that_was_killed_and_asked_to_end_goes_on_and_ends_in_the_same_bits(finished, broken):
    reference, _ = finished
    assert not records(broken, "distill"), "it was broken before its end"
    overfill("resume", "broken", store=broken)
    (again,), (unbroken,) = (
        [record for label, record in records(at, "distill").items() if "overfill" in label]
        for at in (broken, reference)
    )
    name = "model/model.safetensors"
    assert again["files"][name] == unbroken["files"][name]
    assert curve(broken) == curve(reference)
    assert again["attempt"] == 3
    for attempt in ("0002", "0003"):
        log = (next(broken.glob("distill/*")) / "attempts" / attempt / "worker-0.log").read_text()
        assert "training from step 0" not in log
    assert set(run_states(broken).values()) == {"FINISHED"}
    assert not list(broken.glob("*/*/staging-*"))


def curve(store: Path) -> dict[int, dict[str, float]]:
    """Step -> metrics of the student's training, the later line of a step winning, without those of the machine."""
    found: dict[int, dict[str, float]] = {}
    for line in next(store.glob("distill/*overfill*/progress/metrics.jsonl")).read_text().splitlines():
        point = json.loads(line)
        found.setdefault(point["step"], {}).update(point["metrics"])
    return {step: {k: v for k, v in found[step].items() if not of_the_machine(k)} for step in sorted(found)}


def wait_for(condition, process: subprocess.Popen, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end, f"nothing after {seconds} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def asked(finished, tmp_path_factory) -> tuple[Path, tuple[str, ...], subprocess.CompletedProcess[str]]:
    """The store after a run with tasks, in which every other cell's prompt is too long; the command without those, and
    what it printed."""
    from harness_toys import write_tasks

    store, _ = finished
    tasks = "tasks: [toy_get, choose], task_samples: 4, samples: 40, max_new_tokens: 12"
    command = ("tiny.yaml", "--set", "name=asked", "--set", "released=")
    command += ("--set", f"evaluate={{{tasks}, task_path: {write_tasks(tmp_path_factory.mktemp('tasks'))}}}")
    command += ("--set", "resources.tasks={workers: 2, micro_batch: 1, cpus_per_worker: 0.5}")
    axes = "distill.method: [full, overfill]"
    prompts = ("--set", f"sweep.axes={{{axes}, benchmark.prompt: [[16], [4000]]}}")
    printed = overfill("run", *command, *prompts, store=store, code=1)
    return store, (*command, "--set", f"sweep.axes={{{axes}}}"), printed


def test_a_failing_cell_is_told_with_its_reason_and_leaves_the_others_alone(asked):
    store, _, printed = asked
    assert "benchmark: prompt + output is 4006 tokens, the models have" in " ".join(printed.stderr.split())
    rows = json.loads(overfill("report", "asked", "--json", store=store).stdout)
    assert [row["state"] for row in rows] == ["done", "unfinished", "done", "unfinished"]
    assert "failed" in overfill("status", "asked", store=store).stdout


def test_tasks_are_shared_out_among_workers_and_every_sample_is_kept(asked):
    import pyarrow.parquet as parquet

    store, command, _ = asked
    found = records(store, "tasks")
    assert {record["label"] for record in found.values()} == {"small", "small-0.5-overfill-s0"}
    for record in found.values():
        assert {"eval/toy_get/exact_match", "eval/choose/acc", "eval/choose/acc_stderr"} <= record["metrics"].keys()
        assert record["metrics"]["eval/choose/samples"] == 4
    for folder in store.glob("tasks/*"):
        assert parquet.ParquetFile(folder / "payload" / "samples.parquet").metadata.num_rows == 8
        steps = [json.loads(line) for line in (folder / "progress" / "metrics.jsonl").read_text().splitlines()]
        assert max((line["step"], line["steps"]) for line in steps) == (8, 8)  # the workers' last lines may cross
        assert not (folder / "progress" / "shards").exists(), "a finished stage needs no shards"
    assert "2 cells, 6 stages: 6 reuse" in overfill("plan", *command, store=store).stdout
    wrong = overfill("run", "tiny.yaml", "--set", "evaluate.tasks=[toy_gett]", store=store, code=2)
    assert wrong.stderr.count("\n") == 1
    assert "did you mean toy_get" in wrong.stderr
    early = ("--set", "name=early", "--set", "distill.tokens=640_000", "--set", "evaluate.tasks=[gsm8k_files]")
    trained = records(store, "distill")
    without_data = overfill("run", "tiny.yaml", *early, store=store, code=2)
    assert "gsm8k_files reads train.jsonl, which is not in" in without_data.stderr
    assert records(store, "distill") == trained, "nothing is trained for a task that cannot be loaded"


def test_on_an_object_store_a_run_is_killed_asked_to_end_and_resumed_on_other_machines(finished, place):
    """The same cells against a server of the S3 protocol; every driver has a cache of its own, as on another machine."""
    from s3_server import s3_process

    reference, _ = finished
    with s3_process() as server:
        bucket = Remote(server, place / "objects")
        killed = bucket.driver("killed")
        wait_for(lambda: bucket.newest_step() >= 3, killed, seconds=300)
        os.kill(killed.pid, signal.SIGKILL)
        killed.communicate()
        # What Ray was just starting looks for its node for a while, under no name of its own yet.
        assert [name for name in left_after(15, "objects-killed", but="Agent") if name.startswith("ray::")] == []
        at = bucket.newest_step()
        asked = bucket.driver("asked")
        wait_for(lambda: bucket.newest_step() >= at + 3, asked, seconds=300)
        asked.send_signal(signal.SIGTERM)
        _, said = asked.communicate(timeout=90)
        assert asked.returncode == 130, said
        assert said.splitlines()[-1] == "overfill: interrupted; the same command goes on from here"
        assert not bucket.store.bucket.list("tune/"), "the request to end is over"
        resumed = bucket.driver("resumed")
        said = resumed.communicate(timeout=300)[1]
        assert resumed.returncode == 0, said
        assert "not done" not in said, "the last results are in its report"
        name = "model/model.safetensors"
        (own,) = bucket.records("distill")
        (unbroken,) = [record for label, record in records(reference, "distill").items() if "overfill" in label]
        assert own["files"][name] == unbroken["files"][name]
        assert own["attempt"] == 3
        assert curve(bucket.store.root) == curve(reference)
        assert {record["attempt"] for kind in ("data", "teacher", "prune") for record in bucket.records(kind)} == {1}
        assert set(run_states(bucket.folder).values()) == {"FINISHED"}, said
        again = bucket.driver("again")
        assert "all 2 cells are done already" in again.communicate(timeout=120)[1]
        assert not [key for key in bucket.store.bucket.list("distill/") if "/step-" in key or "/delivered/" in key]


class Remote:
    """Runs on an object store, and what they leave there."""

    def __init__(self, server, folder: Path) -> None:
        from pipeline.objects.store import ObjectStore

        self.folder = folder
        """Of the drivers' caches and MLflow's database."""
        folder.mkdir()
        (folder / "tiny.yaml").write_text(EXPERIMENT, encoding="utf-8")
        self.url = f"{server.url('runs')}/toy"
        self.environment = environment() | server.environment
        self.environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        with pytest.MonkeyPatch.context() as patched:
            for name, value in (server.environment | {"OVERFILL_CACHE": str(folder / "here")}).items():
                patched.setenv(name, value)
            self.store = ObjectStore(self.url)
            self.newest_step()  # connects with these credentials

    def driver(self, name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipeline.cli", "run", "tiny.yaml", "--store", self.url, "--set", "released="]
        command += ["--set", "sweep.axes={distill.method: [full, overfill]}"]
        command += ["--set", "resources.distill.checkpoint_every=1"]
        marked = {"OVERFILL_TEST": f"{os.getpid()}-objects-{name}", "OVERFILL_CACHE": str(self.folder / name)}
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment | marked,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def newest_step(self) -> int:
        markers = [key for key in self.store.bucket.list("distill/") if key.endswith("/complete.json")]
        return max((int(key.split("/step-")[1].split("-")[0]) for key in markers), default=0)

    def records(self, stage: str) -> list[dict]:
        """Of every artifact of a stage; its copy on this node is brought up to date."""
        found = []
        for name in self.store.bucket.names(f"{stage}/"):
            self.store.mirror.refresh(f"{stage}/{name}")
            found.append(json.loads(self.store.bucket.read(f"{stage}/{name}/record.json") or b"{}"))
        return found
