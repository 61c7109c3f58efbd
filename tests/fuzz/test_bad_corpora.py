# ruff: noqa: E501 - tables of bad values, one after another
"""Corpora as they are found: binary, empty, cut off, in other encodings, with rows of any shape.

What a data task does is called in this process, through the runner, so that an error takes the way that it takes to a
user; only Ray's tasks are left out, since starting Ray for every example would take a day."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import contents, ends_well, examples, overfill, time_limit
from hypothesis import given
from hypothesis import strategies as st

from overfill.errors import UserError
from pipeline.config import ExperimentConfig
from pipeline.corpus import pieces
from pipeline.corpus.tokenise import TokeniseJob
from pipeline.corpus.tokenizer import character_tokenizer, save_tokenizer
from pipeline.runner import StageFailed, run_graph
from pipeline.stages import data
from pipeline.store import Store
from pipeline.sweep import expand

PAIR = {"prompt": "sort: kdap", "completion": "adkp"}
CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}]}
SHARE = {
    "conversations": [
        {"from": "human", "value": "hello"},
        {"from": "gpt", "value": "hi"},
        {"from": "human", "value": "x"},
    ]
}
QUESTION = {"question": "2 + 2?", "answer": "#### 4"}

VALUES: list[Any] = [
    *(None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**30, "", " ", "x", "é" * 50, "x" * 5000, "\ud83d", "\ud800x", "\0"),
    *("<assistant>", "<end>", "<pad>", "{{ x }}", "\u2028", "a\nb", [], {}, [[]], [None], ["a", "b"], [{"text": "a"}], [{"text": 1}]),
    *([{"role": "user"}], [{"role": "assistant", "content": "a"}], [{"role": ["user"], "content": "a"}], {"role": "user"}, "assistant"),
]  # fmt: skip
LINES = [
    *(b"", b"{", b"[", b'"', b"null", b"1", b"[]", b"{}", b"nope", b"\x00\x01\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 5000, b'{"a":' * 3000),
    *(b'{"prompt": "a", "completion": "b"', b'{"prompt": "a" "completion": "b"}', b"{'prompt': 'a'}", b'{"prompt": NaN, "completion": 1e999}'),
    *(b'{"prompt": "\\ud800", "completion": "\\udc00"}', b'{"prompt": "\xe9", "completion": "b"}', b'{"\\ud800": 1}', b"9" * 6000),
    *(json.dumps(PAIR).encode("utf-16"), json.dumps(PAIR).encode("utf-32"), b"\x1f\x8b\x08\x00", b"PAR1", b"\r", b"\x1a", b"a,b\n1,2"),
]  # fmt: skip


@st.composite
def rows(draw: st.DrawFn) -> Any:
    """A sound row, or one with something in it changed."""
    row: Any = json.loads(json.dumps(draw(st.sampled_from([PAIR, CHAT, SHARE, QUESTION]))))
    kind = draw(st.sampled_from(["sound", "sound", "drop", "replace", "rename", "deep", "other"]))
    key = draw(st.sampled_from(sorted(row)))
    if kind == "drop":
        del row[key]
    elif kind == "replace":
        row[key] = draw(st.sampled_from(VALUES) | st.text(max_size=9))
    elif kind == "rename":
        row[draw(st.sampled_from(["", "Prompt", "messages", "prompt", "\ud800", "x" * 300]))] = row.pop(key)
    elif kind == "deep" and isinstance(row[key], list):
        turn = draw(st.sampled_from(row[key]))
        turn[draw(st.sampled_from(sorted(turn)))] = draw(st.sampled_from(VALUES))
    elif kind == "other":
        row = draw(st.sampled_from(VALUES))
    return row


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """The bytes of a file of JSON lines, damaged."""
    sound = [
        {"prompt": f"sort: {number}", "completion": "ad"} for number in range(draw(st.sampled_from([0, 3, 20, 20])))
    ]
    found = [json.dumps(row).encode() for row in [*sound, *draw(st.lists(rows(), max_size=8))]]
    for line in draw(st.lists(st.sampled_from(LINES) | st.binary(max_size=20), max_size=3)):
        found.insert(draw(st.integers(0, len(found))), line)
    text = draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n", b"\r", b""])).join(found)
    return draw(st.sampled_from([text, text, text + b"\n", text[: len(text) // 2], b"\xef\xbb\xbf" + text, text * 40]))


def arrays(draw: st.DrawFn) -> bytes:
    text = json.dumps(draw(st.lists(rows(), max_size=6))).encode()
    return draw(
        st.sampled_from(
            [text, text[:-1], text + text, b" " + text, b"[" * 4000, b"{}" + text, b"[1,", text.replace(b",", b"")]
        )
    )


def tables(draw: st.DrawFn) -> bytes:
    """A Parquet file, whole or with some bytes changed."""
    column = st.sampled_from(
        [
            *(
                ["a", "b"],
                [1, 2],
                [None, None],
                [b"\xff", b"x"],
                [["a"], ["b"]],
                [{"role": "user"}, {"role": "gpt"}],
                [1.5, None],
            ),
            *([CHAT["messages"], CHAT["messages"]], [True, False], ["", " "]),
        ]
    )
    names = draw(st.lists(st.sampled_from(["prompt", "completion", "messages", "x", ""]), max_size=3, unique=True))
    table = pa.table({name: draw(column) for name in names})
    if draw(st.booleans()) and table.num_columns:
        wrong = pa.array([b"\xff\xfe", b"ok"], pa.binary())
        table = table.set_column(0, table.column_names[0], pa.Array.from_buffers(pa.string(), 2, wrong.buffers()))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression=draw(st.sampled_from(["snappy", "none", "gzip"])))
    content = bytearray(sink.getvalue())
    for place in draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.sampled_from([len(content), len(content), len(content) // 2, 3, 0]))])


@st.composite
def corpora(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file's name and content."""
    name = draw(st.sampled_from(["c.jsonl", "c.jsonl", "c.ndjson", "c.json", "c.jsonl.gz", "c.json.gz", "c.parquet"]))
    if name == "c.parquet":
        return name, tables(draw)
    content = arrays(draw) if ".json." in f"{name}." and draw(st.booleans()) else draw(lines())
    if not name.endswith(".gz"):
        return name, content
    packed = gzip.compress(content, mtime=0)
    return name, draw(
        st.sampled_from(
            [packed, packed[:-5], packed[:-9] + b"x" * 9, content, packed[:20], b"\x1f\x8b", packed + packed]
        )
    )


TEMPLATES = [
    *(None, None, None, "", "{{ messages[0].content }}", "{{ messages[9].content }}", "{% for i in range(10**12) %}{% endfor %}", "{{ 1 / 0 }}"),
    *("{{", "{% raise %}", "{{ raise_exception('no') }}", "{{ messages.x.y.z }}", "{{ messages[0].content + 1 }}", "{% include 'x' %}"),
    *("{{ ''.__class__.__mro__ }}", "{% for m in messages %}{{ m.content }}<end>{% endfor %}", "{{ bos_token }}", "{{ messages | tojson }}"),
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
]  # fmt: skip
COLUMNS: list[Any] = [
    *(None, None, {"prompt": "question", "completion": "answer"}, {"messages": "messages"}, {"messages": "prompt"}),
    *({"prompt": "", "completion": "x"}, {"messages": "x"}),
]


def in_this_process(job: TokeniseJob, resources: Any) -> Iterator[pa.Table]:
    """`pipeline.stages.data._stream` without Ray: the same tasks, one after another."""
    for number in range(len(job.rows.pieces)):
        for table in data._tokenise({"piece": [number]}, job):
            yield data._checked(table)


PRETRAIN = {"hidden": 64, "intermediate": 128, "layers": 1, "tokenizer": {"vocabulary": 300}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model's config and a tokenizer, one token per character."""
    folder = tmp_path_factory.mktemp("model")
    save_tokenizer(character_tokenizer(), folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 48, **sizes}))
    return str(folder)


def experiment(path: Path, teacher: dict[str, Any], **settings: Any) -> ExperimentConfig:
    """An experiment over a corpus in a file."""
    kind = "parquet" if path.name.endswith(".parquet") else "jsonl"
    values = {key: value for key, value in settings.items() if value is not None}
    section = {"source": kind, "path": str(path), "held_out": 0.5, "max_length": 64, **values}
    return ExperimentConfig.model_validate(
        {"name": "x", "teacher": teacher, "data": section, "distill": {"method": "full"}}
    )


def ends_in_words(config: ExperimentConfig, store: Path) -> bool:
    """Run the tokenizer and the data stage; whether they ran. What they raise is a UserError with one line."""
    (cell,) = expand(config, "x.yaml")
    stages = [stage for stage in cell.stages if stage.name in ("tokenizer", "data")]
    try:
        with time_limit():
            run_graph(stages, Store(store))
    except StageFailed as failure:
        assert isinstance(failure.__cause__, UserError), repr(failure.__cause__)
        assert "\n" not in failure.cause and len(failure.cause.split()) >= 5 and len(failure.cause) < 4000
        return False
    return True


def test_damaged_corpora_become_shards_or_a_reason(model, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(data, "_stream", in_this_process)
    home = tmp_path_factory.mktemp("corpora")
    monkeypatch.setattr(pieces, "PIECE_BYTES", 200)
    ends = []

    @examples(quick=60, full=1200)
    @given(corpora(), st.sampled_from(TEMPLATES), st.sampled_from(COLUMNS), st.integers(0, 4))
    def fuzz(corpus: tuple[str, bytes], template: str | None, columns: Any, trained: int) -> None:
        folder = Path(tempfile.mkdtemp(dir=home))
        path = folder / corpus[0]
        path.write_bytes(corpus[1])
        before = contents(folder)
        file = folder.with_suffix(".yaml")
        teacher = {"model": model} if trained else {"pretrain": PRETRAIN}
        config = experiment(path, teacher, chat_template=template, columns=columns)
        file.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
        if ends_well(overfill("plan", str(file), "--store", str(home / "none")), str(path), str(file)):
            ends.append(ends_in_words(config, home / f"store-{folder.name}"))
        assert contents(folder) == before

    fuzz()
    assert any(ends) and not all(ends)  # neither every example nor none got through


def test_a_task_reads_a_line_without_end_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "LONGEST_LINE", 1000)
    sound = json.dumps(PAIR).encode()
    (tmp_path / "c.jsonl").write_bytes(sound + b"\n" + b"x" * 5_000_000 + b"\n" + sound + b"\n" + b"y" * 1001)
    found = list(pieces.LinesPiece(str(tmp_path / "c.jsonl")).rows())
    assert [found[0], found[2]] == [PAIR, PAIR] and len(found) == 4
    assert [row.detail for row in (found[1], found[3])] == ["a line of more than 0 MiB"] * 2
    # A piece that begins inside the long line has what begins after it.
    assert list(pieces.LinesPiece(str(tmp_path / "c.jsonl"), 2_000_000, 5_000_090).rows()) == [PAIR]


def test_a_corpus_that_vanishes_while_it_is_read_is_named(tmp_path):
    for piece in (pieces.LinesPiece, pieces.ArrayPiece):
        with pytest.raises(UserError, match=r"gone\.jsonl: cannot be read"):
            list(piece(str(tmp_path / "gone.jsonl")).rows())


def test_ten_megabytes_in_one_row_are_one_skipped_row(model, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_stream", in_this_process)
    path = tmp_path / "c.jsonl"
    huge = json.dumps({"prompt": "x" * 10_000_000, "completion": "y"})
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": "a"}) + "\n" for i in range(30)) + huge)
    config = experiment(path, {"model": model})
    (cell,) = expand(config, "x.yaml")
    stage = cell.stage("data")
    assert stage is not None
    with time_limit(60):
        (record,) = run_graph([stage], Store(tmp_path / "store")).values()
    assert record.metrics["data/train_skipped"] + record.metrics["data/test_skipped"] == 1
