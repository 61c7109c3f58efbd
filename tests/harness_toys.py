"""A tiny chat model, a student, and local tasks of every kind that lm_eval knows, for tests of the harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.corpus.chat import ASSISTANT, END_OF_TURN, PAD, PLAIN_TEMPLATE, USER
from pipeline.corpus.tokenizer import UNKNOWN, character_tokenizer
from pipeline.harness.loading import TaskSettings

DOCUMENTS = [
    {"question": "get 2: abc def ghi", "answer": "def", "choices": ["abc", "def", "ghi"], "right": 1},
    {"question": "get 1: kla pom nil", "answer": "kla", "choices": ["kla", "pom", "nil"], "right": 0},
    {"question": "sort: dbca", "answer": "abcd", "choices": ["abcd", "dcba"], "right": 0},
    {"question": "reverse: hcalm", "answer": "mlach", "choices": ["m", "hcalm", "mlach"], "right": 2},
    {"question": "add: 12 + 30", "answer": "42", "choices": ["42", "24"], "right": 0},
]
COMMON = """\
dataset_path: json
dataset_kwargs: {data_files: {test: documents.jsonl}}
test_split: test
fewshot_split: test
doc_to_text: "{{question}}"
metadata: {version: 2.5}
"""
TASKS = {
    "write": """\
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["a", "be"], max_gen_toks: 9}
filter_list:
  - name: first
    filter: [{function: regex, regex_pattern: "([a-z]+)"}, {function: take_first}]
  - name: whole
    filter: [{function: take_first}]
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "choose": """\
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: right
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "likely": """\
output_type: loglikelihood
doc_to_target: "{{answer}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "roll": """\
output_type: loglikelihood_rolling
doc_to_target: "{{question}} {{answer}} {{question}} {{answer}} {{question}} {{answer}} {{question}} {{answer}}"
metric_list:
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
""",
    "draw": """\
output_type: generate_until
doc_to_target: "{{answer}}"
repeats: 2
generation_kwargs: {until: [], max_gen_toks: 6, do_sample: true, temperature: 0.9}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}
POSITIONS = 64


def write_tasks(folder: Path) -> Path:
    """A folder of tasks, with a group over some of them, as a user would have it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    (folder / "_common").write_text(COMMON)
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"include: _common\ntask: {name}\n{text}")
    group = "group: both\ntask: [write, choose]\naggregate_metric_list:\n  - {metric: exact_match}\n"
    (folder / "both.yaml").write_text(group)
    return folder


def settings(folder: Path, *tasks: str, **options: Any) -> TaskSettings:
    """Of these tasks, all when none are named, with the chat template."""
    return TaskSettings(tasks=tasks or tuple(TASKS), folder=folder, chat_template=True, **options)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, with the project's plain chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=character_tokenizer(),
        pad_token=PAD,
        eos_token=END_OF_TURN,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=PLAIN_TEMPLATE,
    )


def model(seed: int = 0, hidden: int = 32) -> LlamaForCausalLM:
    """A random model that is sure of itself: logits differ enough for text to vary."""
    torch.manual_seed(seed)
    known = tokenizer()
    config = LlamaConfig(
        vocab_size=len(known),
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=POSITIONS,
        pad_token_id=known.pad_token_id,
        bos_token_id=None,
        eos_token_id=known.eos_token_id,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def assert_close(one: Any, other: Any) -> None:
    """Numbers to 1e-4 within nested lists, everything else exactly."""
    if isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-4)
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_close(a, b)
    else:
        assert one == other
