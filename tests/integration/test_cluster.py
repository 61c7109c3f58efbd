"""A sweep on a real cluster, submitted from elsewhere: followed, repeated, stopped, and through two kinds of loss."""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.config_io import parse_yaml

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
EXPERIMENT = """\
name: tiny
teacher:
  name: small
  pretrain:
    {hidden: 48, intermediate: 96, layers: 2, heads: 4, kv_heads: 2, tokens: 20_000, batch_tokens: 1280, learning_rate: 3e-3}
data: {source: toy, train_samples: 600, test_samples: 20, max_length: 64}
calibrate: {samples: 32}
prune: {hidden: 0.5, intermediate: 0.5}
distill: {tokens: 12_800, batch_tokens: 1280, learning_rate: 3e-3}
evaluate: {samples: 20, max_new_tokens: 8}
benchmark: {prompt: [16], output: [4], repeats: 2, warmup: 1}
resources: {distill: {cpus_per_worker: 0.6, checkpoint_every: 40}}
"""
HEAD = "node:__internal_head__"
LONG = ("name=long", "distill.tokens=300_000", "resources.benchmark.accelerator=FAKE")
"""The same up to distillation, whose latency is then of another device."""
SLOW = (*LONG, "resources.distill.micro_batch=2", "resources.distill.checkpoint_every=2")
"""The very same, but so slow that it can be interrupted three times: how it is computed changes nothing of what it is."""
ELSEWHERE = (*LONG, "resources.drivers=a")
"""The very same again, with its drivers on another node than the head."""


@dataclass
class Place:
    """A cluster, and a machine that knows no more of it than its address and its token."""

    address: str
    token: str
    laptop: Path
    store: Path
    mlflow: str
    head: str
    """The cluster's own address, for drivers on its machines."""
    host: subprocess.Popen[str]

    def tell(self, command: str) -> None:
        """Let something happen to the cluster."""
        assert self.host.stdin is not None
        assert self.host.stdout is not None
        self.host.stdin.write(command + "\n")
        self.host.stdin.flush()
        assert json.loads(self.host.stdout.readline()) == {"done": command.split()[0]}

    def overfill(self, *arguments: str, code: int = 0) -> str:
        """The command line on the laptop; what it printed."""
        command = [sys.executable, "-m", "pipeline.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.laptop, env=self.environment())
        assert done.returncode == code, f"{arguments}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert self.token not in done.stdout + done.stderr
        return done.stdout + done.stderr

    def environment(self) -> dict[str, str]:
        names = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_URI", "OVERFILL_STORE")
        kept = {name: value for name, value in os.environ.items() if name not in names}
        home = {"HOME": str(self.laptop), "RAY_API_SERVER_ADDRESS": self.address, "MLFLOW_TRACKING_URI": self.mlflow}
        return kept | home | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}

    def submit(self, *options: str, code: int = 0) -> str:
        return self.overfill("submit", "tiny.yaml", *options, code=code)

    def ask(self, path: str) -> Any:
        """What the job server answers."""
        headers = {"Authorization": f"Bearer {self.token}"}
        with urllib.request.urlopen(urllib.request.Request(self.address + path, headers=headers), timeout=60) as answer:
            return json.load(answer)

    def nodes_with(self, resource: str) -> set[str]:
        """Ids of the nodes that are alive and have this resource."""
        found = self.ask("/api/v0/nodes")["data"]["result"]["result"]
        return {node["node_id"] for node in found if node["state"] == "ALIVE" and resource in node["resources_total"]}

    def drivers(self) -> set[str]:
        """Ids of the nodes on which jobs were."""
        return {job["driver_node_id"] for job in self.ask("/api/jobs/") if job["submission_id"]}

    def where(self, kind: str, **wanted: str) -> set[str]:
        """Ids of the nodes on which the actors or tasks with these fields were."""
        filters = "".join(f"&filter_keys={key}&filter_predicates==&filter_values={wanted[key]}" for key in wanted)
        found = self.ask(f"/api/v0/{kind}?detail=1&limit=1000{filters}")["data"]["result"]["result"]
        return {one["node_id"] for one in found}

    def records(self, stage: str) -> list[dict]:
        return [json.loads(path.read_text()) for path in self.store.glob(f"{stage}/*/payload/record.json")]

    def state_of(self, job: str) -> str:
        rows = [line.split() for line in self.overfill("jobs").splitlines()]
        return next(row[2] for row in rows if row and row[0] == job)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A cluster that wants a token, with three nodes, and an MLflow server; the laptop has the token and a cluster file."""
    folder, token = tmp_path_factory.mktemp("cluster"), secrets.token_hex(16)
    port, mlflow, store = free_port(), f"http://127.0.0.1:{(ui := free_port())}", folder / "shared" / "runs"
    laptop = folder / "laptop"
    (laptop / ".ray").mkdir(parents=True)
    (laptop / ".ray" / "auth_token").write_text(token)
    (laptop / "tiny.yaml").write_text(EXPERIMENT, encoding="utf-8")
    settings = {"store": str(store), "tracking_uri": mlflow, "image": "overfill:1"}
    (laptop / "cluster.yaml").write_text(json.dumps({"cluster_name": "x", "metadata": {"overfill": settings}}))
    names = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "OVERFILL_STORE")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    serve = ["-m", "pipeline.cli", "ui", "--serve", "--host", "127.0.0.1", "--port", str(ui), "--store"]
    nodes = [str(Path(__file__).with_name("cluster_host.py")), str(port)]
    without = environment | {"PYTHONPATH": ""}  # the code must come with the job
    with (
        running([*serve, str(folder / "mlflow")], folder, environment | {"PYTHONPATH": str(ROOT)}),
        running(nodes, folder, without, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as host,
    ):
        assert host.stdout is not None
        answer = host.stdout.readline()
        assert answer, (folder / "cluster_host.py.log").read_text()[-2000:]
        yield Place(f"http://127.0.0.1:{port}", token, laptop, store, mlflow, json.loads(answer)["address"], host)


@contextmanager
def running(
    arguments: list[str], folder: Path, environment: dict[str, str], **pipes: int
) -> Iterator[subprocess.Popen]:
    """A Python process while inside; it is asked to end, and leaves no process behind."""
    with (folder / f"{Path(arguments[0]).name}.log").open("w") as log:
        outputs = {"stdout": log, "stderr": log, **pipes}
        command = [sys.executable, *arguments]
        process = subprocess.Popen(command, cwd=folder, env=environment, text=True, start_new_session=True, **outputs)
        try:
            yield process
        finally:
            if process.stdin is not None:
                process.stdin.close()
            else:
                os.killpg(process.pid, signal.SIGINT)
            process.wait(timeout=60)


def test_a_job_runs_as_it_would_here_and_again_there_is_nothing_to_do(place):
    printed = place.submit("--follow")
    assert "running entrypoint for job tiny-" in printed.lower()
    assert len(place.records("evaluate")) == len(place.records("benchmark")) == 1
    assert place.token not in "".join(path.read_text(errors="replace") for path in place.store.glob("**/*.log"))
    assert place.drivers() == place.where("actors", class_name="ImplicitFunc") == place.nodes_with(HEAD)
    # The same file on this machine finds every stage done: the identities are the same.
    assert "all 1 cells are done already" in place.overfill("run", "tiny.yaml", "--store", str(place.store))
    again = place.submit("--follow")
    assert "-2: " in again
    assert "all 1 cells are done already" in again
    assert {path.name for path in place.laptop.iterdir()} == {".ray", "cluster.yaml", "tiny.yaml"}
    status = place.overfill("status", "tiny", "--store", str(place.store), "--address", place.address)
    assert re.search(r"http://127\.0\.0\.1:\d+: [\d.]+ of 2 CPU in use", status)


def test_a_manifest_for_kubernetes_runs_the_same_job(place, tmp_path):
    printed = place.submit("--manifest", "kuberay")
    config_map, job = (parse_yaml(text, "manifest") for text in printed.split("---\n"))
    (tmp_path / "overfill.zip").write_bytes(base64.b64decode(config_map["binaryData"]["overfill.zip"]))
    # What KubeRay's submitter does, but for the folder at which a pod mounts the package.
    environment = parse_yaml(job["spec"]["runtimeEnvYAML"].replace("/etc/overfill", str(tmp_path)), "environment")
    assert environment["working_dir"] == f"file://{tmp_path}/overfill.zip"
    (container,) = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    secret = [variable["name"] for variable in container["env"]]  # here given as it is
    assert secret == ["MLFLOW_TRACKING_URI"]
    environment["env_vars"]["MLFLOW_TRACKING_URI"] = place.mlflow
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", place.address]
    command += ["--runtime-env-json", json.dumps(environment), "--", *shlex.split(job["spec"]["entrypoint"])]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": place.token}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=place.environment() | token)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 1 cells are done already" in done.stdout + done.stderr


@pytest.mark.parametrize("token", ["", "wr0ng" * 8])
def test_a_driver_without_the_clusters_token_is_told_so_in_one_line(place, token):
    environment = place.environment() | ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {})
    environment["HOME"] = str(place.store)  # where there is no token
    command = ["run", "tiny.yaml", "--store", str(place.laptop.parent / "none"), "--address", place.head]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *command],
        capture_output=True,
        text=True,
        cwd=place.laptop,
        env=environment,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    assert "does not accept this token, or asks for one" in done.stderr
    assert "wr0ng" not in done.stderr


def test_mlflow_has_the_run_and_its_artifacts_through_the_server(place):
    from mlflow import MlflowClient

    client = MlflowClient(place.mlflow)
    (parent,) = client.search_runs(["1"], "tags.`mlflow.runName` = 'tiny'")
    assert parent.info.status == "FINISHED"
    assert parent.info.artifact_uri.startswith("mlflow-artifacts:")
    assert any(file.path.endswith(".yaml") for file in client.list_artifacts(parent.info.run_id))
    assert not (place.store / "mlflow.db").exists()


def test_a_job_is_stopped_attached_to_and_outlives_a_node_and_the_head(place):
    job = re.findall(r"job (long-\w+): ", place.submit(*overrides(SLOW)))[0]
    wait_for(lambda: newest_step(place) > 0)
    assert "the job goes on" in followed_until_ctrl_c(place, f"job {job} runs already")
    assert place.state_of(job) == "running"
    place.overfill("stop", job)
    assert place.state_of(job) == "stopped"
    stopped_at = newest_step(place)

    assert f"job {job}-2: " in place.submit(*overrides(SLOW))
    wait_for(lambda: newest_step(place) > stopped_at)
    wanted = raylet_of_training()
    place.tell(f"reclaim {wanted}")
    wait_for(lambda: left_at(place) > 0)
    place.tell(f"lose {wanted}")
    place.tell("add c")
    wait_for(lambda: newest_step(place) > left_at(place))

    place.tell(f"lose {raylet_of_training()}")
    lost_at = newest_step(place)
    place.tell("add d")
    wait_for(lambda: newest_step(place) > lost_at)

    place.tell("restart")
    restarted_at = newest_step(place)
    place.submit(*overrides(ELSEWHERE), "--follow")
    assert restarted_at > lost_at > left_at(place) > stopped_at
    (distilled,) = [record for record in place.records("distill") if record["metrics"]["train/steps"] > 100]
    assert distilled["attempt"] == 3
    for stage in ("tokenizer", "data", "teacher", "calibrate", "prune"):
        (record,) = place.records(stage)
        assert record["attempt"] == 1
    starts = steps_told(place, r"training from step (\d+)")
    assert starts == sorted(set(starts)), "each start went on from a later step"
    assert len(starts) == 5
    assert starts[0] == 0
    assert left_at(place) in starts, "after a notice nothing is trained twice"
    # The type of GPU that was named counts, and not this machine.
    latencies = [json.loads(path.read_text()) for path in place.store.glob("benchmark/*/payload/latency.json")]
    assert sum(latency["device"] == "FAKE" for latency in latencies) == 1
    assert place.where("tasks", name="benchmark") == place.nodes_with("accelerator_type:FAKE")
    assert place.drivers() == place.where("actors", class_name="ImplicitFunc") == place.nodes_with("a")


def overrides(settings: tuple[str, ...]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def followed_until_ctrl_c(place: Place, awaited: str) -> str:
    """Submit and follow, and press Ctrl-C when `awaited` is shown; what was printed after it."""
    command = [sys.executable, "-m", "pipeline.cli", "submit", "tiny.yaml", "--follow", *overrides(SLOW)]
    process = subprocess.Popen(
        command,
        cwd=place.laptop,
        env=place.environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs do not hear it
    )
    assert process.stderr is not None
    assert any(awaited in line for line in process.stderr)
    time.sleep(0.5)  # it is about to open the log
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    return rest


def newest_step(place: Place) -> int:
    """Step of the newest whole step checkpoint of the long distillation."""
    found = [
        int(re.findall(r"step-(\d+)", path.parent.name)[0])
        for path in long_distillation(place).glob("**/complete.json")
    ]
    return max(found, default=0)


def long_distillation(place: Place) -> Path:
    done = {record["identity"] for record in place.records("distill") if record["metrics"]["train/steps"] < 100}
    folders = [path for path in place.store.glob("distill/*") if path.name.rsplit("_", 1)[1] not in done]
    return folders[0] / "progress" if folders else place.store / "none"


def steps_told(place: Place, pattern: str) -> list[int]:
    """The steps in all logs of the long distillation that a pattern finds."""
    logs = sorted(long_distillation(place).parent.glob("attempts/*/worker-0.log"))
    return [int(step) for log in logs for step in re.findall(pattern, log.read_text())]


def left_at(place: Place) -> int:
    """The step that was saved when a node was to be taken away; 0 before that."""
    return max(steps_told(place, r"a node is being taken away; step (\d+) is saved"), default=0)


def raylet_of_training() -> int:
    """Process id of the raylet whose worker trains."""
    for process in psutil.process_iter(["cmdline", "ppid"]):
        if "RayTrainWorker" in " ".join(process.info["cmdline"] or ()):
            return int(process.info["ppid"])
    raise AssertionError("nothing trains")


def wait_for(condition: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing after {seconds} s"
        time.sleep(0.2)
