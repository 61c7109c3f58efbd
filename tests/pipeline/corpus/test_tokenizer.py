"""Trained tokenizers lose nothing, have the special tokens where they should be, and load like any other."""

import subprocess
import sys

import pytest

from overfill.errors import UserError
from pipeline.corpus.chat import PLAIN_TEMPLATE, load_tokenizer
from pipeline.corpus.tokenizer import (
    SPECIAL_TOKENS,
    as_transformers,
    character_tokenizer,
    save_tokenizer,
    texts_of,
    train_byte_level_bpe,
)

NAMES, THINGS = ("Alice", "Bob", "Chloé", "Dmitri"), ("apples", "violins", "umbrellas", "bicycles", "parrots")
TEXTS = [
    f"{NAMES[i % 4]} has {i} {THINGS[i % 5]} and gives {i % 7} of them to {NAMES[i % 3]}; naïve “quotes” – how many remain?"
    for i in range(300)
]


def test_characters_are_one_token_each_and_come_back():
    tokenizer = as_transformers(character_tokenizer())
    text = "get b: a=kx  0 + 9, z-a."
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer("É")["input_ids"] == [tokenizer.unk_token_id]
    assert len(tokenizer) == 48


def test_byte_level_bpe_loses_nothing_even_on_text_it_never_saw():
    tokenizer = as_transformers(train_byte_level_bpe(TEXTS, 350))
    assert len(tokenizer) == 350
    for text in [*TEXTS[:5], "日本語 🙂", " two  spaces\n\n\ttab "]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(TEXTS[1])["input_ids"]) < len(TEXTS[1]) / 3


@pytest.mark.parametrize("make", [character_tokenizer, lambda: train_byte_level_bpe(TEXTS, 300)])
def test_a_saved_folder_loads_with_its_special_tokens_and_template(make, tmp_path):
    save_tokenizer(make(), tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tuple(tokenizer.convert_ids_to_tokens([0, 1, 2, 3])) == SPECIAL_TOKENS
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<pad>", "<end>", None)
    assert tokenizer.chat_template == PLAIN_TEMPLATE
    assert tokenizer("<end>")["input_ids"] == [1]
    assert tokenizer("a<user>")["input_ids"][-1] == 2


def test_training_twice_gives_the_same_bytes_in_another_process(tmp_path):
    program = (
        "import sys; from pathlib import Path; from pipeline.corpus.tokenizer import *;"
        "save_tokenizer(train_byte_level_bpe(sys.argv[2:], 350), Path(sys.argv[1]))"
    )
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", program, str(tmp_path / name), *TEXTS], check=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_vocabulary_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="too few; bytes and special tokens alone take 260"):
        train_byte_level_bpe(TEXTS, 200)
    with pytest.raises(UserError, match="too many"):
        train_byte_level_bpe(["ab"], 1000)


def test_training_text_ends_after_the_given_number_of_characters():
    conversations = ([{"role": "user", "content": "12345"}, {"role": "assistant", "content": "678"}] for _ in range(99))
    assert list(texts_of(conversations, 12)) == ["12345", "678", "12345"]
