"""Pieces cover a corpus exactly once and in order; sources say what they miss."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overfill.errors import UserError
from pipeline.config import DataConfig
from pipeline.corpus import hub
from pipeline.corpus.files import pieces_of_files
from pipeline.corpus.pieces import LinesPiece, ParquetPiece, ToyPiece
from pipeline.corpus.rows import RowError, RowForm
from pipeline.corpus.sources import open_source


def rows_of(pieces):
    return [row for piece in pieces for row in piece.rows()]


@given(
    sizes=st.lists(st.integers(0, 30), max_size=25),
    piece=st.integers(1, 60),
    final_newline=st.booleans(),
    line_end=st.sampled_from(["\n", "\r\n", "\n\n"]),
)
@settings(max_examples=120, deadline=None)
def test_cutting_a_file_of_lines_anywhere_loses_and_repeats_nothing(
    tmp_path_factory, sizes, piece, final_newline, line_end
):
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    rows = [{"i": i, "é": "ö" * size} for i, size in enumerate(sizes)]
    text = line_end.join(json.dumps(row, ensure_ascii=False) for row in rows) + (line_end if final_newline else "")
    path.write_bytes(text.encode())
    size = len(text.encode())
    pieces = [LinesPiece(str(path), start, min(start + piece, size)) for start in range(0, max(size, 1), piece)]
    assert rows_of(pieces) == rows


def test_a_broken_line_is_a_reason_not_an_error(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b'{"a": 1}\n{"a": \n\xff\xfe{}\n{"a": 2}\n')
    first, broken, binary, last = rows_of([LinesPiece(str(tmp_path / "c.jsonl"))])
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert isinstance(broken, RowError) and broken.reason == "malformed" and "not JSON" in broken.detail
    assert isinstance(binary, RowError)


def test_parquet_is_cut_into_row_groups_and_reads_the_columns_it_needs(tmp_path):
    rows = [{"q": f"q{i}", "a": f"a{i}", "other": "x" * 100} for i in range(25)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=10)
    pieces = pieces_of_files([str(tmp_path / "c.parquet")], RowForm(prompt="q", completion="a"))
    assert [piece.row_group for piece in pieces] == [0, 1, 2]
    assert rows_of(pieces) == [{"q": row["q"], "a": row["a"]} for row in rows]
    # Columns that are not there are not asked for: the row then names those that are.
    (missing,) = {piece.columns for piece in pieces_of_files([str(tmp_path / "c.parquet")], RowForm(messages="m"))}
    assert missing is None


def test_chats_in_parquet_come_as_lists_of_turns(tmp_path):
    chat = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    pq.write_table(pa.Table.from_pylist([{"conversations": chat}] * 3), tmp_path / "c.parquet")
    source = open_source(DataConfig(source="parquet", path=str(tmp_path / "c.parquet")))
    train, test = (list(source.split(split).sound_conversations()) for split in ("train", "test"))
    assert (train + test)[0] == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert len(train + test) == 3


def test_a_json_file_may_hold_an_array_or_lines(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(5)]
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    with gzip.open(tmp_path / "array.json.gz", "wt") as file:
        json.dump(rows, file)
    for name in ("array.json", "lines.json", "array.json.gz"):
        assert rows_of(pieces_of_files([str(tmp_path / name)], RowForm())) == rows


def test_an_array_that_cannot_be_parsed_is_the_users_to_mend(tmp_path):
    (tmp_path / "c.json").write_text('[{"a": 1}')
    with pytest.raises(UserError, match=r"c\.json: not a JSON array"):
        rows_of(pieces_of_files([str(tmp_path / "c.json")], RowForm()))


def test_held_out_rows_are_in_no_training_split_and_bad_rows_counted_once(tmp_path):
    rows = [json.dumps({"prompt": f"p{i % 300}", "completion": f"c{i}"}) for i in range(600)] + ["{bad"]
    (tmp_path / "c.jsonl").write_text("\n".join(rows))
    source = open_source(DataConfig(source="jsonl", path=str(tmp_path / "c.jsonl"), held_out=0.3))
    splits = {split: list(source.split(split).conversations(0)) for split in ("train", "test")}
    train, test = (
        {conversation[0]["content"] for _, conversation in rows if not isinstance(conversation, RowError)}
        for rows in splits.values()
    )
    assert not train & test and len(train | test) == 300 and 60 < len(test) < 120
    assert len(splits["train"]) + len(splits["test"]) == 601
    assert sum(isinstance(conversation, RowError) for _, conversation in splits["train"]) == 1


def test_a_folder_gives_its_train_and_test_files_in_order_of_name(tmp_path):
    for name in ("train-b.jsonl", "train-a.jsonl", "test.jsonl", "LICENSE", "notes.jsonl"):
        (tmp_path / name).write_text(f'{{"name": "{name}"}}\n')
    source = open_source(DataConfig(source="jsonl", path=str(tmp_path)))
    assert [row["name"] for row in rows_of(source.train)] == ["train-a.jsonl", "train-b.jsonl"]
    assert source.test is not None
    assert [row["name"] for row in rows_of(source.test)] == ["test.jsonl"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "no such file or folder"),
        ("empty", "a folder needs train.jsonl .* found nothing"),
        ("c.csv", "must end in .jsonl"),
    ],
)
def test_a_path_without_a_corpus_says_what_is_needed(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "c.csv").write_text("a,b")
    with pytest.raises(UserError, match=message):
        open_source(DataConfig(source="jsonl", path=str(tmp_path / name)))


def test_a_parquet_file_that_is_none_is_named(tmp_path):
    (tmp_path / "c.parquet").write_text("not parquet")
    with pytest.raises(UserError, match=r"c\.parquet: cannot be read as Parquet"):
        open_source(DataConfig(source="parquet", path=str(tmp_path / "c.parquet")))


def test_the_toy_corpus_has_its_own_test_split_and_default_size():
    source = open_source(DataConfig(test_samples=10))
    assert sum(piece.stop - piece.start for piece in source.train if isinstance(piece, ToyPiece)) == 20_000
    assert len(source.train) == 2
    assert source.test is not None and len(rows_of(source.test)) == 10


class FakeHub:
    """`datasets` as far as it is used: a builder that knows files per split, and a stream in shards."""

    def __init__(self, files, rows):
        self.files, self.rows = files, rows

    def load_dataset_builder(self, dataset, subset, revision):
        assert revision == "c0ffee"
        if dataset != "org/known":
            raise FileNotFoundError(f"{dataset} is not on the Hub\nmore")
        builder = type("Builder", (), {})()
        builder.config = type("Config", (), {"data_files": self.files})()
        return builder

    def load_dataset(self, dataset, subset, split, revision, streaming):
        assert streaming and revision == "c0ffee"
        rows = self.rows[split]

        class Stream:
            num_shards = 3

            def shard(self, num_shards, index):
                return rows[index::num_shards]

        return Stream()


@pytest.fixture
def hub_config():
    return DataConfig(source="hf", dataset="org/known", revision="c0ffee", test_split="test")


def test_hub_datasets_in_parquet_are_read_in_place(tmp_path, monkeypatch, hub_config):
    for split in ("train", "test"):
        table = pa.Table.from_pylist([{"prompt": f"{split}{i}", "completion": "c"} for i in range(4)])
        pq.write_table(table, tmp_path / f"{split}.parquet", row_group_size=2)
    files = {split: [str(tmp_path / f"{split}.parquet")] for split in ("train", "test")}
    monkeypatch.setitem(__import__("sys").modules, "datasets", FakeHub(files, {}))
    source = open_source(hub_config)
    assert all(isinstance(piece, ParquetPiece) for piece in source.train)
    assert [row["prompt"] for row in rows_of(source.train)] == ["train0", "train1", "train2", "train3"]
    assert source.test is not None and next(row["prompt"] for row in rows_of(source.test)) == "test0"


def test_other_hub_datasets_are_streamed_shard_by_shard(monkeypatch, hub_config):
    rows = {split: [{"prompt": f"{split}{i}", "completion": "c"} for i in range(7)] for split in ("train", "test")}
    files = {split: [f"hf://datasets/org/known@c0ffee/{split}.csv"] for split in ("train", "test")}
    monkeypatch.setitem(__import__("sys").modules, "datasets", FakeHub(files, rows))
    source = open_source(hub_config)
    assert len(source.train) == 3
    assert sorted(row["prompt"] for row in rows_of(source.train)) == [f"train{i}" for i in range(7)]


def test_a_hub_dataset_that_is_not_there_is_named_with_its_commit(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", FakeHub({"train": []}, {}))
    with pytest.raises(UserError, match=r"org/absent .*revision c0ffee.*is not on the Hub; check"):
        open_source(DataConfig(source="hf", dataset="org/absent", revision="c0ffee"))
    with pytest.raises(UserError, match=r"data\.split = dev: org/known has no such split; it has train"):
        hub.hub_pieces(DataConfig(source="hf", dataset="org/known", revision="c0ffee"), "dev", RowForm())


def test_the_real_builder_resolves_files_per_split(tmp_path, monkeypatch):
    """`datasets` itself, on a local folder instead of the Hub: the same builder, the same attribute."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for split in ("train", "test"):
        pq.write_table(pa.table({"prompt": ["p"], "completion": ["c"]}), tmp_path / f"{split}-00000.parquet")
    files = hub._split_files(str(tmp_path), None, "test", "main")
    assert [Path(file).name for file in files] == ["test-00000.parquet"]
