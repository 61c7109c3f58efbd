"""Names of tasks are found without lm_eval, and a wrong one is told with its neighbours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from harness_toys import write_tasks

from overfill.errors import UserError
from pipeline.corpus.toy import TASKS, belongs_to_test
from pipeline.harness.names import SHIPPED, find, registry


def test_the_papers_tasks_are_lm_evals():
    names = ["gsm8k_cot_llama", "ifeval", "arc_challenge_chat", "mmlu_llama", "nq_open", "wmt16-de-en"]
    found = find(names, None)
    assert {known.folder.parent for known in found.values()} == {registry()}
    assert [name for name in names if not found[name].is_task] == ["mmlu_llama"]


def test_the_users_own_come_first_and_ours_before_lm_evals(tmp_path: Path):
    folder = write_tasks(tmp_path)
    (folder / "mine.yaml").write_text("task: 'ifeval' # mine\ntag:\n  - quick\n  - 'slow'\n")
    found = find(["ifeval", "quick", "slow", "both", "toy_get", "toy"], folder)
    assert {name: known.folder for name, known in found.items()} == {
        **dict.fromkeys(("ifeval", "quick", "slow", "both"), folder),
        **dict.fromkeys(("toy_get", "toy"), SHIPPED),
    }
    assert [name for name, known in found.items() if known.is_task] == ["ifeval", "toy_get"]


def test_a_wrong_name_is_one_line_with_near_ones(tmp_path: Path):
    with pytest.raises(UserError, match=r"'gsm8k_cot_lama': no such task in lm_eval; did you mean gsm8k_cot_llama, "):
        find(["gsm8k_cot_lama"], None)
    with pytest.raises(UserError, match=r"'chose': no such task in .*; did you mean choose"):
        find(["chose"], write_tasks(tmp_path))


def test_looking_for_names_imports_neither_torch_nor_lm_eval():
    program = (
        "import sys\nfrom pipeline.harness.names import find\nfind(['ifeval', 'toy'], None)\n"
        "assert not {'torch', 'lm_eval', 'datasets', 'yaml'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("task", TASKS)
def test_shipped_toy_documents_are_those_of_the_toy_corpus_held_out(task: str):
    import json

    from pipeline.corpus.toy import toy_row

    rows = [json.loads(line) for line in (SHIPPED / f"toy_{task}.jsonl").read_text().splitlines()]
    made = [toy_row([task], 0, "test", number) for number in range(1000)]
    expected = list({row["prompt"]: {name: row[name] for name in ("prompt", "completion")} for row in made}.values())
    assert rows == expected[:200]
    assert all(belongs_to_test(row["prompt"]) for row in rows)
