"""The held-out texts in a released model's tokens: sample for sample those that the other systems are judged on.

Token shards keep no conversations, so the corpus is read again, and what the data stage made of it is made again beside
the released model's tokens: sample i is then the same question and the same answer here and there, whatever either
tokenizer had to leave out. The released model's own chat template lays out the prompt and ends the turn;
`data.chat_template` serves where it has none. A sample that the model cannot read ends the stage, because models that
are compared on different samples are not compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from overfill.errors import UserError
from overfill.shapes import ModelShape
from pipeline.config import DataConfig
from pipeline.corpus.chat import ChatEncoder, Sample, load_tokenizer
from pipeline.corpus.rows import Message, RowError
from pipeline.corpus.shards import ShardWriter, TokenShards
from pipeline.corpus.sources import open_source
from pipeline.corpus.tokenise import batched
from pipeline.stage import StageRun, Stopped, in_this_process
from pipeline.stages.data import data_config
from pipeline.stages.folders import model_folder, tokenizer_folder

CONVERSATIONS_AT_ONCE = 64


@in_this_process
def run(run: StageRun) -> dict[str, float | int | str]:
    """Write `test/`, token shards with the first samples of `run.inputs["data"]` in the tokens of the released model.

    `run.config` is {"data": `DataConfig`, "samples": their number at most}. Raises UserError when the corpus is no
    longer what the data stage read, and when the released model cannot read a sample."""
    config = data_config(run.config["data"], run.inputs.get("files"))
    source = open_source(config)
    known = TokenShards.open(run.inputs["data"] / "test")
    wanted = min(run.config["samples"], len(known))
    pairs = _pairs(run, config, source.split("test").sound_conversations())
    with ShardWriter(run.staging / "test") as writer:
        for number, (theirs, own) in enumerate(islice(pairs, wanted)):
            row = known.read([number])[0]
            if [row.prompt.tolist(), row.response.tolist()] != [theirs.prompt, theirs.response]:
                raise UserError(_changed(source.name))
            writer.write(_table(own if isinstance(own, Sample) else _refuse(run, number, own)))
    if writer.samples < wanted:
        raise UserError(_changed(source.name))
    return {"held_out/samples": writer.samples, "held_out/tokens": writer.prompt_tokens + writer.response_tokens}


def _pairs(
    run: StageRun, config: DataConfig, conversations: Iterator[list[Message]]
) -> Iterator[tuple[Sample, Sample | RowError]]:
    """What the data stage made of each turn that it could use, and what the released model makes of it."""
    tokenizer = load_tokenizer(tokenizer_folder(run.inputs["tokenizer"]), config.chat_template)
    theirs, own = ChatEncoder(tokenizer, config.max_length), _own_encoder(run, config)
    for batch in batched(conversations, CONVERSATIONS_AT_ONCE):
        if run.stop_requested():
            raise Stopped("held_out was stopped")
        for made, remade in zip(theirs.encode(batch), own.encode(batch), strict=True):
            for first, second in zip(made, remade, strict=True):
                if isinstance(first, Sample):
                    yield first, second


def _own_encoder(run: StageRun, config: DataConfig) -> ChatEncoder:
    folder = tokenizer_folder(run.inputs["released"])
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template and config.chat_template is not None:
        tokenizer = load_tokenizer(folder, config.chat_template)
    return ChatEncoder(tokenizer, _positions(run))


def _positions(run: StageRun) -> int:
    path = model_folder(run.inputs["released"]) / "config.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return ModelShape.from_config(content, str(path)).max_positions


def _refuse(run: StageRun, number: int, error: RowError) -> Sample:
    why = f"its chat template refuses it ({error.detail}); give another model"
    if error.reason == "too_long":
        why = f"it is longer than the model's {_positions(run)} positions; lower `data.max_length`"
    raise UserError(f"released: {run.stage.label} cannot be compared on held-out sample {number}: {why}")


def _changed(name: str) -> str:
    return f"{name}: the held-out rows are not those that the data stage read; pin `data.revision` to a commit"


def _table(sample: Sample) -> pa.Table:
    columns = {"prompt": [sample.prompt], "response": [sample.response], "reference": [sample.reference]}
    return pa.table(columns)
