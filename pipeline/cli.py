"""The command line. Thin: every command reads its arguments, calls one function, prints."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from overfill.errors import UserError, disk_full

if TYPE_CHECKING:
    from pipeline.submission.job_server import JobServer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="OverFill: a full model reads the prompt, a width-pruned copy of it writes the answer.",
)
INTERRUPTED = 130
"""Exit code after Ctrl-C, SIGTERM or SIGHUP."""

File = Annotated[str, typer.Argument(metavar="FILE", help="An experiment's YAML file.")]
Name = Annotated[str | None, typer.Argument(metavar="NAME", help="An experiment's name; the only one when left out.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a field by dotted path.")
]
StoreOption = Annotated[str | None, typer.Option("--store", help="Folder of results; $OVERFILL_STORE or ./runs.")]
Address = Annotated[str | None, typer.Option("--address", help="A running Ray cluster; left out: this machine.")]
Server = Annotated[
    str | None, typer.Option("--address", help="The cluster's job server; http://127.0.0.1:8265 when left out.")
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="A job's name, or its experiment's.")]
Verify = Annotated[bool, typer.Option("--verify", help="Also read every byte of what is there and check its digest.")]
Continue = Annotated[bool, typer.Option("--continue-stopped", help="Also take up cells that were stopped early.")]


@app.command()
def run(
    file: File,
    overrides: Overrides = None,
    store: StoreOption = None,
    address: Address = None,
    continue_stopped: Continue = False,
) -> None:
    """Run every cell of FILE; what is finished already is reused."""
    from pipeline.commands import run_experiment
    from pipeline.experiment import open_store, read_experiment

    _exit(run_experiment(read_experiment(file, overrides or ()), open_store(store), address, continue_stopped))


@app.command()
def resume(
    name: Name = None, store: StoreOption = None, address: Address = None, continue_stopped: Continue = False
) -> None:
    """Run what is missing of an experiment that was started before."""
    from pipeline.commands import run_experiment
    from pipeline.experiment import known_experiment, open_store

    here = open_store(store)
    _exit(run_experiment(known_experiment(here, name), here, address, continue_stopped))


@app.command()
def plan(file: File, overrides: Overrides = None, store: StoreOption = None, verify: Verify = False) -> None:
    """Say what would run, be reused or resumed, and why; parameters, memory, cost. Runs nothing."""
    from pipeline.experiment import open_store, read_experiment
    from pipeline.planning import print_plan

    print_plan(read_experiment(file, overrides or ()), open_store(store, verify), Console())


@app.command()
def status(
    name: Name = None,
    store: StoreOption = None,
    verify: Verify = False,
    address: Annotated[
        str | None, typer.Option("--address", help="A cluster's job server, to ask how much of it is in use.")
    ] = None,
) -> None:
    """Show where every cell of an experiment stands, and how much of the cluster is in use."""
    from pipeline.commands import print_experiment_status
    from pipeline.experiment import known_experiment, open_store

    here = open_store(store, verify)
    print_experiment_status(known_experiment(here, name), here, address, Console())


@app.command()
def report(
    name: Name = None,
    max_tpot: Annotated[
        str | None, typer.Option(metavar="TIME", help="Recommend what decodes a token within this time: 20ms.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Recommend what decodes within this memory: 6GB.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object per cell, as a JSON list.")] = False,
    as_summary: Annotated[
        bool, typer.Option("--summary", help="What is concluded from the cells, as one JSON object.")
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One line per cell.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Answers and tables in Markdown.")] = False,
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write everything into one page that needs no network.")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Compare the cells of an experiment, and say what to ship."""
    from pipeline.commands import print_comparison
    from pipeline.experiment import known_experiment, open_store
    from pipeline.reporting.pareto import read_budget

    forms = {"json": as_json, "summary": as_summary, "csv": as_csv, "markdown": as_markdown}
    budget = read_budget(max_tpot, max_memory)
    here = open_store(store)
    print_comparison(known_experiment(here, name), here, budget, [form for form, asked in forms.items() if asked], html)


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Remove what is listed.")] = False,
    keep_checkpoints: Annotated[
        int, typer.Option(min=1, help="Newest step checkpoints of an unfinished stage that stay.")
    ] = 1,
    store: StoreOption = None,
) -> None:
    """List what no experiment of the store refers to, and leftovers of killed processes; removes nothing by itself."""
    from pipeline import gc as in_folder
    from pipeline.experiment import open_store
    from pipeline.objects import gc as in_bucket
    from pipeline.objects.store import ObjectStore

    here = open_store(store)
    if isinstance(here, ObjectStore):
        in_bucket.collect_garbage(here, delete, keep_checkpoints, Console())
    else:
        in_folder.collect_garbage(here, delete, keep_checkpoints, Console())


@app.command()
def ui(
    store: StoreOption = None,
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 5000,
    host: Annotated[str | None, typer.Option(help="Address to listen on; only this machine by default.")] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="For a cluster to log to (MLFLOW_TRACKING_URI): may begin empty.")
    ] = False,
) -> None:
    """Open the MLflow UI on the store's runs."""
    from pipeline.commands import serve_ui
    from pipeline.experiment import open_store

    serve_ui(open_store(store), host, port, serve)


@app.command()
def register(
    name: Name = None,
    model: Annotated[str, typer.Option("--as", help="Name of the registered model.")] = "overfill",
    cell: Annotated[
        str | None, typer.Option(help="A cell's label; left out: the one that the report says to ship.")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Register a finished cell's student in MLflow's model registry."""
    from pipeline.experiment import known_experiment, open_store
    from pipeline.tracking.register import register as register_student

    here = open_store(store)
    chosen, version = register_student(known_experiment(here, name), here, cell, model)
    typer.echo(f"{chosen.label}: models:/{model}/{version}")


@app.command()
def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A student folder; its full model stands in its manifest.")
    ],
    prompt: Annotated[str, typer.Argument(help="The text to answer.")],
    full: Annotated[str | None, typer.Option(help="Where the full model lies, if it has moved.")] = None,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the tokenizer's chat template.")] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the most probable tokens of this share.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    refresh: Annotated[
        str, typer.Option(help="How often the full model is asked again: none, tokens (64), entropy>2.0, or exact.")
    ] = "none",
    decoder: Annotated[str, typer.Option(help="eager, or compiled: takes a minute first, for long answers.")] = "eager",
) -> None:
    """Answer a prompt with a two-stage model, streaming to the terminal."""
    from pipeline.answer import Sampling, answer

    sampling = Sampling(max_new_tokens, temperature, top_p, seed, refresh)
    answer(model, prompt, full, chat, sampling, device, decoder)


@app.command()
def bench(
    student: Annotated[
        str | None, typer.Argument(metavar="STUDENT_FOLDER", help="A student; its full model stands in its manifest.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights of a named shape and pruning ratio: llama-3.2-3b:0.45.")
    ] = None,
    full: Annotated[str | None, typer.Option(help="Where the full model lies, if it has moved.")] = None,
    batch: Annotated[str, typer.Option(help="Rows decoded at once; a list such as 1,8 makes a grid.")] = "1",
    prompt: Annotated[str, typer.Option(help="Prompt lengths in tokens, a list.")] = "128",
    output: Annotated[str, typer.Option(help="New tokens, a list.")] = "32",
    systems: Annotated[str | None, typer.Option(help="A list of systems; left out: all that apply.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    decoder: Annotated[str, typer.Option(help="eager, compiled, or auto: compiled where that is possible.")] = "auto",
    repeats: Annotated[int, typer.Option(help="Measured repetitions, of which medians are taken.")] = 5,
    warmup: Annotated[int, typer.Option(help="Repetitions before, not counted.")] = 1,
    refresh: Annotated[str, typer.Option(help="Of overfill-refresh: tokens between refreshes, or entropy>2.0.")] = "64",
    draft: Annotated[int | None, typer.Option(help="Tokens drafted at once; left out: adaptive.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; left out: PyTorch's choice.")] = None,
    weights: Annotated[
        str, typer.Option(help="The student's, in our own systems: stored, or int8 (on a CPU).")
    ] = "stored",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line per measurement, nothing else.")] = False,
    plot: Annotated[str | None, typer.Option(help="Draw the roofline into this file (.png, .svg, .pdf).")] = None,
) -> None:
    """Measure TTFT, TPOT and the memory bound of two-stage decoding and of what it is compared with."""
    from pipeline.bench import BenchRequest
    from pipeline.bench import bench as run_bench

    options = {name: value for name, value in locals().items() if name in BenchRequest.__dataclass_fields__}
    run_bench(BenchRequest(**options))


@app.command()
def schema() -> None:
    """Print the JSON Schema of experiment files, for editors."""
    from pipeline.config_io import schema as experiment_schema

    typer.echo(json.dumps(experiment_schema(), indent=2))


@app.command()
def submit(
    file: File,
    address: Server = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show the job's log and end with its exit code.")] = False,
    overrides: Overrides = None,
    store: Annotated[
        str | None, typer.Option("--store", help="Folder of results on the cluster; the cluster file's when left out.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", metavar="NAME", help="Give the job this variable; may be repeated.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the job; the experiment's when left out.")] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Cluster file with our settings; ./cluster.yaml when it is there.")
    ] = None,
    manifest: Annotated[
        str | None, typer.Option(help="Print the job for this system instead of sending it: kuberay.")
    ] = None,
) -> None:
    """Run FILE on a Ray cluster as a job; again: attach to it, or go on after its end."""
    from pipeline.submission.submit import Request, submit

    request = Request(file, overrides or (), store, name, env or (), cluster)
    if manifest is not None:
        from pipeline.submission.manifest import print_manifest

        print_manifest(manifest, request)
        return
    console = Console(stderr=True)
    server, job = submit(request, address, console)
    if follow:
        _follow(server, job, console)
    else:
        console.print(f"follow it with: overfill logs {job} --follow", highlight=False, soft_wrap=True)


@app.command()
def jobs(address: Server = None) -> None:
    """The jobs of a cluster, and how much of it is in use."""
    from pipeline.submission.job_server import JobServer
    from pipeline.submission.jobs import print_jobs

    print_jobs(JobServer(address), Console())


@app.command()
def logs(
    job: Job,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends; its exit code.")] = False,
    address: Server = None,
) -> None:
    """Show what a job has said."""
    from pipeline.submission.job_server import JobServer
    from pipeline.submission.jobs import find, print_log

    server = JobServer(address)
    if follow:
        _follow(server, find(server, job), Console(stderr=True))
    else:
        print_log(server, find(server, job))


@app.command()
def stop(job: Job, address: Server = None) -> None:
    """End a job; what it has done stays, and submitting it again goes on from there."""
    from pipeline.submission.job_server import JobServer
    from pipeline.submission.jobs import find
    from pipeline.submission.jobs import stop as stop_job

    server = JobServer(address)
    _exit(stop_job(server, find(server, job), Console(stderr=True)))


def _follow(server: JobServer, job: str, console: Console) -> None:
    from pipeline.submission.jobs import follow

    try:
        code = follow(server, job)
    except KeyboardInterrupt:
        console.print(f"no longer following; the job goes on (overfill logs {job} --follow, overfill stop {job})")
        code = 0
    _exit(code)


def _exit(code: int) -> None:
    if code:
        raise typer.Exit(code)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: a user's mistake is one line and exit code 2; an interrupted run is exit code 130."""
    try:
        app(args=arguments, prog_name="overfill")
    except UserError as error:
        sys.stderr.write(f"overfill: {error}\n")
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer has made this of a KeyboardInterrupt
            sys.stderr.write("overfill: interrupted; the same command goes on from here\n")
        raise
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        said = disk_full(error) or (error if "://" in str(error.filename) else None)  # a store that is away
        if said is None:
            raise
        sys.stderr.write(f"overfill: {said}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
