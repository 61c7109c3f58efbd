"""The boundary between prompt and response is that of inference."""

import pytest

from overfill.errors import UserError
from pipeline.corpus.chat import ChatEncoder, Sample, end_of_turn_token, load_tokenizer
from pipeline.corpus.rows import RowError
from pipeline.corpus.tokenizer import as_transformers, character_tokenizer, save_tokenizer, train_byte_level_bpe

TWO_TURNS = [
    {"role": "system", "content": "be brief."},
    {"role": "user", "content": "one."},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two."},
    {"role": "assistant", "content": "2"},
]
LLAMA_LIKE = (
    "{% for m in messages %}<user>{{ m['role'] }}\n\n{{ m['content'] | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<user>assistant\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return as_transformers(character_tokenizer())


def test_every_assistant_turn_is_a_sample_with_all_before_it_as_prompt(tokenizer):
    (samples,) = ChatEncoder(tokenizer, max_length=200).encode([TWO_TURNS])
    assert [tokenizer.decode(sample.prompt) for sample in samples] == [
        "<user>be brief.<user>one.<assistant>",
        "<user>be brief.<user>one.<assistant>1<end><user>two.<assistant>",
    ]
    assert [tokenizer.decode(sample.response) for sample in samples] == ["1<end>", "2<end>"]
    assert [sample.reference for sample in samples] == ["1", "2"]


def test_the_prompt_is_the_one_that_inference_renders(tokenizer):
    (samples,) = ChatEncoder(tokenizer, max_length=200).encode([TWO_TURNS])
    for sample, before in zip(samples, (TWO_TURNS[:2], TWO_TURNS[:4]), strict=True):
        at_inference = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
        assert sample.prompt == at_inference


def test_tokens_do_not_merge_over_the_boundary_and_header_space_belongs_to_the_prompt():
    # "\n\n" is one token here, except before a letter, where the pre-tokenizer of GPT-2 cuts it in two.
    tokenizer = as_transformers(train_byte_level_bpe(["a\n\n", "yes"] * 50, 263))
    tokenizer.chat_template = LLAMA_LIKE
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "yes"}]
    whole = tokenizer.apply_chat_template(chat, return_dict=False)
    ((sample,),) = ChatEncoder(tokenizer, max_length=100).encode([chat])
    assert tokenizer.decode(sample.prompt).endswith("<user>assistant\n\n")
    assert tokenizer.decode(sample.response) == "yes<end>"
    assert tokenizer.decode(sample.prompt + sample.response) == tokenizer.decode(whole)
    assert sample.prompt + sample.response != whole  # else this test could not fail
    generated = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
    assert sample.prompt == generated


def test_the_end_of_turn_is_what_the_template_writes_not_the_eos(tokenizer):
    other = as_transformers(character_tokenizer())
    other.add_special_tokens({"eos_token": "<|endoftext|>"})
    assert other.decode([end_of_turn_token(other)]) == "<end>"
    other.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert end_of_turn_token(other) == other.eos_token_id
    assert tokenizer.decode([end_of_turn_token(tokenizer)]) == "<end>"


def test_length_counts_prompt_response_and_end(tokenizer):
    chat = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]  # 1 + 3 + 1, 2 + 1
    ((fits,),) = ChatEncoder(tokenizer, max_length=8).encode([chat])
    ((too_long,),) = ChatEncoder(tokenizer, max_length=7).encode([chat])
    assert isinstance(fits, Sample) and len(fits.prompt) + len(fits.response) == 8
    assert isinstance(too_long, RowError) and too_long.reason == "too_long" and "8 tokens" in too_long.detail


def test_a_conversation_that_the_template_refuses_does_not_end_the_run(tokenizer):
    strict = as_transformers(character_tokenizer())
    strict.chat_template = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}<end>{% endfor %}"
    )
    good = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    bad = [good[0], *good]
    refused, accepted = ChatEncoder(strict, max_length=50).encode([bad, good])
    assert isinstance(refused[0], RowError) and refused[0].reason == "template"
    assert "roles must alternate" in refused[0].detail
    assert isinstance(accepted[0], Sample)


def test_an_empty_turn_is_skipped_and_the_others_are_kept(tokenizer):
    chat = [TWO_TURNS[1], {"role": "assistant", "content": ""}, TWO_TURNS[3], TWO_TURNS[4]]
    (results,) = ChatEncoder(tokenizer, max_length=200).encode([chat])
    assert isinstance(results[0], RowError) and results[0].reason == "empty"
    assert isinstance(results[1], Sample) and results[1].reference == "2"
    (no_question,) = ChatEncoder(tokenizer, max_length=200).encode([[{"role": "user", "content": ""}, TWO_TURNS[2]]])
    assert isinstance(no_question[0], RowError) and no_question[0].reason == "empty"


def test_a_foreign_tokenizer_without_template_is_refused_with_the_way_out(tokenizer, tmp_path):
    save_tokenizer(character_tokenizer(), tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"data\.chat_template"):
        ChatEncoder(load_tokenizer(tmp_path / "t"), 64)
    ChatEncoder(load_tokenizer(tmp_path / "t", LLAMA_LIKE), 64)


def test_a_template_that_always_fails_is_the_users_to_mend():
    broken = as_transformers(character_tokenizer())
    broken.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match=r"fails on a plain exchange.*data\.chat_template"):
        ChatEncoder(broken, 64)


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path)
