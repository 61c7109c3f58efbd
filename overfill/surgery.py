"""Width pruning: cut a full model into a student that shares the geometry of its KV cache.

OverFill (arXiv 2508.08446, section 3) slices every weight matrix to the highest-scoring channels and keeps layers,
heads and head dim. Which dimension of which parameter is cut stands in the table of `overfill.architectures`; this
module only walks over it, so that cutting a loaded model (`prune`) and cutting a folder tensor by tensor
(`prune_folder`) cannot differ. What is kept is copied unchanged, so pruning nothing gives a bit-identical model.

The student's config is the full model's with other widths and an explicit `head_dim`, which `transformers` would
otherwise derive from the narrower hidden size.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from overfill.architectures import Axis, Parameter, checked_shape, parameters
from overfill.errors import UserError
from overfill.importance import ImportanceScores, KeptChannels
from overfill.shapes import ModelShape, PrunedWidths
from overfill.weights import SHARD_BYTES, WeightsFolder, check_names, check_weights, write_weights

COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "generation_config.json",
)
"""Files beside the weights that the student shares with its full model."""


def prune(
    full: PreTrainedModel, scores: ImportanceScores, widths: PrunedWidths
) -> tuple[PreTrainedModel, KeptChannels]:
    """Cut a loaded model; the full model stays as it is, memory grows by the student and one tensor.

    The student has the full model's dtype and device and is in evaluation mode. Raises UserError for a model or widths
    that cannot be cut, or scores of another model.
    """
    shape = checked_shape(full.config.to_dict(), full.name_or_path or "model")
    kept = _choose(shape, scores, widths)
    student = empty_model(student_config(full.config, widths), full.dtype).to(full.device)
    source = dict(full.named_parameters())
    wanted = parameters(shape)
    check_names(set(source), wanted, full.name_or_path or "model")
    with torch.no_grad():
        for name, target in student.named_parameters():
            target.copy_(cut(source[name], wanted[name], kept))
    student.generation_config = copy.deepcopy(full.generation_config)
    return student.eval(), kept


def prune_folder(
    full_folder: Path, scores: ImportanceScores, widths: PrunedWidths, out: Path, shard_bytes: int = SHARD_BYTES
) -> KeptChannels:
    """Cut a model folder into `out`, tensor by tensor; memory holds one shard of the student and one full tensor.

    Writes weights, config, tokenizer and generation config; `overfill.checkpoint.write_manifest` completes the folder.
    Raises UserError as `prune` does, and for a folder that is missing, torn, or not what its config says.
    """
    config = read_config(full_folder)
    shape = checked_shape(config.to_dict(), str(full_folder / "config.json"))
    kept = _choose(shape, scores, widths)
    source = WeightsFolder(full_folder)
    wanted = parameters(shape)
    check_weights(source, wanted)
    student = parameters(shape.pruned(widths.hidden, widths.intermediate))
    dtype = source.read("model.norm.weight").dtype
    sizes = {name: dtype.itemsize * _count(parameter.shape) for name, parameter in student.items()}
    out.mkdir(parents=True, exist_ok=True)
    write_weights(out, sizes, lambda name: cut(source.read(name), wanted[name], kept).to(dtype), shard_bytes)
    save_config(student_config(config, widths), out, dtype)
    copy_companions(full_folder, out)
    return kept


def random_student(
    full_config: PreTrainedConfig, widths: PrunedWidths, seed: int, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A student of the same shape with random weights (the method `scratch`): the same seed gives the same weights.

    The global random state is left as it was. Raises UserError for a model that cannot be cut.
    """
    checked_shape(full_config.to_dict(), full_config.name_or_path or "config")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not `torch.manual_seed`, which reseeds every GPU as well
        return AutoModelForCausalLM.from_config(student_config(full_config, widths), dtype=dtype).eval()


def student_config(full_config: PreTrainedConfig, widths: PrunedWidths) -> PreTrainedConfig:
    """The student's config: the full model's with the pruned widths and an explicit head dim.

    Raises UserError for widths that `transformers` refuses."""
    fields: dict[str, Any] = full_config.to_dict()
    fields["head_dim"] = ModelShape.from_config(fields).head_dim
    fields["hidden_size"], fields["intermediate_size"] = widths.hidden, widths.intermediate
    heads = fields["num_attention_heads"]
    if widths.hidden % heads:
        raise UserError(
            f"prune.hidden: {widths.hidden} channels is not a multiple of the {heads} heads; use resolve_widths"
        )
    for private in ("_name_or_path", "transformers_version"):
        fields.pop(private, None)
    return type(full_config).from_dict(fields)


def cut(tensor: Tensor, parameter: Parameter, kept: KeptChannels) -> Tensor:
    """The student's part of one tensor of the full model; the tensor itself when nothing is cut from it."""
    for dimension, axis in enumerate(parameter.axes):
        channels = _channels(axis, parameter.layer, kept)
        if channels is not None and len(channels) != tensor.shape[dimension]:
            tensor = tensor.index_select(dimension, channels.to(tensor.device))
    return tensor


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a local model folder. Raises UserError when it is missing, broken or of a model that is no use."""
    path = folder / "config.json"
    try:
        checked_shape(json.loads(path.read_text()), str(path))
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: missing; give the folder of a transformers model") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error


def save_config(config: PreTrainedConfig, folder: Path, dtype: torch.dtype, architecture: str | None = None) -> None:
    """Write `config.json` for weights of `dtype`; the config given stays as it is."""
    written = copy.deepcopy(config)
    written.dtype = dtype
    if architecture is not None:
        written.architectures = [architecture]
    written.save_pretrained(folder)


def copy_companions(full_folder: Path, out: Path) -> None:
    """Copy tokenizer and generation config, whichever of them exist."""
    for pattern in COMPANIONS:
        for file in sorted(full_folder.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, out / file.name)


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose weights are still to be written: allocated, not initialised."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # left out together with the initialisation
    return model


def _channels(axis: Axis, layer: int | None, kept: KeptChannels) -> Tensor | None:
    if axis is Axis.HIDDEN:
        return kept.hidden
    if axis is Axis.INTERMEDIATE:
        if layer is None:
            raise ValueError("an intermediate axis outside of a layer")
        return kept.intermediate[layer]
    return None


def _choose(shape: ModelShape, scores: ImportanceScores, widths: PrunedWidths) -> KeptChannels:
    have = (tuple(scores.hidden.shape), tuple(scores.intermediate.shape))
    want = ((shape.hidden,), (shape.layers, shape.intermediate))
    if have != want:
        raise UserError(f"importance scores are for {have} channels, the model has {want}; calibrate this model")
    if widths.hidden > shape.hidden or widths.intermediate > shape.intermediate:
        raise UserError(
            f"prune: widths {widths.hidden}/{widths.intermediate} exceed the model's "
            f"{shape.hidden}/{shape.intermediate}; use resolve_widths"
        )
    return scores.keep(widths)


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
