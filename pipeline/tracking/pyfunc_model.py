"""A trained student as MLflow's pyfunc loads it: `mlflow.pyfunc.load_model("models:/<id>").predict(["sort: dbca"])`.

The logged model holds no weights, for they are large and lie in the store: it holds `student.json`, where they lie and
their digests. Loading compares them, so that another model than the one that was measured is never queried.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overfill.errors import UserError
from pipeline.answer import prompt_ids
from pipeline.fingerprint import digest_file
from pipeline.objects.places import local_place

REFERENCE_FILE = "student.json"
MAX_NEW_TOKENS = 128
"""Longest answer, unless `params` say otherwise."""


class StudentModel:
    """Answers prompts with the system of a cell: the two-stage model, or the student alone."""

    def __init__(self, two_stage: Any, tokenizer: Any, options: Mapping[str, Any]) -> None:
        self._two_stage = two_stage
        self._tokenizer = tokenizer
        self._options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, **options}

    def predict(self, prompts: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """Greedy answers to prompts: texts, or a table whose first column has them.

        Args:
            params: options of `generate`; `max_new_tokens` is an upper bound, as far as the models have positions.
        """
        import torch

        texts = list(prompts.iloc[:, 0]) if hasattr(prompts, "columns") else list(prompts)
        if not texts:
            return []
        rows = [prompt_ids(self._tokenizer, text, chat=bool(self._tokenizer.chat_template)) for text in texts]
        width, end = max(map(len, rows)), self._tokenizer.eos_token_id
        filler = end if self._tokenizer.pad_token_id is None else self._tokenizer.pad_token_id
        options = {**self._options, **(params or {})}
        options["max_new_tokens"] = min(options["max_new_tokens"], self._two_stage.engine.max_positions - width)
        found = self._two_stage.generate(
            torch.tensor([[filler] * (width - len(row)) + row for row in rows]),
            attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
            pad_token_id=filler,
            **options,
        )
        return self._tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)


def _load_pyfunc(path: str) -> StudentModel:
    """Called by MLflow with the place of `student.json`. Raises UserError when the student is not there as it was."""
    from transformers import AutoTokenizer

    from overfill.checkpoint import load_student
    from overfill.two_stage import TwoStageForCausalLM
    from pipeline.stages.folders import tokenizer_folder

    place = Path(path)
    reference = json.loads((place / REFERENCE_FILE if place.is_dir() else place).read_text(encoding="utf-8"))
    folder = local_place(reference["student"])
    for name, expected in reference["sha256"].items():
        if not (folder / name).is_file() or digest_file(folder / name) != expected:
            raise UserError(
                f"{folder / name}: is not the file that was logged; query the model where its store lies, as it was"
            )
    if reference["system"] == "student":
        student = load_student(folder)
        two_stage = TwoStageForCausalLM(student, student)
    else:
        two_stage = TwoStageForCausalLM.from_pretrained(folder, full=_full(reference["full"]))
    return StudentModel(two_stage, AutoTokenizer.from_pretrained(tokenizer_folder(folder)), reference["options"])


def _full(place: str | None) -> str | None:
    """Where the full model is on this node; None leaves it to the student's manifest."""
    return None if place is None else str(local_place(place))
