"""Conversations -> samples (prompt ids, response ids), with the boundary of inference.

At inference the full model reads the prompt up to and including the generation prompt, and the answer begins with the
next token. So prompt and response are tokenised apart and never merge over the boundary, and the template's white space
after the assistant header belongs to the prompt. A response ends with the end-of-turn token, which is what the
template writes after an assistant's text: it is not always the tokenizer's EOS (Phi-3: `<|end|>`, Gemma:
`<end_of_turn>`).

Every assistant turn of a conversation is a sample; its prompt is everything before it.

A tokenizer that we trained ourselves gets `PLAIN_TEMPLATE`. A foreign tokenizer without a chat template is refused:
what separates the turns in its training is known to its authors only, and must be said in `data.chat_template`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overfill.errors import UserError
from pipeline.corpus.rows import Message, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USER, ASSISTANT, END_OF_TURN, PAD = "<user>", "<assistant>", "<end>", "<pad>"
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '" + ASSISTANT + "' + message['content'] + '" + END_OF_TURN + "' }}"
    "{% else %}{{ '" + USER + "' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)
"""`<user>question<assistant>answer<end><user>...`; a system text is one more user turn."""

_PROBE = "overfillprobe"
_CACHED_TOKENIZERS = 4
_CHARACTERS = 1024
"""Characters of a token: more than any vocabulary has in one."""


@dataclass(frozen=True)
class Sample:
    """One assistant turn."""

    prompt: list[int]
    response: list[int]
    reference: str


@lru_cache(maxsize=_CACHED_TOKENIZERS)
def load_tokenizer(folder: Path, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, from a cache per process.

    Raises:
        UserError: there is no tokenizer in the folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a tokenizer is a folder with tokenizer.json or a model's folder")
    try:
        tokenizer = _load(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no tokenizer can be loaded from here: {_first_line(error)}") from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def _load(folder: Path) -> PreTrainedTokenizerBase:
    # AutoTokenizer imports torch, which a tokenising task does not need and which takes seconds to load.
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and (folder / "tokenizer.json").is_file():
        kind = json.loads(settings.read_text()).get("tokenizer_class")
        if kind in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(folder)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


class ChatEncoder:
    """Turns conversations into samples with one tokenizer.

    Args:
        tokenizer: one with a chat template.
        max_length: longest sample, prompt and response together, in tokens.

    Raises:
        UserError: the tokenizer has no chat template, or nothing that ends a turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path}: it has no chat template; say in `data.chat_template` (Jinja) how "
                "its authors separate the turns"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.end_of_turn = end_of_turn_token(tokenizer)

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[list[Sample | RowError]]:
        """For each conversation, one sample or one reason for each of its assistant turns, in their order."""
        turns = [
            (number, self._prompt(conversation[:turn], message), message["content"])
            for number, conversation in enumerate(conversations)
            for turn, message in enumerate(conversation)
            if message["role"] == "assistant"
        ]
        texts = [(prompt, answer) for _, prompt, answer in turns if not isinstance(prompt, RowError)]
        ids = zip(self._ids([prompt for prompt, _ in texts]), self._ids([answer for _, answer in texts]), strict=True)
        results: list[list[Sample | RowError]] = [[] for _ in conversations]
        for number, prompt, reference in turns:
            results[number].append(
                prompt if isinstance(prompt, RowError) else self._sample(*next(ids), reference=reference)
            )
        return results

    def _prompt(self, before: Sequence[Message], answer: Message) -> str | RowError:
        if not answer["content"]:
            return RowError("empty", "an assistant turn without text")
        if not any(message["content"] for message in before if message["role"] != "system"):
            return RowError("empty", "nothing but empty turns before the answer")
        prompt = render(self.tokenizer, before)
        if isinstance(prompt, str) and (length := len(prompt) + len(answer["content"])) > self.max_length * _CHARACTERS:
            # Tokenising ten megabytes only to leave them out would take half a minute.
            return RowError("too_long", f"{length:,} characters; data.max_length is {self.max_length} tokens")
        return prompt

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # The template writes special tokens itself, so none are added.
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def _sample(self, prompt: list[int], response: list[int], reference: str) -> Sample | RowError:
        if not prompt or not response:
            return RowError("empty", "no tokens are left of the prompt or of the answer")
        length = len(prompt) + len(response) + 1
        if length > self.max_length:
            return RowError("too_long", f"{length} tokens; data.max_length is {self.max_length}")
        return Sample(prompt, [*response, self.end_of_turn], reference)


def render(tokenizer: PreTrainedTokenizerBase, before: Sequence[Message]) -> str | RowError:
    """The prompt as text, up to and including the generation prompt, or why the template refuses it."""
    try:
        return str(tokenizer.apply_chat_template(list(before), add_generation_prompt=True, tokenize=False))
    except Exception as error:  # a template is its author's program: it may raise anything
        return RowError("template", _first_line(error))


def end_of_turn_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends an assistant's turn: the first special token after its text, else the EOS.

    Raises:
        UserError: the template fails on a plain exchange, or nothing ends a turn.
    """
    exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = str(tokenizer.apply_chat_template(exchange, tokenize=False))
    except Exception as error:  # as in `render`
        raise UserError(
            f"tokenizer {tokenizer.name_or_path}: its chat template fails on a plain exchange ({_first_line(error)}); "
            "give a working one in `data.chat_template`"
        ) from error
    after = text.rpartition(_PROBE)[2]
    special: set[Any] = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special.update(tokenizer.all_special_ids)
    for token in tokenizer(after, add_special_tokens=False)["input_ids"] if after else []:
        if token in special:
            return token
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise UserError(
            f"tokenizer {tokenizer.name_or_path}: nothing ends a turn: no special token follows the answer in its chat "
            "template and it has no EOS; end the turn with a special token in `data.chat_template`"
        )
    return end


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
