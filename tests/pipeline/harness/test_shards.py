"""Answers are kept shard by shard, and only whole ones count."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.harness.shards import Answers, Shard, answered, keep, kept, missing, plan, shard_file


def answers(*documents: int) -> Answers:
    entry = {"loglikelihood/0": {"request": "abc", "answers": [(-1.5, True)]}}
    return Answers(dict.fromkeys(documents, entry), truncated=len(documents))


def test_every_document_is_in_one_shard():
    shards = plan({"a": 5, "b": 2}, 2)
    assert shards == [Shard("a", 0, 2), Shard("a", 2, 4), Shard("a", 4, 5), Shard("b", 0, 2)]


def test_kept_answers_are_read_back(tmp_path: Path):
    keep(tmp_path, Shard("a/b: c", 0, 2), answers(0, 1))
    keep(tmp_path, Shard("a/b: c", 2, 3), answers(2))
    keep(tmp_path, Shard("other", 0, 1), answers(0))
    found = kept(tmp_path, "a/b: c")
    assert sorted(found.documents) == [0, 1, 2]
    assert found.documents[2] == {"loglikelihood/0": {"request": "abc", "answers": [[-1.5, True]]}}
    assert found.truncated == 3


def test_what_is_damaged_is_done_again(tmp_path: Path):
    shards = plan({"a": 6}, 2)
    for shard in shards:
        keep(tmp_path, shard, answers(shard.start, shard.start + 1))
    assert missing(tmp_path, shards) == []
    torn, altered = shard_file(tmp_path, shards[0]), shard_file(tmp_path, shards[2])
    torn.write_text(torn.read_text()[:40])
    entry = json.loads(altered.read_text())
    entry["content"]["documents"]["4"]["loglikelihood/0"]["answers"] = [[0.0, True]]
    altered.write_text(json.dumps(entry))
    assert missing(tmp_path, shards) == [shards[0], shards[2]]


def test_shards_of_another_size_count_by_their_documents(tmp_path: Path):
    keep(tmp_path, Shard("a", 0, 4), answers(0, 1, 2, 3))
    assert missing(tmp_path, plan({"a": 7}, 3)) == [Shard("a", 3, 6), Shard("a", 6, 7)]
    keep(tmp_path, Shard("a", 3, 6), answers(3, 4, 5))
    assert answered(tmp_path, "a") == 6
    assert answered(tmp_path, "b") == 0
