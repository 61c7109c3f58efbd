"""A released model reads the samples that all others are judged on, in its own tokens, or is refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from overfill.errors import UserError
from pipeline.config import BenchmarkConfig, DataConfig, EvaluateConfig, StageResources
from pipeline.corpus.chat import PLAIN_TEMPLATE, ChatEncoder, Sample, load_tokenizer
from pipeline.corpus.shards import TokenShards, write_samples
from pipeline.corpus.sources import open_source
from pipeline.corpus.tokenizer import character_tokenizer, save_tokenizer, train_byte_level_bpe
from pipeline.fingerprint import identity_config
from pipeline.stage import External, Stage, StageRun
from pipeline.stages import held_out
from pipeline.stages.benchmark import measure
from pipeline.stages.evaluate import evaluate

LONGEST = 30
"""In the full model's tokens, which are characters: some of the questions are longer."""
ROWS = [
    *[{"messages": [{"role": "user", "content": f"say {word}."}, {"role": "assistant", "content": word}]}
      for word in ("one", "two", "a longer answer than anything", "three", "one")],
    {"messages": [
        {"role": "user", "content": "say a."}, {"role": "assistant", "content": ""},
        {"role": "user", "content": "say b."}, {"role": "assistant", "content": "b"},
    ]},
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A corpus, the full model's tokenizer and its held-out shards, and a released model with other tokens."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "files").mkdir()
    for split in ("train", "test"):
        (root / "files" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    save_tokenizer(character_tokenizer(), root / "tokenizer" / "tokenizer")
    words = train_byte_level_bpe(["say one. two three answer longer than anything"] * 40, 280)
    save_tokenizer(words, root / "released" / "model")
    save_model(root / "released" / "model")
    encoder = ChatEncoder(load_tokenizer(root / "tokenizer" / "tokenizer"), LONGEST)
    encoded = encoder.encode(list(open_source(config(root)).split("test").sound_conversations()))
    samples = [sample for row in encoded for sample in row if isinstance(sample, Sample)]
    assert [sample.reference for sample in samples] == ["one", "two", "three", "one", "b"]
    write_samples(root / "data" / "test", [(one.prompt, one.response, one.reference) for one in samples])
    return {name: root / name for name in ("files", "tokenizer", "released", "data")}


def config(root: Path) -> DataConfig:
    return DataConfig(source="jsonl", path=str(root / "files"), max_length=LONGEST)


def save_model(folder: Path, positions: int = 64) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = LlamaConfig(vocab_size=len(tokenizer), **shape, max_position_embeddings=positions)
    LlamaForCausalLM(settings).save_pretrained(folder)


def stage_run(name: str, values: dict[str, Any], inputs: dict[str, Path], root: Path) -> StageRun:
    stage = Stage(name, 1, values, {key: External("x", key) for key in inputs}, f"pipeline.stages.{name}:run", "small")
    (root / name).mkdir(parents=True)
    return StageRun(stage, inputs, root / name, root, root, StageResources())


def remake(inputs: dict[str, Path], root: Path, samples: int = 512, **changes: Any) -> TokenShards:
    values = identity_config(config(inputs["files"].parent)) | changes
    run = stage_run("held_out", {"data": values, "samples": samples}, inputs, root)
    held_out.run(run)
    return TokenShards.open(run.staging / "test")


def test_sample_by_sample_the_same_texts_whatever_the_other_tokenizer_left_out(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    made = list(remake(inputs, tmp_path))
    theirs = TokenShards.open(inputs["data"] / "test")
    tokenizer = load_tokenizer(inputs["released"] / "model")
    assert [(row.sample, row.reference) for row in made] == [(row.sample, row.reference) for row in theirs]
    assert [tokenizer.decode(row.response) for row in made] == [
        "one<end>",
        "two<end>",
        "three<end>",
        "one<end>",
        "b<end>",
    ]
    assert tokenizer.decode(made[4].prompt) == "<user>say a.<assistant><end><user>say b.<assistant>"
    assert all(len(own.prompt) < len(other.prompt) for own, other in zip(made, theirs, strict=True))
    assert len(remake(inputs, tmp_path / "some", samples=2)) == 2


def with_template(inputs: dict[str, Path], folder: Path, template: str | None) -> dict[str, Path]:
    """The inputs with a released model of this template in place of its own."""
    tokenizer = copy.deepcopy(load_tokenizer(inputs["released"] / "model"))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    save_model(folder)
    return inputs | {"released": folder}


def test_the_models_own_template_lays_out_the_prompt_and_the_files_serves_where_it_has_none(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    own = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<end>{% endfor %}"
    templated, bare = (with_template(inputs, tmp_path / name, t) for name, t in (("own", own), ("bare", None)))
    with pytest.raises(UserError, match="no chat template"):
        remake(bare, tmp_path / "refused")
    decode = load_tokenizer(inputs["released"] / "model").decode
    plain = {"chat_template": PLAIN_TEMPLATE}
    prompts = [
        decode(next(iter(remake(one, tmp_path / str(n), **plain))).prompt) for n, one in enumerate((templated, bare))
    ]
    assert prompts == ["user:say one.<end>", "<user>say one.<assistant>"]


def test_a_sample_that_the_model_cannot_read_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    short = tmp_path / "short"
    load_tokenizer(inputs["released"] / "model").save_pretrained(short)
    save_model(short, positions=12)
    with pytest.raises(UserError, match=r"released: small cannot be compared on held-out sample \d: .*12 positions"):
        remake(inputs | {"released": short}, tmp_path)


def test_a_corpus_that_has_changed_is_noticed(inputs: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "files"
    other.mkdir()
    for split in ("train", "test"):
        (other / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(ROWS)))
    with pytest.raises(UserError, match=r"are not those that the data stage read; pin `data.revision`"):
        remake(inputs | {"files": other}, tmp_path / "changed")


def judged(run: StageRun) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    metrics = evaluate(run)
    return dict(metrics), parquet.read_table(run.staging / "samples.parquet").to_pylist()


def test_its_likelihood_is_told_per_token_of_the_full_model_and_its_answers_as_text(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    made = remake(inputs, tmp_path / "remade")
    settings = identity_config(EvaluateConfig(max_new_tokens=4)) | {"system": "student"}
    given = {"released": inputs["released"], "data": inputs["data"], "held_out": made.folder.parent}
    metrics, samples = judged(stage_run("evaluate", settings, given, tmp_path / "released"))
    theirs = sum(len(row.response) for row in TokenShards.open(inputs["data"] / "test"))
    own = sum(len(row.response) for row in made)
    nats = sum(sample["response_nll"] for sample in samples)
    assert own < theirs
    assert metrics["eval/response_nll"] == pytest.approx(nats / theirs)
    assert metrics["eval/perplexity"] == pytest.approx(math.exp(nats / theirs))
    assert metrics["eval/samples"] == 5
    assert "eval/agreement" not in metrics
    assert {sample["agreeing_tokens"] for sample in samples} == {None}
    assert samples[0]["prompt"] == "<user>say one.<assistant>"

    # With the same tokens, it is judged as a full model is.
    same = {"teacher": inputs["released"], "data": made.folder.parent}
    full, rows = judged(stage_run("evaluate", settings | {"system": "full"}, same, tmp_path / "full"))
    assert [row["prediction"] for row in rows] == [sample["prediction"] for sample in samples]
    assert full["eval/response_nll"] * own == pytest.approx(metrics["eval/response_nll"] * theirs)
    assert full["eval/agreement"] == 1.0


def test_its_latency_is_measured_alone_beside_the_full_models(inputs: dict[str, Path], tmp_path: Path) -> None:
    settings = identity_config(BenchmarkConfig(prompt=(6,), output=(3,), repeats=1, warmup=0))
    settings |= {"refresh": "none", "weights": "stored", "device": "cpu", "threads": 1, "versions": {}}
    given = {"teacher": inputs["released"], "released": inputs["released"]}
    run = stage_run("benchmark", settings, given, tmp_path)
    assert {name.split("/")[1] for name in measure(run)} == {"full", "student"}
    rows = json.loads((run.staging / "latency.json").read_text())["rows"]
    assert [row["system"] for row in rows] == ["full", "student"]
