"""Student folders: what comes back, and the one sentence that refuses each kind of wrong folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from overfill.checkpoint import (
    FullModel,
    Manifest,
    full_model_folder,
    load_full_model,
    load_student,
    read_manifest,
    save_student,
    weights_digest,
)
from overfill.config import PruneConfig
from overfill.errors import UserError
from overfill.importance import ImportanceScores
from overfill.shapes import ModelShape, resolve_widths
from overfill.surgery import prune

TOKENS = torch.arange(12).reshape(2, 6)


@dataclass(frozen=True)
class Pair:
    full: PreTrainedModel
    full_folder: Path
    student: PreTrainedModel
    folder: Path
    manifest: Manifest


def saved_pair(model: PreTrainedModel, root: Path) -> Pair:
    config = model.config
    model.save_pretrained(root / "full")
    (root / "full" / "tokenizer.json").write_text('{"version": "1.0"}')
    layers = config.num_hidden_layers
    scores = ImportanceScores(
        hidden=torch.rand(config.hidden_size, dtype=torch.float64),
        intermediate=torch.rand(layers, config.intermediate_size, dtype=torch.float64),
        kv_second_moment=torch.ones(layers, 2, dtype=torch.float64),
        samples=1,
        tokens=1,
    )
    widths = resolve_widths(ModelShape.from_config(config.to_dict()), PruneConfig(hidden=0.45, intermediate=0.5))
    student, kept = prune(model, scores, widths)
    full_model = FullModel(id=str(root / "full"), digest=weights_digest(root / "full"))
    manifest = Manifest.of(full_model, config.model_type, widths, kept, method="overfill")
    save_student(student, root / "student", manifest, full_folder=root / "full")
    return Pair(model, root / "full", student, root / "student", manifest)


@pytest.fixture
def pair(llama: PreTrainedModel, tmp_path: Path) -> Pair:
    return saved_pair(llama, tmp_path)


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_student_comes_back_with_equal_logits(any_model: PreTrainedModel, tmp_path: Path) -> None:
    pair = saved_pair(any_model, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(pair.folder, local_files_only=True)
    with torch.no_grad():
        expected = pair.student(TOKENS).logits
        assert torch.equal(load_student(pair.folder)(TOKENS).logits, expected)
        assert torch.equal(plain(TOKENS).logits, expected)
    assert (pair.folder / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert plain.config.architectures == [type(any_model).__name__]


def test_the_manifest_comes_back_whole(pair: Pair) -> None:
    manifest = read_manifest(pair.folder)
    assert manifest == pair.manifest
    assert manifest.widths.hidden == 16 and manifest.widths.hidden_requested == 0.45
    assert manifest.widths.hidden_effective == 0.5
    assert len(manifest.kept_hidden or ()) == 16
    assert [len(row) for row in manifest.kept_intermediate or ()] == [24, 24, 24]
    assert manifest.versions["torch"] == torch.__version__


def test_the_kept_channels_of_the_manifest_are_those_of_the_weights(pair: Pair) -> None:
    hidden = list(read_manifest(pair.folder).kept_hidden or ())
    stored = load_student(pair.folder).get_input_embeddings().weight
    assert torch.equal(stored, pair.full.get_input_embeddings().weight[:, hidden])


def test_the_full_model_of_a_student_loads_frozen(pair: Pair) -> None:
    full = load_full_model(read_manifest(pair.folder))
    assert not full.training and not any(parameter.requires_grad for parameter in full.parameters())
    with torch.no_grad():
        assert torch.equal(full(TOKENS).logits, pair.full(TOKENS).logits)


def test_a_moved_full_model_loads_from_its_new_place(pair: Pair, tmp_path: Path) -> None:
    shutil.move(pair.full_folder, tmp_path / "moved")
    with pytest.raises(UserError, match="no such folder"):
        load_full_model(pair.manifest)
    full = load_full_model(pair.manifest, location=tmp_path / "moved")
    assert torch.equal(full.get_input_embeddings().weight, pair.full.get_input_embeddings().weight)


def test_another_full_model_is_refused(pair: Pair) -> None:
    with torch.no_grad():
        pair.full.get_parameter("model.norm.weight")[0] += 1e-3
    pair.full.save_pretrained(pair.full_folder)
    with pytest.raises(UserError, match="not those of .*full.*give that model"):
        load_full_model(pair.manifest)
    assert load_full_model(pair.manifest, verify=False) is not None


def test_the_digest_ignores_sharding_and_stored_tied_heads(
    model_of: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    model = model_of("qwen2-tied")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    digest = weights_digest(tmp_path / "one")
    assert weights_digest(tmp_path / "many") == digest
    stored = load_file(tmp_path / "one" / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "one" / "model.safetensors", metadata={"format": "pt"})
    assert weights_digest(tmp_path / "one") == digest
    stored["model.norm.weight"][3] += 1
    save_file(stored, tmp_path / "one" / "model.safetensors", metadata={"format": "pt"})
    assert weights_digest(tmp_path / "one") != digest


def test_given_weights_replace_the_modules_own(pair: Pair, tmp_path: Path) -> None:
    gathered = {name: (tensor + 1).bfloat16() for name, tensor in pair.student.state_dict().items()}
    save_student(pair.student, tmp_path / "trained", pair.manifest, state_dict=gathered)
    loaded = load_student(tmp_path / "trained")
    assert all(torch.equal(tensor, gathered[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.dtype is torch.bfloat16 and pair.student.config.dtype is torch.float32


def test_weights_of_another_shape_than_the_manifest_are_not_saved(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the manifest is for widths"):
        save_student(pair.full, tmp_path / "wrong", pair.manifest)
    assert not (tmp_path / "wrong").exists()


def test_training_changes_the_method_and_nothing_else_of_the_manifest(pair: Pair) -> None:
    assert pair.manifest.trained("pruned") == pair.manifest.model_copy(update={"method": "pruned"})


def test_a_student_loads_in_another_precision(pair: Pair) -> None:
    assert load_student(pair.folder, dtype=torch.bfloat16).dtype is torch.bfloat16
    assert load_student(pair.folder).dtype is torch.float32


def test_a_folder_without_a_manifest_is_no_student(pair: Pair) -> None:
    with pytest.raises(UserError, match=r"full/overfill.json: missing, so this is not a student folder"):
        load_student(pair.full_folder)
    with pytest.raises(UserError, match="missing"):
        read_manifest(pair.folder / "nowhere")


def test_an_interrupted_save_leaves_no_student(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    import overfill.checkpoint

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(overfill.checkpoint, "write_weights", killed)
    with pytest.raises(KeyboardInterrupt):
        save_student(pair.student, pair.folder, pair.manifest)
    with pytest.raises(UserError, match="overfill.json: missing"):
        load_student(pair.folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 2}, "format 2, this version reads 1"),
        ({"format": None}, "format None"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"architecture": 3}, "architecture: Input should be a valid string"),
        ({"full_model": {"id": "x"}}, "full_model.digest: Field required"),
    ],
)
def test_a_foreign_manifest_is_refused_by_field(pair: Pair, fields: dict[str, object], message: str) -> None:
    edit(pair.folder / "overfill.json", **fields)
    with pytest.raises(UserError, match=message):
        read_manifest(pair.folder)


def test_a_torn_manifest_is_refused(pair: Pair) -> None:
    path = pair.folder / "overfill.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match="not JSON"):
        read_manifest(pair.folder)


def test_torn_missing_and_pickled_weights_are_refused(pair: Pair) -> None:
    weights = pair.folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-8])
    with pytest.raises(UserError, match="model.safetensors: torn"):
        load_student(pair.folder)
    weights.unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        load_student(pair.folder)
    (pair.folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickled weights are refused"):
        load_student(pair.folder)


def test_a_missing_shard_is_refused_by_name(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path, max_shard_size="8KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: missing"):
        load_full_model(tmp_path)


def test_a_folder_that_mixes_two_students_is_refused(pair: Pair) -> None:
    edit(pair.folder / "config.json", intermediate_size=20)
    with pytest.raises(UserError, match="mixes two students"):
        load_student(pair.folder)


@pytest.mark.parametrize("reference", ["/no/such/model", "./model", "model", Path("some/model")])
def test_a_path_is_never_looked_up_on_the_hub(reference: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import overfill.checkpoint

    def forbidden(*arguments: object, **options: object) -> str:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(overfill.checkpoint, "snapshot_download", forbidden)
    with pytest.raises(UserError, match="no such folder"):
        full_model_folder(reference)


def test_what_the_hub_does_not_give_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import overfill.checkpoint

    def offline(*arguments: object, **options: object) -> str:
        raise OSError("cannot reach the hub\nmore lines")

    monkeypatch.setattr(overfill.checkpoint, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"^someone/model at revision abc: neither .*cannot reach the hub\)$"):
        full_model_folder("someone/model", "abc")


def test_a_hub_id_is_fetched_at_its_revision_and_without_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import overfill.checkpoint

    asked: list[tuple[str, str | None]] = []

    def snapshot(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision))
        wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
        assert all(any(fnmatch(file, pattern) for pattern in allow_patterns) for file in wanted)
        unwanted = ["pytorch_model.bin", "model.pt", "modeling_custom.py", "consolidated.00.pth"]
        assert not any(fnmatch(file, pattern) for file in unwanted for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(overfill.checkpoint, "snapshot_download", snapshot)
    assert full_model_folder("someone/model", "abc123") == tmp_path
    assert asked == [("someone/model", "abc123")]
