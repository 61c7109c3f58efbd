"""Where a model lies in what a stage is given: a stage's payload holds it in `model/`, an external folder is it."""

from __future__ import annotations

from pathlib import Path

from overfill.errors import UserError


def model_folder(path: Path) -> Path:
    """The `transformers` folder in a payload, or the folder itself.

    Raises UserError when there is no config.json in it."""
    for folder in (path / "model", path):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"{path}: no model here (no config.json); give a transformers model folder")


def tokenizer_folder(path: Path) -> Path:
    """The folder with a tokenizer: a tokenizer stage's payload, a teacher's payload, or a model folder."""
    for folder in (path / "tokenizer", path / "model", path):
        if (folder / "tokenizer_config.json").is_file():
            return folder
    raise UserError(f"{path}: no tokenizer here (no tokenizer_config.json); give a folder with one")
