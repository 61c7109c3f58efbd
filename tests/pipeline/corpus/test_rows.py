"""Rows become conversations, or say why not."""

import pytest

from pipeline.corpus.rows import RowError, RowForm, belongs_to_test

PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("form", "row"),
    [
        (RowForm(), {"messages": PAIR}),
        (RowForm(), {"conversations": [{"from": "human", "value": " q\n"}, {"from": "gpt", "value": "a"}]}),
        (RowForm(), {"prompt": "q", "completion": " a "}),
        (RowForm(), {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, PAIR[1]]}),
        (RowForm(messages="chat"), {"chat": PAIR, "messages": "unused"}),
        (RowForm(prompt="question", completion="answer"), {"question": "q", "answer": "a", "id": 3}),
    ],
)
def test_all_forms_give_the_same_conversation(form, row):
    assert form.conversation(row) == PAIR


@pytest.mark.parametrize(
    ("form", "row", "reason", "detail"),
    [
        (RowForm(), {"prompt": "q", "completion": "  "}, "empty", "completion is empty"),
        (RowForm(), {"prompt": "", "completion": "a"}, "empty", "prompt is empty"),
        (RowForm(), {"messages": []}, "empty", "no assistant turn"),
        (RowForm(), {"messages": PAIR[:1]}, "empty", "no assistant turn"),
        (RowForm(), {"text": "x"}, "malformed", "fields: text"),
        (RowForm(), {"messages": "q"}, "malformed", "list of turns, got str"),
        (RowForm(), {"messages": ["q"]}, "malformed", "got str"),
        (RowForm(), {"messages": [{"role": "poet", "content": "q"}]}, "malformed", "poet"),
        (RowForm(), {"messages": [{"role": "user", "content": None}, PAIR[1]]}, "malformed", "NoneType"),
        (RowForm(), {"messages": PAIR[1:]}, "malformed", "no prompt"),
        (RowForm(), {"prompt": 3, "completion": "a"}, "malformed", "prompt must be text, got int"),
        (RowForm(), ["q", "a"], "malformed", "got list"),
        (RowForm(prompt="question", completion="answer"), {"prompt": "q"}, "malformed", "no field `question`"),
    ],
)
def test_a_bad_row_says_what_is_wrong_with_it(form, row, reason, detail):
    with pytest.raises(RowError) as error:
        form.conversation(row)
    assert error.value.reason == reason
    assert detail in error.value.detail


def test_the_held_out_share_is_met_and_depends_on_the_question_alone():
    def chat(i, answer="a"):
        return [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": answer}]

    held = [belongs_to_test(chat(i), 0.1, seed=0) for i in range(5000)]
    assert 0.085 < sum(held) / 5000 < 0.115  # standard deviation 0.0042
    assert held == [belongs_to_test(chat(i, "another answer"), 0.1, seed=0) for i in range(5000)]
    assert held != [belongs_to_test(chat(i), 0.1, seed=1) for i in range(5000)]
