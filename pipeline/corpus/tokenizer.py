"""Tokenizers of teachers that are trained here: one character per token for the toy corpus, byte-level BPE for text.

Both are plain `transformers` folders (tokenizer.json, tokenizer_config.json) that `AutoTokenizer` loads, made offline,
with the same special tokens and the plain chat template of `pipeline.corpus.chat`. There is no BOS: every prompt begins
with the user marker. The end of a turn is the EOS.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from overfill.errors import UserError
from pipeline.corpus.chat import ASSISTANT, END_OF_TURN, PAD, PLAIN_TEMPLATE, USER
from pipeline.corpus.rows import Message

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

UNKNOWN = "<unk>"
CHARACTERS = " +,-.:=" + string.digits + string.ascii_lowercase
SPECIAL_TOKENS = (PAD, END_OF_TURN, USER, ASSISTANT)
_BYTES = 256


def character_tokenizer() -> Tokenizer:
    """One token per character of the toy corpus; anything else is `<unk>`. 48 entries."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, UNKNOWN, *sorted(CHARACTERS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def train_byte_level_bpe(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE (Radford et al. 2019) with exactly `vocabulary` entries: special tokens, bytes, merges.

    Raises:
        UserError: the vocabulary cannot hold the bytes and the special tokens, or the texts yield too few merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = _BYTES + len(SPECIAL_TOKENS)
    if vocabulary < smallest:
        raise UserError(
            f"tokenizer.vocabulary: {vocabulary} is too few; bytes and special tokens alone take {smallest}"
        )
    tokenizer = Tokenizer(models.BPE())
    # One token per digit: sums are easier to learn than a vocabulary of numbers.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise UserError(
            f"tokenizer.vocabulary: {vocabulary} is too many; the corpus yields {tokenizer.get_vocab_size()} entries"
        )
    return tokenizer


def as_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer with its special tokens, padding side and chat template."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END_OF_TURN,
        additional_special_tokens=[USER, ASSISTANT],
        unk_token=UNKNOWN if tokenizer.token_to_id(UNKNOWN) is not None else None,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = PLAIN_TEMPLATE
    return fast


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that `AutoTokenizer.from_pretrained` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    as_transformers(tokenizer).save_pretrained(folder)


def texts_of(conversations: Iterable[Iterable[Message]], characters: int) -> Iterator[str]:
    """The texts of conversations until `characters` have been given."""
    given = 0
    for conversation in conversations:
        for message in conversation:
            yield message["content"]
            given += len(message["content"])
            if given >= characters:
                return
