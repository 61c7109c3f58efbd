"""The tokenizer stage learns from the training split alone and writes a folder that loads."""

import json

import pytest

from overfill.errors import UserError
from pipeline.config import DataConfig
from pipeline.corpus.chat import load_tokenizer
from pipeline.fingerprint import identity_config
from pipeline.stage import External, Stage, StageRun
from pipeline.stages import tokenizer


def run_stage(tmp_path, vocabulary, data, files=None):
    inputs = {} if files is None else {"files": External("files", "digest")}
    folder = tmp_path / "staging"
    folder.mkdir()
    stage = Stage("tokenizer", 1, {"data": data, "vocabulary": vocabulary}, inputs, "pipeline.stages.tokenizer:run")
    places = {} if files is None else {"files": files}
    metrics = tokenizer.run(StageRun(stage, places, folder, tmp_path, tmp_path))
    return load_tokenizer(folder / "tokenizer"), metrics


def write(path, pairs):
    path.write_text("".join(json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in pairs))
    return path


def test_the_toy_corpus_has_characters(tmp_path):
    made, metrics = run_stage(tmp_path, None, {"source": "toy"})
    assert len(made) == metrics["tokenizer/vocabulary"] == 48
    assert made.decode(made("sort: zyx 0+1")["input_ids"]) == "sort: zyx 0+1"


def test_a_vocabulary_is_learned_from_the_training_file_alone(tmp_path):
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus" / "train.jsonl", [("wombats dig burrows", "indeed they do")] * 20)
    write(tmp_path / "corpus" / "test.jsonl", [("xylophones", "xylophones")] * 500)
    data = identity_config(DataConfig(source="jsonl", path="elsewhere"))
    made, _ = run_stage(tmp_path, 281, data, tmp_path / "corpus")
    assert len(made) == 281
    assert len(made("wombats")["input_ids"]) < 4
    assert len(made("xylophones")["input_ids"]) >= 8


def test_a_corpus_without_a_usable_row_is_refused(tmp_path):
    path = write(tmp_path / "c.jsonl", [("", "")] * 5)
    data = identity_config(DataConfig(source="jsonl", path="elsewhere"))
    with pytest.raises(UserError, match=r"no row can be used.*data\.columns"):
        run_stage(tmp_path, 300, data, path)
