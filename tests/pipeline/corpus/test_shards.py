"""Token shards give back what was written, row by row, and depend on the samples alone."""

import hashlib
import pickle

import numpy as np
import pyarrow as pa
import pytest

from overfill.errors import UserError
from pipeline.corpus.shards import SAMPLES_PER_GROUP, ShardWriter, TokenShards, write_samples


def make_rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (
            rng.integers(0, 30000, rng.integers(1, 9)).tolist(),
            rng.integers(0, 30000, rng.integers(1, 7)).tolist(),
            f"é{i}",
        )
        for i in range(count)
    ]


def table(rows):
    prompts, responses, references = zip(*rows, strict=True)
    return pa.table({"prompt": prompts, "response": responses, "reference": references})


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_every_row_comes_back_wherever_it_lies(tmp_path):
    rows = make_rows(5 * SAMPLES_PER_GROUP + 7)
    with ShardWriter(tmp_path / "s", samples_per_shard=2 * SAMPLES_PER_GROUP) as writer:
        writer.write(table(rows))
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [
        "index.parquet",
        "part-00000.parquet",
        "part-00001.parquet",
        "part-00002.parquet",
    ]
    shards = TokenShards.open(tmp_path / "s", cache_bytes=1)  # nothing stays cached
    assert len(shards) == len(rows)
    order = np.random.default_rng(1).permutation(len(rows))
    for sample, row in zip(order, shards.read(order), strict=True):
        assert (row.sample, row.prompt.tolist(), row.response.tolist(), row.reference) == (sample, *rows[sample])
    assert [row.reference for row in shards] == [row[2] for row in rows]
    assert shards.prompt_lengths.tolist() == [len(row[0]) for row in rows]
    assert shards.response_lengths.tolist() == [len(row[1]) for row in rows]
    assert (shards.lengths == shards.prompt_lengths + shards.response_lengths).all()
    assert writer.prompt_tokens == shards.prompt_lengths.sum()
    assert writer.response_tokens == shards.response_lengths.sum()


def test_the_bytes_do_not_depend_on_how_the_rows_were_batched(tmp_path):
    rows = make_rows(3 * SAMPLES_PER_GROUP + 5)
    for name, sizes in {"one": [len(rows)], "many": [1, 63, 64, 2, 30, len(rows)]}.items():
        with ShardWriter(tmp_path / name, samples_per_shard=SAMPLES_PER_GROUP) as writer:
            start = 0
            for size in sizes:
                if rows[start : start + size]:
                    writer.write(table(rows[start : start + size]))
                start += size
    assert digests(tmp_path / "one") == digests(tmp_path / "many")
    assert len(digests(tmp_path / "one")) == 5


def test_the_cache_stays_within_its_bytes(tmp_path):
    shards = write_samples(tmp_path / "s", make_rows(20 * SAMPLES_PER_GROUP))
    shards = TokenShards.open(shards.folder, cache_bytes=20_000)
    shards.read(np.arange(len(shards)))
    assert 0 < shards._cached <= 20_000
    assert shards._cached == sum(group.bytes for group in shards._groups.values())


def test_shards_travel_to_a_worker_as_their_folder(tmp_path):
    shards = write_samples(tmp_path / "s", make_rows(10))
    shards.read([3])
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.read([4])[0].reference == "é4"
    assert len(pickle.dumps(shards)) < 1000


def test_an_interrupted_write_leaves_nothing_that_opens(tmp_path):
    with pytest.raises(RuntimeError, match="power cut"), ShardWriter(tmp_path / "s") as writer:
        writer.write(table(make_rows(200)))
        raise RuntimeError("power cut")
    with pytest.raises(UserError, match=r"index\.parquet is missing"):
        TokenShards.open(tmp_path / "s")


def test_samples_out_of_range_are_refused_not_wrapped(tmp_path):
    shards = write_samples(tmp_path / "s", make_rows(10))
    with pytest.raises(IndexError, match="-1"):
        shards.read([0, -1])
    with pytest.raises(IndexError, match="10"):
        shards.read([10])
    assert shards.read([]) == []


def test_an_empty_corpus_has_no_samples(tmp_path):
    with ShardWriter(tmp_path / "s"):
        pass
    assert len(TokenShards.open(tmp_path / "s")) == 0
