"""Students and full models on disk.

A student folder is a plain `transformers` folder (config, safetensors, tokenizer, generation config) plus
`overfill.json`, the manifest: which full model it was cut from, which channels it kept, how it was trained. The
manifest is written last, so a folder without it is not a student. It carries a digest of the full model's weights,
because a student continues on the cache of the one model that it was trained with, and any other gives nonsense.

Weights are safetensors, never pickle, and only the student's: the full model is named, not copied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import overfill
from overfill.architectures import checked_shape, parameters
from overfill.config import Frozen, Training
from overfill.errors import UserError
from overfill.importance import KeptChannels
from overfill.shapes import PrunedWidths
from overfill.surgery import COMPANIONS, copy_companions, read_config, save_config
from overfill.weights import WeightsFolder, check_names, check_weights, write_weights

MANIFEST_FILE = "overfill.json"
FORMAT = 1
HUB_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", *COMPANIONS]


class FullModel(Frozen):
    """The model that a student was cut from and whose cache it continues on."""

    id: str
    """Hub id, or path of a local folder."""
    revision: str | None = None
    """Commit on the hub; null for a local folder."""
    digest: str
    """sha256 over its weights (`weights_digest`); independent of where it lies and how its files are sharded."""


class Manifest(Frozen):
    """`overfill.json`: what a student is."""

    format: Literal[1] = FORMAT
    """Version of this file's format."""
    full_model: FullModel
    """The model that it was cut from."""
    architecture: str
    """`model_type` of both models."""
    method: Training | None = None
    """How it was trained; null: cut, not trained yet."""
    widths: PrunedWidths
    """Requested and effective widths."""
    kept_hidden: tuple[int, ...] | None = None
    """Hidden channels of the full model that were kept, ascending; null for a random start."""
    kept_intermediate: tuple[tuple[int, ...], ...] | None = None
    """Intermediate channels that were kept, ascending, per layer; null for a random start."""
    versions: dict[str, str]
    """Versions of the libraries that wrote it."""

    @classmethod
    def of(
        cls,
        full_model: FullModel,
        architecture: str,
        widths: PrunedWidths,
        kept: KeptChannels | None,
        method: Training | None = None,
    ) -> Manifest:
        """The manifest of a student; `kept` is None for a random start."""
        return cls(
            full_model=full_model,
            architecture=architecture,
            method=method,
            widths=widths,
            kept_hidden=None if kept is None else tuple(kept.hidden.tolist()),
            kept_intermediate=None if kept is None else tuple(tuple(row) for row in kept.intermediate.tolist()),
            versions=_versions(),
        )

    def trained(self, method: Training) -> Manifest:
        """The manifest of the same student after training by `method`."""
        return self.model_copy(update={"method": method, "versions": _versions()})


def save_student(
    student: PreTrainedModel,
    folder: Path,
    manifest: Manifest,
    full_folder: Path | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a student folder; the manifest last.

    `full_folder`: the full model's folder, whose tokenizer and generation config are copied. `state_dict`: weights in
    place of the module's own (gathered from a sharded engine), by the names of `student.state_dict()`. Raises
    ValueError for a manifest of another shape, UserError for weights that are not the student's.
    """
    shape = checked_shape(student.config.to_dict(), "student")
    if (shape.hidden, shape.intermediate) != (manifest.widths.hidden, manifest.widths.intermediate):
        raise ValueError(f"the manifest is for widths {manifest.widths}, the student has {shape}")
    weights = student.state_dict() if state_dict is None else state_dict
    check_names(set(weights), parameters(shape), "student")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST_FILE).unlink(missing_ok=True)  # an overwritten folder is no student until it is whole again
    sizes = {name: weights[name].numel() * weights[name].element_size() for name in parameters(shape)}
    write_weights(folder, sizes, lambda name: weights[name].detach().cpu())
    save_config(student.config, folder, weights["model.norm.weight"].dtype, type(student).__name__)
    if full_folder is not None:
        copy_companions(full_folder, folder)
    elif student.generation_config is not None:
        student.generation_config.save_pretrained(folder)
    write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `overfill.json`, by one rename."""
    temporary = folder / f".{MANIFEST_FILE}.tmp"
    temporary.write_text(manifest.model_dump_json() + "\n")
    temporary.replace(folder / MANIFEST_FILE)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a student folder. Raises UserError when it is missing, torn, or of another format version."""
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: missing, so this is not a student folder; give the folder of a student") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); prune or train the student again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise UserError(f"{path}: format {found!r}, this version reads {FORMAT}; prune or train the student again")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {field}: {first['msg']}; prune or train the student again") from error


def load_student(
    folder: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attention: str | None = None,
) -> PreTrainedModel:
    """Load a student in evaluation mode, in its stored dtype or `dtype`.

    `attention`: implementation by its `transformers` name ("sdpa", "eager"). Raises UserError for a folder that is
    missing, torn, no student, or whose weights are not those that its manifest and config describe.
    """
    manifest = read_manifest(folder)
    shape = checked_shape(read_config(folder).to_dict(), str(folder / "config.json"))
    described = (manifest.architecture, manifest.widths.hidden, manifest.widths.intermediate)
    if described != (shape.architecture, shape.hidden, shape.intermediate):
        raise UserError(
            f"{folder}: config.json is {shape.architecture} {shape.hidden}/{shape.intermediate}, {MANIFEST_FILE} says "
            f"{described[0]} {described[1]}/{described[2]}; the folder mixes two students"
        )
    check_weights(WeightsFolder(folder), parameters(shape))
    return _load(folder, dtype, device, attention, trust_remote_code=False)


def load_full_model(
    model: Manifest | str | Path,
    revision: str | None = None,
    *,
    location: Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attention: str | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a full model, frozen and in evaluation mode: a hub id, a local folder, or the one that a student needs.

    With a manifest, `location` says where the model lies now, and its weights must be those that the student was cut
    from (`verify=False` skips reading them twice). A path is never looked up on the hub. Raises UserError for a model
    that is missing, unsupported, torn, or another one than the manifest names.
    """
    manifest = model if isinstance(model, Manifest) else None
    reference = manifest.full_model.id if isinstance(model, Manifest) else model
    revision = manifest.full_model.revision if manifest is not None else revision
    folder = full_model_folder(reference if location is None else location, revision)
    shape = checked_shape(read_config(folder).to_dict(), str(folder / "config.json"))
    check_weights(WeightsFolder(folder), parameters(shape))
    if manifest is not None and verify:
        verify_full_model(manifest, folder)
    return _load(folder, dtype, device, attention, trust_remote_code).requires_grad_(False)


def verify_full_model(manifest: Manifest, full_folder: Path) -> None:
    """Raise UserError unless the folder holds the weights that the manifest's student was cut from."""
    found = weights_digest(full_folder)
    if found != manifest.full_model.digest:
        raise UserError(
            f"{full_folder}: weights {found[:12]} are not those of {manifest.full_model.id} "
            f"({manifest.full_model.digest[:12]}), which the student was cut from; give that model"
        )


def weights_digest(folder: Path) -> str:
    """sha256 of a model folder's weights, the same however they are sharded. Reads every byte: 1 to 2 s per GB.

    Raises UserError for a folder that is missing, unsupported or torn."""
    shape = checked_shape(read_config(folder).to_dict(), str(folder / "config.json"))
    source = WeightsFolder(folder)
    check_weights(source, parameters(shape))
    return source.digest(parameters(shape))


def full_model_folder(reference: str | Path, revision: str | None = None) -> Path:
    """The local folder of a full model: the path itself, or the hub's snapshot (downloaded if it is not there).

    Raises UserError for a path that does not exist, and for a model that the hub does not give."""
    path = Path(reference).expanduser()
    if path.is_dir():
        return path.absolute()
    if isinstance(reference, Path) or reference.startswith((".", "/", "~")) or reference.count("/") != 1:
        raise UserError(f"{reference}: no such folder; give the folder of the full model or its hub id")
    try:
        return Path(snapshot_download(reference, revision=revision, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:  # every error of the hub's client is one of these
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{reference} at revision {revision}: neither a folder nor fetched ({reason})") from error


def _load(
    folder: Path, dtype: torch.dtype | None, device: torch.device | str, attention: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        dtype="auto" if dtype is None else dtype,
        attn_implementation=attention,
    )
    return model.to(device).eval()


def _versions() -> dict[str, str]:
    return {"overfill": overfill.__version__} | {
        name: version(name) for name in ("torch", "transformers", "safetensors")
    }
