"""What is refused before anything is uploaded, what is uploaded, and which job a second submit means."""

from __future__ import annotations

import io
import os
import shutil
import socket
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_job_server import FakeCluster, serving
from rich.console import Console

from overfill.errors import UserError
from pipeline.cli import main
from pipeline.config_io import parse_yaml

ROOT = Path(__file__).parents[3]
PYTHON = ".".join(map(str, sys.version_info[:3]))
EXPERIMENT = """\
name: toy
teacher: {name: small, pretrain: {hidden: 48, intermediate: 96, layers: 2, heads: 4, kv_heads: 2, tokens: 30_000}}
data: {source: toy}
prune: {hidden: 0.5, intermediate: 0.5}
sweep: {axes: {distill.method: [full, overfill, pruned]}}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An experiment in a folder of its own, in which there is nothing else."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "toy.yaml").write_text(EXPERIMENT, encoding="utf-8")
    return "toy.yaml"


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    """A fake cluster with the versions of this machine."""
    import ray

    with serving(FakeCluster(ray.__version__, PYTHON)) as running:
        yield running


@pytest.fixture
def token_mode() -> Iterator[None]:
    """What Ray keeps of the token mode in this process is as before afterwards."""
    from ray._raylet import AuthenticationTokenLoader, Config

    yield
    os.environ.pop("RAY_AUTH_MODE", None)
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def submit(file: str, *options: str, store: str | None = "/mnt/runs") -> str:
    """Submit as the command line does; the name of the job."""
    from pipeline.submission.submit import Request, submit

    address, *overrides = options
    return submit(Request(file, overrides, store), address, Console(quiet=True))[1]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.count("\n") == 1
    return error


def test_a_job_is_the_code_and_the_file_and_runs_the_same_command_line(file, cluster):
    job = submit(file, cluster.address, "seed=3")
    sent = cluster.jobs[job]
    assert sent["entrypoint"] == "python -m pipeline.cli run experiment.yaml --address auto --store /mnt/runs"
    ((name, content),) = cluster.packages.items()
    assert sent["runtime_env"]["working_dir"] == f"gcs://{name}"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert {entry.split("/")[0] for entry in archive.namelist()} == {"overfill", "pipeline", "experiment.yaml"}
        effective = parse_yaml(archive.read("experiment.yaml").decode(), "x")
        assert archive.read("pipeline/cli.py") == (ROOT / "pipeline" / "cli.py").read_bytes()
    assert effective["seed"] == 3
    assert effective["sweep"]["axes"] == {"distill.method": ["full", "overfill", "pruned"]}


def test_a_head_that_has_only_just_started_is_waited_for(file, cluster, monkeypatch):
    from pipeline.submission import job_server

    monkeypatch.setattr(job_server, "AGENT_POLL_S", 0.01)
    cluster.agentless = 2
    job = submit(file, cluster.address)
    assert cluster.jobs[job]["runtime_env"]["working_dir"].startswith("gcs://")
    cluster.agentless = 2
    with pytest.raises(job_server.Refused, match="No available agent to submit job, please try again later"):
        job_server.JobServer(cluster.address).submit_job(patience=0.0, entrypoint="true")
    assert list(cluster.jobs) == [job]


def test_nothing_but_sources_travels(tmp_path):
    from pipeline.submission.package import make_package

    for package in ("overfill", "pipeline"):
        shutil.copytree(ROOT / package, tmp_path / package)
    plain = make_package("x: 1", tmp_path)
    for name in (".env", "pipeline/.env", "pipeline/key.pem", "pipeline/runs/mlflow.db", "overfill/.git/config.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("secret")
    (tmp_path / "secret.py").write_text("secret")
    (tmp_path / "pipeline" / "link.py").symlink_to(tmp_path / "secret.py")
    assert make_package("x: 1", tmp_path) == plain
    assert {"overfill/kernels/linear.cpp", "overfill/py.typed", "pipeline/cli.py", "experiment.yaml"} <= set(
        plain.names
    )
    assert plain.size < 2**20


def test_every_file_of_the_installed_package_travels():
    import tomllib

    from pipeline.submission.package import source_files

    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    wanted = {path for package, globs in data.items() for glob in globs for path in (ROOT / package).glob(glob)}
    wanted = {path for path in wanted if path.is_file()}
    assert len(wanted) > 10
    assert wanted <= {path for _, path in source_files()}


def test_submitting_twice_attaches_and_after_the_end_begins_another_attempt(file, cluster):
    first = submit(file, cluster.address)
    assert submit(file, cluster.address) == first
    cluster.end(first, "FAILED", 1)
    second = submit(file, cluster.address)
    assert second == f"{first}-2"
    assert submit(file, cluster.address) == second
    cluster.end(second, "SUCCEEDED", 0)
    assert submit(file, cluster.address) == f"{first}-3"
    assert len(cluster.packages) == 1  # the same bytes are not sent again


def test_the_name_depends_on_what_is_computed_and_where_to(file, cluster):
    first = submit(file, cluster.address)
    assert submit(file, cluster.address, "resources.distill.workers=2") == first
    assert submit(file, cluster.address, "description=other") == first
    assert submit(file, cluster.address, "seed=7") != first
    assert submit(file, cluster.address, store="/mnt/other") != first
    objects = submit(file, cluster.address, store="s3://bucket/runs/")
    assert cluster.jobs[objects]["entrypoint"].endswith("--store s3://bucket/runs")


def test_when_two_submit_at_once_one_job_runs(file, cluster, monkeypatch):
    first = submit(file, cluster.address)
    monkeypatch.setattr("pipeline.submission.submit.newest_attempt", lambda *_: (0, False))  # as the slower one saw it
    assert submit(file, cluster.address) == first
    assert list(cluster.jobs) == [first]


def test_only_named_variables_travel_and_no_value_is_shown(file, cluster, monkeypatch, capsys):
    monkeypatch.setenv("WANTED", "s3cret")
    monkeypatch.setenv("OTHER_SECRET", "0ther")
    arguments = ["submit", file, "--address", cluster.address, "--store", "/mnt/runs", "--env", "WANTED"]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code
    (job,) = cluster.jobs.values()
    assert job["runtime_env"]["env_vars"]["WANTED"] == "s3cret"
    assert "0ther" not in str(job)
    shown = capsys.readouterr()
    assert "WANTED" in shown.err
    assert "s3cret" not in shown.err + shown.out
    assert "not set here" in refused(capsys, *arguments[:-1], "UNSET_VARIABLE")
    error = refused(capsys, *arguments[:-1], "NAME=s3cret")
    assert "s3cret" not in error


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("resources.distill={workers: 5, gpus_per_worker: 1}", "resources.distill: 5 workers with gpus_per_worker = 1"),
        ("resources.distill={gpus_per_worker: 4}", "needs 0.5 CPU and 4 GPU on one node"),
        ("resources.data={cpus_per_worker: 9}", "needs 9 CPU on one node"),
        ("resources.distill={gpus_per_worker: 1, micro_batch: 200000}", "the largest GPU that fits has 24 GiB"),
        ("resources.teacher={micro_batch: 2000000}", "the largest node that fits has"),
    ],
)
def test_a_stage_that_never_fits_is_refused_before_anything_is_uploaded(file, cluster, capsys, override, words):
    common = ("--address", cluster.address, "--store", "/mnt/runs", "--set", override)
    assert words in refused(capsys, "submit", file, *common)
    assert not [request for request in cluster.requests if not request.startswith("GET")]


def test_nodes_that_an_autoscaler_may_add_count(file, cluster, capsys):
    cluster.nodes = [{"CPU": 0.0}]
    common = ("submit", file, "--address", cluster.address)
    assert "the cluster has 0" in refused(capsys, *common, "--store", "/mnt/runs")
    Path("cluster.yaml").write_text((ROOT / "cluster.yaml").read_text())
    job = submit(file, cluster.address, "seed=1", store=None)
    assert cluster.jobs[job]["entrypoint"].endswith("--store /mnt/overfill/runs")
    assert "the cluster has 16" in refused(capsys, *common, "--set", "resources.distill.workers=17")


def test_the_file_goes_before_the_clusters_resources(file, cluster):
    settings = "{store: /mnt/runs, resources: {distill: {gpus_per_worker: 1, threads: 3}, max_concurrent: 2}}"
    Path("other.yaml").write_text(f"cluster_name: x\nmetadata: {{overfill: {settings}}}\n")
    from pipeline.submission.submit import Request, prepare

    config = prepare(Request(file, ["resources.distill.threads=2"], cluster="other.yaml")).config.resources
    assert (config.distill.gpus_per_worker, config.distill.threads, config.max_concurrent) == (1.0, 2, 2)


@pytest.mark.parametrize(
    ("drivers", "placed"),
    [
        ("head", {}),
        ("driver", {"entrypoint_resources": {"driver": 0.001}}),
        ("anywhere", {"entrypoint_memory": 256 * 2**20}),
    ],
)
def test_the_driver_leaves_the_head_only_when_asked(file, cluster, drivers, placed):
    cluster.nodes = [*cluster.nodes, {"CPU": 8.0, "driver": 1.0}]
    settings = f"{{store: /mnt/runs, resources: {{drivers: {drivers}}}}}"
    Path("cluster.yaml").write_text(f"cluster_name: x\nmetadata: {{overfill: {settings}}}\n")
    job = cluster.jobs[submit(file, cluster.address, store=None)]
    assert {key: value for key, value in job.items() if key in ("entrypoint_resources", "entrypoint_memory")} == placed


def test_a_place_for_drivers_that_is_not_there_is_refused(file, cluster, capsys):
    common = ("submit", file, "--address", cluster.address, "--store", "/mnt/runs", "--set")
    assert "resources.drivers = driver: no node" in refused(capsys, *common, "resources.drivers=driver")
    assert "resources.drivers" in refused(capsys, *common, "resources.drivers=a b")
    assert not cluster.jobs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ray_version": "2.40.0"}, "the cluster runs Ray 2.40.0"),
        ({"python_version": "3.9.1"}, "the cluster runs Python 3.9.1"),
    ],
)
def test_another_version_of_ray_or_python_is_refused(file, cluster, capsys, change, words):
    for name, value in change.items():
        setattr(cluster, name, value)
    assert words in refused(capsys, "submit", file, "--address", cluster.address, "--store", "/mnt/runs")


def test_no_server_another_server_and_a_wrong_address_are_one_line_each(file, cluster, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = f"127.0.0.1:{probe.getsockname()[1]}"
    assert "connection refused" in refused(capsys, "submit", file, "--address", free, "--store", "/r")
    assert "http://HOST:8265" in refused(capsys, "jobs", "--address", "ray://head:10001")
    assert "ann" not in refused(capsys, "jobs", "--address", f"http://ann:pass@{free}")
    cluster.answer = lambda *_: (200, "<html>")
    assert "not Ray's job server" in refused(capsys, "jobs", "--address", cluster.address)


def test_files_and_paths_of_this_machine_are_refused(file, capsys):
    store = ("--store", "/mnt/runs")
    assert "no such file" in refused(capsys, "submit", "nothere.yaml", *store)
    assert "--store" in refused(capsys, "submit", file)
    assert "absolute path" in refused(capsys, "submit", file, "--store", "runs")
    said = refused(capsys, "submit", file, "--store", "s3://me:secret@bucket/runs")
    assert "credentials in a URL" in said
    assert "secret" not in said
    Path("corpus").mkdir()
    common = ("submit", file, *store, "--set", "teacher.pretrain.tokenizer.vocabulary=300", "--set")
    assert "data.path = corpus" in refused(capsys, *common, "data={source: jsonl, path: corpus}")
    assert "data.path = ~/c" in refused(capsys, *common, "sweep.axes={data: [{source: jsonl, path: ~/c}]}")
    assert "teacher.model = ./m" in refused(capsys, "submit", file, *store, "--set", "teacher={model: ./m}")
    assert "teacher.shape" in refused(capsys, "submit", file, *store, "--set", "teacher={model: /mnt/m}")
    assert "cluster_name" in refused(capsys, "submit", file, "--cluster", file)


def test_data_that_only_the_cluster_has_is_no_mistake(file, cluster):
    vocabulary = "teacher.pretrain.tokenizer.vocabulary=300"
    one = submit(file, cluster.address, vocabulary, "data={source: jsonl, path: /mnt/corpus}")
    assert one != submit(file, cluster.address, vocabulary, "data={source: jsonl, path: /mnt/other}")


def test_a_token_is_sent_where_it_is_asked_for_and_never_shown(file, cluster, capsys, monkeypatch, token_mode):
    cluster.token = "t0ken" * 8
    command = ("submit", file, "--address", cluster.address, "--store", "/mnt/runs")
    assert "asks for a token, and there is none" in refused(capsys, *command)
    Path(".ray").mkdir()
    Path(".ray/auth_token").write_text("wr0ng" * 8)
    error = refused(capsys, *command)
    assert "does not accept this token" in error
    assert "wr0ng" not in error
    assert not cluster.jobs
    from ray._raylet import AuthenticationTokenLoader

    Path(".ray/auth_token").write_text(cluster.token + "\n")
    AuthenticationTokenLoader.instance().reset_cache()
    with pytest.raises(SystemExit) as end:
        main([*command])
    assert not end.value.code
    shown = capsys.readouterr()
    (job,) = cluster.jobs.values()
    assert cluster.token not in shown.out + shown.err + str(job)


def test_jobs_are_listed_found_stopped_and_have_an_exit_code(file, cluster, capsys):
    from pipeline.submission.job_server import JobServer
    from pipeline.submission.jobs import exit_code, find

    first = submit(file, cluster.address)
    with pytest.raises(SystemExit):
        main(["jobs", "--address", cluster.address])
    shown = capsys.readouterr().out
    assert "running" in shown
    assert "3.5 of 17 CPU in use" in shown
    server = JobServer(cluster.address)
    assert find(server, "toy") == first
    assert first in refused(capsys, "logs", "nothere", "--address", cluster.address)
    with pytest.raises(SystemExit):
        main(["logs", "toy", "--address", cluster.address])
    assert capsys.readouterr().out == "said\n"
    with pytest.raises(SystemExit):
        main(["stop", first, "--address", cluster.address])
    assert exit_code(server.get_job_info(first)) == 130
    for number, (status, code, seen) in enumerate([("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", -9, 137)]):
        cluster.add_job(f"j{number}", status, code)
        assert exit_code(server.get_job_info(f"j{number}")) == seen
    cluster.add_job("lost", "FAILED", None, message="\nthe node died\nmore")
    with pytest.raises(UserError, match="the node died"):
        exit_code(server.get_job_info("lost"))


def test_following_ends_with_the_jobs_exit_code_and_ctrl_c_leaves_it_alone(file, cluster, capsys, monkeypatch):
    job = submit(file, cluster.address)
    command = ["submit", file, "--address", cluster.address, "--store", "/mnt/runs", "--follow"]

    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.submission.job_server.JobServer.tail", interrupted)
    with pytest.raises(SystemExit) as end:
        main(command)
    assert not end.value.code
    assert "the job goes on" in capsys.readouterr().err
    assert cluster.jobs[job]["status"] == "RUNNING"

    def last_words(server: object, name: str, write: Callable[[str], None], skip: int) -> int:
        cluster.end(job, "FAILED", 3)
        write("sa")
        return skip + 2

    monkeypatch.setattr("pipeline.submission.job_server.JobServer.tail", last_words)
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 3
    assert capsys.readouterr().out == "said\n"  # what the connection's end cut off is asked for
