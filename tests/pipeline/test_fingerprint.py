"""Identity must be the same bytes everywhere, and different for whatever may change a result."""

from __future__ import annotations

import enum
import math
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from pipeline.fingerprint import canonical, canonical_json, digest_file, digest_tree, fingerprint, identity_config

CONFIG: dict[str, Any] = {
    "b": [1, 2.5, None, True, "é\u2028"],
    "a": {"z": 1e-7, "y": 1e22, "x": 0.1 + 0.2, "w": -0.0, "v": 123456789012345678901234567890},
}
CONFIG_JSON = (
    '{"a":{"v":123456789012345678901234567890,"w":0.0,"x":0.30000000000000004,"y":1e+22,"z":1e-07},'
    '"b":[1,2.5,null,true,"\\u00e9\\u2028"]}'
)
CONFIG_FINGERPRINT = "4a0d96eb8884"


def test_the_canonical_text_is_pinned_so_that_old_stores_stay_valid():
    assert canonical_json(CONFIG) == CONFIG_JSON
    assert fingerprint(CONFIG) == CONFIG_FINGERPRINT


@pytest.mark.parametrize("seed", ["0", "1", "4242"])
def test_a_fingerprint_is_the_same_in_processes_with_other_hash_seeds(seed: str):
    script = (
        "import sys; from pipeline.fingerprint import fingerprint\n"
        f"config = {CONFIG!r}\n"
        "names = list({'b', 'a'})  # a set's order depends on the hash seed\n"
        "print(fingerprint({name: config[name] for name in names}))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == CONFIG_FINGERPRINT


def test_key_order_does_not_count_and_list_order_does():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint([1, 2]) != fingerprint([2, 1])


def test_a_tuple_is_a_list():
    assert fingerprint({"prompt": (512, 4096)}) == fingerprint({"prompt": [512, 4096]})


def test_one_channel_is_not_a_ratio_of_one_and_true_is_not_one():
    assert len({fingerprint(value) for value in (1, 1.0, True, "1", "1.0", [1], None)}) == 7


def test_minus_zero_is_zero():
    assert fingerprint({"weight": -0.0}) == fingerprint({"weight": 0.0})


def test_floats_that_differ_in_the_last_bit_differ():
    assert fingerprint(0.1) != fingerprint(math.nextafter(0.1, 1.0))


def test_an_absent_field_is_not_a_null_one():
    assert fingerprint({"a": None}) != fingerprint({})


class _Color(enum.StrEnum):
    RED = "red"


class _Loss(BaseModel):
    kl: float = 1.0


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"loss": {"kl": math.nan}}, "loss.kl is nan"),
        ({"loss": [0.0, math.inf]}, "loss[1] is inf"),
        ({"a": {1: "x"}}, "a has the key 1"),
        ({"a": {"b": {1, 2}}}, "a.b is a builtins.set"),
        ({"a": Path("/data")}, "a is a pathlib.PosixPath"),
        ({"a": [np.float32(1.0)]}, "a[0] is a numpy.float32"),
        ({"a": np.float64(1.0)}, "a is a numpy.float64"),
        ({"a": b"x"}, "a is a builtins.bytes"),
        ({"a": len}, "a is a builtins.builtin_function_or_method"),
        ({"a": _Color.RED}, "_Color"),
        ({"a": OrderedDict(b=1)}, "a is a collections.OrderedDict"),
        ({"loss": _Loss()}, "pass it through identity_config()"),
        (math.nan, "the value is nan"),
    ],
)
def test_what_has_no_canonical_form_raises_with_its_path(value: Any, path: str):
    with pytest.raises(TypeError) as raised:
        canonical_json(value)
    assert path in str(raised.value)


def test_a_value_that_contains_itself_raises():
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(TypeError, match="contain itself"):
        canonical(loop)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=50, deadline=None)
@given(JSON)
def test_canonical_is_idempotent_and_survives_json(value: Any):
    import json

    text = canonical_json(value)
    assert canonical_json(canonical(value)) == text
    assert canonical_json(json.loads(text)) == text
    assert text.isascii()


@settings(max_examples=50, deadline=None)
@given(JSON, JSON)
def test_values_share_a_text_only_when_they_are_equal(a: Any, b: Any):
    if canonical_json(a) == canonical_json(b):
        assert a == b


class _Distill(BaseModel):
    model_config = ConfigDict(frozen=True)

    tokens: int = 1000
    batch: Annotated[int, Field(json_schema_extra={"identity": False})] = 64
    path: str | None = Field(default=None, json_schema_extra={"identity": False})
    hint: Annotated[str, Field(json_schema_extra={"examples": ["x"]})] = "h"
    losses: tuple[_Loss, ...] = (_Loss(),)
    named: dict[str, _Loss] = {}


def test_identity_config_leaves_out_what_does_not_count_and_keeps_defaults():
    config = _Distill(batch=1, path="/somewhere", named={"late": _Loss(kl=2.0)})
    assert identity_config(config) == {
        "tokens": 1000,
        "hint": "h",
        "losses": [{"kl": 1.0}],
        "named": {"late": {"kl": 2.0}},
    }


def test_a_field_that_does_not_count_changes_no_fingerprint_and_any_other_does():
    base = fingerprint(identity_config(_Distill()))
    assert fingerprint(identity_config(_Distill(batch=8, path="/x"))) == base
    assert fingerprint(identity_config(_Distill(losses=(_Loss(kl=2.0),)))) != base
    assert fingerprint(identity_config(_Distill(tokens=1001))) != base


def test_a_nested_field_that_does_not_count_is_left_out_too():
    class Inner(BaseModel):
        path: Annotated[str, Field(json_schema_extra={"identity": False})] = "/a"
        split: str = "train"

    class Outer(BaseModel):
        inner: Inner = Inner()

    assert identity_config(Outer()) == {"inner": {"split": "train"}}


def test_digest_file_is_the_sha256_of_its_bytes_also_across_blocks(tmp_path: Path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert digest_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "long").write_bytes(b"a" * 1_000_000)
    assert digest_file(tmp_path / "long") == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"


def _tree(root: Path, content: str = "x") -> Path:
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.txt").write_text(content)
    (root / "b.txt").write_text("y")
    return root


def test_a_tree_digest_is_the_content_and_not_the_place(tmp_path: Path):
    first, second = _tree(tmp_path / "one"), _tree(tmp_path / "deeper" / "two")
    assert digest_tree(first) == digest_tree(second) == digest_tree([second]) == digest_tree(str(first))


def test_a_tree_digest_sees_a_changed_byte_a_renamed_file_and_a_moved_one(tmp_path: Path):
    base = digest_tree(_tree(tmp_path / "base"))
    assert digest_tree(_tree(tmp_path / "byte", content="z")) != base
    (_tree(tmp_path / "renamed") / "b.txt").rename(tmp_path / "renamed" / "c.txt")
    assert digest_tree(tmp_path / "renamed") != base
    (_tree(tmp_path / "moved") / "b.txt").rename(tmp_path / "moved" / "sub" / "b.txt")
    assert digest_tree(tmp_path / "moved") != base


def test_the_order_of_data_files_counts(tmp_path: Path):
    root = _tree(tmp_path / "base")
    files = [root / "b.txt", root / "sub" / "a.txt"]
    assert digest_tree(files) != digest_tree(files[::-1])


def test_hidden_entries_do_not_count_and_links_to_files_count_as_the_file(tmp_path: Path):
    root = _tree(tmp_path / "base")
    base = digest_tree(root)
    (root / ".cache").mkdir()
    (root / ".cache" / "download.json").write_text("today")
    (root / ".DS_Store").write_text("")
    assert digest_tree(root) == base
    (root / "b.txt").rename(tmp_path / "blob")
    (root / "b.txt").symlink_to(tmp_path / "blob")
    assert digest_tree(root) == base


def test_a_link_to_a_folder_and_a_missing_path_raise(tmp_path: Path):
    (tmp_path / "linked").symlink_to(_tree(tmp_path / "base" / "inner"), target_is_directory=True)
    (tmp_path / "linked").rename(tmp_path / "base" / "linked")
    with pytest.raises(ValueError, match="link to a folder"):
        digest_tree(tmp_path / "base")
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        digest_tree(tmp_path / "nothing-here")
