"""The data stage on a real Ray cluster: fixed order, exact counts, bounded waiting."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from overfill.errors import UserError
from pipeline.config import DataConfig, StageResources
from pipeline.corpus.chat import load_tokenizer
from pipeline.corpus.shards import TokenShards
from pipeline.corpus.tokenizer import as_transformers, character_tokenizer, save_tokenizer
from pipeline.corpus.toy import toy_row
from pipeline.fingerprint import identity_config
from pipeline.stage import External, Stage, StageRun, Stopped
from pipeline.stages import data

pytestmark = pytest.mark.integration


@pytest.fixture(scope="session")
def tokenizer_payload(tmp_path_factory):
    payload = tmp_path_factory.mktemp("payload")
    save_tokenizer(character_tokenizer(), payload / "tokenizer")
    return payload


@pytest.fixture
def make(tmp_path, tokenizer_payload, ray_cluster):
    """Runs the stage on a config; gives the folder it wrote and its metrics."""

    def run_stage(name="out", workers=2, stop=lambda: False, **settings):
        config = DataConfig(**settings)
        files = None if config.path is None else Path(config.path)
        inputs = {"tokenizer": External("model", "t")} | ({} if files is None else {"files": External("files", "f")})
        places = {"tokenizer": tokenizer_payload} | ({} if files is None else {"files": files})
        folder = tmp_path / name
        folder.mkdir()
        run = StageRun(
            stage=Stage("data", 1, identity_config(config), inputs, "pipeline.stages.data:run"),
            inputs=places,
            staging=folder,
            progress=tmp_path,
            attempt=tmp_path,
            resources=StageResources(workers=workers, cpus_per_worker=0.25),
            stop_requested=stop,
        )
        return folder, data.run(run)

    return run_stage


def write_lines(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    return str(path)


def sums(i):
    return {"prompt": f"add: {i} + {i * 7 % 1000}", "completion": str(i + i * 7 % 1000)}


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def prompts(folder, split):
    """The questions of a split, in sample order."""
    tokenizer = as_transformers(character_tokenizer())
    texts = tokenizer.batch_decode([row.prompt for row in TokenShards.open(folder / split)])
    return [text.removeprefix("<user>").removesuffix("<assistant>") for text in texts]


def references(folder, split="train"):
    return [row.reference for row in TokenShards.open(folder / split)]


def test_the_toy_corpus_is_tokenised_as_it_is_generated(make, tokenizer_payload):
    folder, metrics = make(train_samples=300, test_samples=40)
    tokenizer = load_tokenizer(tokenizer_payload / "tokenizer")
    for split, count in (("train", 300), ("test", 40)):
        shards = TokenShards.open(folder / split)
        assert len(shards) == count == metrics[f"data/{split}_samples"]
        for row in shards:
            expected = toy_row(DataConfig().tasks, 0, split, row.sample)
            assert tokenizer.decode(row.prompt) == f"<user>{expected['prompt']}<assistant>"
            assert tokenizer.decode(row.response) == f"{expected['completion']}<end>"
            assert row.reference == expected["completion"]
        assert metrics[f"data/{split}_tokens"] == shards.lengths.sum()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["train"]["skipped"] == 0
    assert summary["end_of_turn"] == tokenizer.eos_token_id


def test_the_bytes_do_not_depend_on_tasks_or_pieces(make, tmp_path, monkeypatch):
    path = write_lines(tmp_path / "c.jsonl", [sums(i) for i in range(3000)])
    whole, _ = make("whole", workers=1, source="jsonl", path=path, held_out=0.1, max_length=64)
    monkeypatch.setattr("pipeline.corpus.files.PIECE_BYTES", 5000)
    monkeypatch.setattr("pipeline.stages.data.BLOCK_BYTES", 4096)
    pieces, _ = make("pieces", workers=3, source="jsonl", path=path, held_out=0.1, max_length=64)
    assert digests(whole) == digests(pieces)
    train, test = prompts(whole, "train"), prompts(whole, "test")
    assert 220 < len(test) < 380  # a tenth; standard deviation 16
    in_file_order = [sums(i)["prompt"] for i in range(3000)]
    assert train == [prompt for prompt in in_file_order if prompt not in set(test)]
    assert test == [prompt for prompt in in_file_order if prompt in set(test)]


def test_all_kinds_of_files_give_the_same_shards(make, tmp_path):
    rows = [sums(i) for i in range(700)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=90)
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "folder").mkdir()
    write_lines(tmp_path / "folder" / "train-0.jsonl", rows[:400])
    write_lines(tmp_path / "folder" / "train-1.jsonl.gz", rows[400:])
    (tmp_path / "folder" / "LICENSE").write_text("MIT")
    paths = {
        "lines": ("jsonl", write_lines(tmp_path / "c.jsonl", rows)),
        "zipped": ("jsonl", write_lines(tmp_path / "c.jsonl.gz", rows)),
        "array": ("jsonl", str(tmp_path / "array.json")),
        "folder": ("jsonl", str(tmp_path / "folder")),
        "parquet": ("parquet", str(tmp_path / "c.parquet")),
    }
    columns = {"prompt": "prompt", "completion": "completion"}
    results = {
        name: digests(make(f"from {name}", source=source, path=path, columns=columns, held_out=0.2)[0])
        for name, (source, path) in paths.items()
    }
    assert all(result == results["lines"] for result in results.values())


def test_bad_rows_are_counted_and_the_good_ones_kept(make, tmp_path):
    rows = [sums(i) for i in range(200)]
    bad = ["{not json", {"prompt": "x"}, {"prompt": "x", "completion": " "}, {"prompt": "x" * 99, "completion": "y"}]
    path = write_lines(tmp_path / "c.jsonl", rows[:100] + bad + rows[100:])
    folder, metrics = make(source="jsonl", path=path, max_length=64)
    summary = json.loads((folder / "summary.json").read_text())
    by_reason = summary["train"]["skipped_by_reason"]
    assert by_reason["malformed"] == 2 and by_reason["empty"] == 1
    # Held-out rows that are too long are counted with the test split.
    assert by_reason.get("too_long", 0) + summary["test"]["skipped_by_reason"].get("too_long", 0) == 1
    assert metrics["data/train_samples"] + metrics["data/test_samples"] == 200


def test_a_limit_takes_the_first_samples_and_stops_reading(make, tmp_path):
    rows = [sums(i) for i in range(50)] + ["{broken"] * 20_000
    write_lines(tmp_path / "train.jsonl", rows)
    write_lines(tmp_path / "test.jsonl", [sums(i) for i in range(900, 920)])
    folder, metrics = make(source="jsonl", path=str(tmp_path), train_samples=30, test_samples=7)
    assert references(folder) == [sums(i)["completion"] for i in range(30)]
    assert references(folder, "test") == [sums(i)["completion"] for i in range(900, 907)]
    assert metrics["data/train_skipped"] == 0


def test_a_corpus_whose_columns_are_named_otherwise_is_refused_with_an_example(make, tmp_path):
    path = write_lines(tmp_path / "c.jsonl", [{"question": "q", "answer": "a"}] * 50)
    with pytest.raises(UserError, match=r"50 of the first 50 rows.*malformed 50.*question, answer.*data\.columns"):
        make(source="jsonl", path=path)


def test_a_hopeless_corpus_is_given_up_early(make, tmp_path):
    path = write_lines(tmp_path / "c.jsonl", [{"text": "x"}] * 60_000)
    with pytest.raises(UserError, match=r"of the first [1-5]\d,\d\d\d rows"):
        make(source="jsonl", path=path)


def test_a_damaged_archive_is_the_users_to_mend(make, tmp_path):
    path = Path(write_lines(tmp_path / "c.jsonl.gz", [sums(i) for i in range(500)]))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"c\.jsonl\.gz: cannot be read \(.*Copy it again") as error:
        make(source="jsonl", path=str(path))
    assert "\n" not in str(error.value), "a mistake of the user's is one line, not a traceback from a worker"


def test_an_empty_parquet_file_is_the_users_to_mend(make, tmp_path):
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="the train split has no rows"):
        make(source="parquet", path=str(tmp_path / "c.parquet"))


def test_a_stop_leaves_no_index_behind(make, tmp_path):
    with pytest.raises(Stopped, match="data: stopped"):
        make(train_samples=300, stop=lambda: True)
    assert not list(tmp_path.rglob("index.parquet"))


def test_it_gets_on_inside_a_tune_trial_while_others_hold_the_machine(make, tmp_path):
    """A trial's placement group has room for its driver only, and training workers hold most of both CPUs."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    @ray.remote(num_cpus=0.8)
    class Busy:
        def ready(self):
            return True

    def write_toy(staging, tokenizer):  # nested, so that it travels by value: workers do not import tests
        config = identity_config(DataConfig(train_samples=100, test_samples=10))
        stage = Stage("data", 1, config, {"tokenizer": External("model", "t")}, "pipeline.stages.data:run")
        resources = StageResources(workers=2, cpus_per_worker=0.2)
        return data.run(StageRun(stage, {"tokenizer": tokenizer}, staging, staging, staging, resources))

    others = [Busy.remote() for _ in range(2)]
    ray.get([other.ready.remote() for other in others])
    group = ray.util.placement_group([{"CPU": 0.01}])
    ray.get(group.ready(), timeout=30)
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    (tmp_path / "trial").mkdir()
    trial = ray.remote(num_cpus=0.01, scheduling_strategy=strategy)(write_toy)
    try:
        tokenizer = tmp_path / "tokenizer"
        save_tokenizer(character_tokenizer(), tokenizer)
        assert ray.get(trial.remote(tmp_path / "trial", tokenizer), timeout=90)["data/train_samples"] == 100
    finally:
        ray.util.remove_placement_group(group)
        for other in others:
            ray.kill(other)
