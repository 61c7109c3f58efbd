"""`overfill generate` on a tiny student."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_bench import TINY, exit_code
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from overfill.checkpoint import FullModel, Manifest, save_student, weights_digest
from overfill.errors import UserError
from overfill.random_models import random_model, related_student
from overfill.shapes import ModelShape, widths_of
from overfill.two_stage import TwoStageForCausalLM
from pipeline.answer import prompt_ids

CHAT = "{% for m in messages %}user {{ m.content }} end {% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
WORDS = ["pad", "end", "user", "assistant", *(f"w{number}" for number in range(303))]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student folder with a tokenizer of whole words, whose padding token ends a turn as well."""
    folder = tmp_path_factory.mktemp("answer")
    full = random_model(TINY, torch.float32)
    full.save_pretrained(folder / "full")
    widths = widths_of(ModelShape.from_config(TINY), 48, 96, 0.5, 0.5)
    source = FullModel(id=str(folder / "full"), digest=weights_digest(folder / "full"))
    save_student(related_student(full, widths), folder / "student", Manifest.of(source, "llama", widths, None))
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="pad"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end", pad_token="end", chat_template=CHAT)
    tokenizer.save_pretrained(folder / "student")
    return folder / "student"


def written(student: Path, prompt: list[int], count: int) -> str:
    """What `generate` of the library writes after token ids."""
    model, ids = TwoStageForCausalLM.from_pretrained(student), torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, pad_token_id=1)
    return AutoTokenizer.from_pretrained(student).decode(out[0, len(prompt) :], skip_special_tokens=True)


def test_a_prompt_goes_through_the_chat_template_unless_told_otherwise(student, capfd):
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert prompt_ids(tokenizer, "w7 w8", chat=True) == [2, 11, 12, 1, 3]
    assert prompt_ids(tokenizer, "w7 w8", chat=False) == [11, 12]
    for option, ids in (("--chat", [2, 11, 12, 1, 3]), ("--no-chat", [11, 12])):
        assert exit_code(["generate", str(student), "w7 w8", option, "--max-new-tokens", "5"]) == 0
        assert capfd.readouterr().out.split() == written(student, ids, 5).split()


def test_the_same_seed_samples_the_same_and_exact_writes_what_the_full_model_would(student, capfd):
    def out(*options: str) -> str:
        assert exit_code(["generate", str(student), "w7 w8", "--max-new-tokens", "8", *options]) == 0
        return capfd.readouterr().out

    assert out("--temperature", "1.5", "--seed", "3") == out("--temperature", "1.5", "--seed", "3")
    assert out("--refresh", "exact") == out("--refresh", "1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["", "--chat"], "the prompt is empty"),
        (["w7", "--decoder", "fast"], "decoder: 'fast'"),
        (["w7", "--refresh", "sometimes"], "refresh"),
        (["w7", "--max-new-tokens", "999999"], "positions of the models"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(student, arguments, words, capfd):
    assert exit_code(["generate", str(student), *arguments]) == 2
    error = capfd.readouterr().err.strip()
    assert words in error and "Traceback" not in error


def test_a_tokenizer_without_a_chat_template_says_so(student):
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template; give --no-chat"):
        prompt_ids(tokenizer, "w7", chat=True)
