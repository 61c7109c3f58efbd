"""The tokenizer stage: the tokenizer of a teacher that is trained here.

Without a vocabulary it is the toy corpus' character tokenizer; with one, a byte-level BPE trained on the training split
(never on held-out rows), in file order, until `TRAINING_CHARACTERS` have been read: rankings of merges settle long
before that, and memory stays bounded.
"""

from __future__ import annotations

from itertools import islice

from overfill.errors import UserError
from pipeline.corpus.sources import open_source
from pipeline.corpus.tokenizer import character_tokenizer, save_tokenizer, texts_of, train_byte_level_bpe
from pipeline.stage import StageRun, in_this_process
from pipeline.stages.data import data_config

TRAINING_CHARACTERS = 50_000_000


@in_this_process
def run(run: StageRun) -> dict[str, float | int | str]:
    """Make the tokenizer that `run.config` ({"data": DataConfig, "vocabulary": int or None}) describes.

    Writes `tokenizer/`, a folder that `AutoTokenizer` loads.

    Raises:
        UserError: the corpus cannot be read, or does not yield the vocabulary.
    """
    vocabulary = run.config["vocabulary"]
    if vocabulary is None:
        tokenizer = character_tokenizer()
    else:
        config = data_config(run.config["data"], run.inputs.get("files"))
        source = open_source(config)
        conversations = islice(source.split("train").sound_conversations(), config.train_samples)
        texts = texts_of(conversations, TRAINING_CHARACTERS)
        first = next(texts, None)
        if first is None:
            raise UserError(f"{source.name}: no row can be used to train a tokenizer; see `data.columns`")
        tokenizer = train_byte_level_bpe((text for part in ([first], texts) for text in part), vocabulary)
    save_tokenizer(tokenizer, run.staging / "tokenizer")
    return {"tokenizer/vocabulary": tokenizer.get_vocab_size()}
