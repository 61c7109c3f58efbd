"""Memory of the data stage while the corpus grows: it should not grow with it.

    python benchmarks/data_memory.py [--megabytes 16] [--scales 1,10] [--workers 2]

For each scale a corpus of JSON lines is written (random words, about 1 kB a row), and the data stage tokenises it on a
Ray cluster of its own with a small object store. Four times a second the private memory of the driver and of Ray's
workers is read from /proc (Linux), and the pages of the object store that were ever written. Shown are the peaks: a
table for people, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import string
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MIB = 2**20
OBJECT_STORE_MIB = 100
WORDS_IN_ROW = 160


def write_corpus(path: Path, size: int) -> int:
    """Write about `size` bytes of JSON lines; the number of rows."""
    draw = random.Random(0)
    words = ["".join(draw.choices(string.ascii_lowercase, k=5)) for _ in range(20_000)]
    rows = 0
    with path.open("w") as file:
        while file.tell() < size:
            for _ in range(100):
                text = [" ".join(draw.choices(words, k=WORDS_IN_ROW // 2)) for _ in range(2)]
                file.write(json.dumps({"prompt": text[0], "completion": text[1]}) + "\n")
                rows += 1
    return rows


def descendants(root: int) -> dict[int, str]:
    """Process id -> command line of a process and of all that it started."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile
    found: dict[int, str] = {}
    frontier = [root]
    while frontier:
        process = frontier.pop()
        try:
            found[process] = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        frontier += [child for child, parent in parents.items() if parent == process]
    return found


def private_bytes(process: int) -> int:
    """Bytes of a process that are in memory and shared with no file or other process; 0 if it ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    sizes = [int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon:")]
    return sum(sizes)


def object_store_bytes(raylet: int) -> int:
    """Bytes of Ray's object store that were ever written: blocks of its (deleted) file in shared memory."""
    files: dict[int, int] = {}
    for descriptor in Path(f"/proc/{raylet}/fd").iterdir():
        try:
            if "plasma" in os.readlink(descriptor):  # noqa: PTH115 - the target no longer exists
                status = descriptor.stat()
                files[status.st_ino] = status.st_blocks * 512
        except FileNotFoundError:
            continue  # closed meanwhile
    return sum(files.values())


class PeakMemory:
    """Watches this process, its Ray workers and its object store from a thread."""

    def __init__(self) -> None:
        self.driver = self.workers = self.object_store = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.25):
            commands = descendants(os.getpid())
            memory = {process: private_bytes(process) for process in commands}
            self.driver = max(self.driver, memory[os.getpid()])
            self.workers = max(
                self.workers, sum(memory[process] for process, command in commands.items() if "ray::" in command)
            )
            for process, command in commands.items():
                if "raylet/raylet" in command.partition(" ")[0]:
                    self.object_store = max(self.object_store, object_store_bytes(process))


def measure(size: int, workers: int) -> dict[str, float]:
    """Run the data stage on a corpus of `size` bytes, in this process and on a Ray cluster of its own."""
    import ray

    from pipeline.cluster import set_environment
    from pipeline.config import DataConfig, StageResources
    from pipeline.corpus.tokenizer import save_tokenizer, train_byte_level_bpe
    from pipeline.fingerprint import identity_config
    from pipeline.stage import External, Stage, StageRun
    from pipeline.stages import data

    set_environment()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "payload").mkdir()
        rows = write_corpus(folder / "corpus.jsonl", size)
        with (folder / "corpus.jsonl").open() as file:
            lines = [file.readline() for _ in range(1000)]
        save_tokenizer(train_byte_level_bpe(lines, 1000), folder / "tokenizer")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_MIB * MIB,
            log_to_driver=False,
            logging_level="error",
        )
        config = identity_config(DataConfig(source="jsonl", path=str(folder / "corpus.jsonl"), test_samples=100))
        inputs = {"tokenizer": External("model", "t"), "files": External("files", "f")}
        stage = Stage("data", 1, config, inputs, "pipeline.stages.data:run")
        places = {"tokenizer": folder / "tokenizer", "files": folder / "corpus.jsonl"}
        resources = StageResources(workers=workers, cpus_per_worker=0.25)
        started = time.perf_counter()
        with PeakMemory() as peak:
            metrics = data.run(StageRun(stage, places, folder / "payload", folder, folder, resources))
        seconds = time.perf_counter() - started
        ray.shutdown()
    return {
        "corpus_mib": round(size / MIB, 1),
        "rows": rows,
        "tokens": int(metrics["data/train_tokens"]) + int(metrics["data/test_tokens"]),
        "seconds": round(seconds, 1),
        "driver_mib": round(peak.driver / MIB, 1),
        "workers_mib": round(peak.workers / MIB, 1),
        "object_store_mib": round(peak.object_store / MIB, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=16, help="corpus at scale 1, MiB")
    parser.add_argument("--scales", default="1,10", help="multiples of it")
    parser.add_argument("--workers", type=int, default=2, help="concurrent tokenising tasks")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # measure here: a fresh process per scale
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(int(arguments.megabytes * MIB), arguments.workers)))
        return
    results = []
    for scale in arguments.scales.split(","):
        command = [sys.executable, __file__, "--one", "--workers", str(arguments.workers)]
        command += ["--megabytes", str(arguments.megabytes * float(scale))]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        results.append(json.loads(output.splitlines()[-1]))
    names = list(results[0])
    print("  ".join(f"{name:>16}" for name in names))
    for result in results:
        print("  ".join(f"{result[name]:>16,}" for name in names))
    print(json.dumps({"benchmark": "data_memory", "workers": arguments.workers, "results": results}))


if __name__ == "__main__":
    main()
