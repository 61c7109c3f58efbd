"""YAML files to frozen configs: strict, with errors that name the file, the field, the value and the way out.

PyYAML speaks YAML 1.1, where `no` is False and `1e-4` is a string; the loader here resolves scalars as YAML 1.2's core
schema does, refuses a key given twice, and leaves the rest to the declared types. Before any value is made, the tree of
nodes is checked: no tags that make objects, no aliases that grow without bounds, no key that is not a text.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from overfill.errors import UserError
from pipeline.config import ExperimentConfig
from pipeline.paths import require_regular

Config = TypeVar("Config", bound=BaseModel)
_LARGEST_FILE = 2**20
_MOST_NODES = 200_000
"""Values of a file with every alias written out."""
_DEEPEST = 50
"""Nesting of values, aliases written out."""
_LONGEST_NUMBER = 40
"""Digits of an integer; what is longer fits no field and no float."""


class _Loader(yaml.SafeLoader):
    """Scalars by YAML 1.2's core schema; duplicate keys are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key `{key.value}` given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
    ("merge", r"<<", "<"),
):
    for _character in _first:
        _Loader.yaml_implicit_resolvers.setdefault("" if _character == "\0" else _character, []).append(
            (f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"))
        )


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    if len(text) > _LONGEST_NUMBER:
        raise _problem(node, f"a number of {len(text)} digits")
    return int(text, 16) if text.lower().startswith("0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as a text: by YAML 1.1 the commit 4e10 is one."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _problem(node: yaml.Node, text: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


def _check(loader: _Loader, node: yaml.Node, sizes: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(values, depth) of a node with its aliases written out; MarkedYAMLError for what must not be made into values.

    `sizes` remembers nodes by identity, so that an alias costs nothing here however much it stands for."""
    known = sizes.get(id(node))
    if known == (0, 0):
        raise _problem(node, "an alias inside its own anchor")
    if known is not None:
        return known
    sizes[id(node)] = (0, 0)
    _check_node(loader, node)
    parts = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
    found = [] if isinstance(node, yaml.ScalarNode) else [_check(loader, part, sizes) for part in parts]
    size, depth = 1 + sum(size for size, _ in found), 1 + max((depth for _, depth in found), default=0)
    if size > _MOST_NODES:
        raise _problem(node, f"more than {_MOST_NODES:,} values, aliases written out")
    if depth > _DEEPEST:
        raise _problem(node, f"values nested more than {_DEEPEST} levels deep")
    sizes[id(node)] = (size, depth)
    return size, depth


def _check_node(loader: _Loader, node: yaml.Node) -> None:
    if isinstance(node, yaml.ScalarNode):
        expected = {"tag:yaml.org,2002:str", loader.resolve(yaml.ScalarNode, node.value, (True, False))}
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            raise _problem(node, "half of a surrogate pair, which is no character")
    else:
        expected = {loader.resolve(type(node), None, True)}
    if node.tag not in expected:
        raise _problem(node, f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} does not fit; leave it out")
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            written = f"`{key.value}`" if isinstance(key, yaml.ScalarNode) else "that is a list or a mapping"
            raise _problem(key, f"a key {written} is no text; write a field's name, or put it in quotes")


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read an experiment file and apply `dotted.path=value` overrides.

    Raises UserError for a file that cannot be read, YAML that cannot be parsed, and values that do not fit."""
    where = str(path)
    values = parse_yaml(read_text(Path(path)), where)
    if not isinstance(values, dict):
        raise UserError(
            f"{where}: an experiment is a mapping of sections (name, teacher, data, ...), not {_show(values)}"
        )
    for override in overrides:
        dotted, value = parse_override(override)
        values = with_value(values, dotted, value, f"--set {override}")
    return validate(ExperimentConfig, values, where)


def read_text(path: Path) -> str:
    """The file's text; UserError when there is none to read."""
    try:
        require_regular(path)
        if path.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{path}: larger than {_LARGEST_FILE >> 20} MiB, so it is not an experiment file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in _siblings(path)], n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "give the path of an experiment's YAML file"
        raise UserError(f"{path}: no such file; {hint}") from error
    except (OSError, ValueError) as error:
        reason = (
            "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None) or error
        )
        raise UserError(f"{path}: cannot be read ({reason}); give the path of an experiment's YAML file") from error


def _siblings(path: Path) -> list[Path]:
    return sorted(path.parent.glob("*.y*ml")) if path.parent.is_dir() else []


def parse_yaml(text: str, where: str) -> Any:
    """Plain values of a YAML text; UserError with line and column when it cannot be parsed."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(loader, node, {})
        return loader.construct_document(node)
    except RecursionError as error:
        raise UserError(f"{where}: not valid YAML: values nested more than {_DEEPEST} levels deep") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = " ".join(str(error.problem or error.context).split())
        raise UserError(f"{where}{place}: not valid YAML: {problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())[:200]}") from error


def parse_override(text: str) -> tuple[str, Any]:
    """`a.b=value` -> (path, value); the value is YAML."""
    dotted, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", dotted.strip()):
        raise UserError(f"--set {text}: write it as dotted.path=value, for example --set distill.learning_rate=1e-3")
    return dotted.strip(), parse_yaml(value, f"--set {text}")


def with_value(values: Mapping[str, Any], dotted: str, value: Any, where: str) -> dict[str, Any]:
    """A copy of `values` with the field at `dotted` replaced; missing sections are made."""
    head, _, rest = dotted.partition(".")
    if not rest:
        return {**values, head: value}
    inner = values.get(head)
    if inner is not None and not isinstance(inner, Mapping):
        raise UserError(f"{where}: `{head}` is {_show(inner)}, so it has no field `{rest}`")
    return {**values, head: with_value(inner or {}, rest, value, where)}


def is_under(path: str, section: str) -> bool:
    """Whether a dotted path is a section or lies in it."""
    return path == section or path.startswith(section + ".")


def validate(model: type[Config], values: Any, where: str) -> Config:
    """Build `model` from plain values; the first problem becomes a one-line UserError."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{where}: {_sentence(model, dict(problems[0]))}{more}") from error


def _sentence(model: type[BaseModel], problem: dict[str, Any]) -> str:
    path = _path_of(problem)
    dotted = ".".join(map(str, path)) or "the file"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(sorted(known))}"
        return f"{dotted}: no such field; {hint}"
    if problem["type"] == "string_type" and isinstance(problem["input"], bool | int | float):
        return f"{dotted} = {_show(problem['input'])}: this field is a text; write the value in quotes"
    if problem["type"] == "missing":
        return f"{dotted}: is missing; add it"
    if problem["type"] == "value_error" and isinstance(problem["input"], Mapping):
        return f"{dotted}: {message}" if path else message
    return f"{dotted} = {_show(problem['input'])}: {message[0].lower() + message[1:]}"


def _path_of(problem: Mapping[str, Any]) -> list[Any]:
    """Where a problem is, without pydantic's names for the members of a union (`function-before[...]`)."""
    path = [part for part in problem["loc"] if _is_name(part)]
    if problem["type"] == "extra_forbidden" and not _is_name(problem["loc"][-1]):
        path.append(_show(problem["loc"][-1]))  # the user's own text, whatever it looks like
    return path


def _is_name(part: Any) -> bool:
    return isinstance(part, int) or re.fullmatch(r"[\w.-]+", part) is not None


def _fields_at(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """Field names of the config that a path of keys leads to."""
    current: type[BaseModel] | None = model
    for part in path:
        field = current.model_fields.get(str(part)) if current else None
        current = _model_in(field.annotation) if field else None
    return list(current.model_fields) if current else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def _show(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML text of plain values, keys in their order."""
    return yaml.dump(json.loads(json.dumps(values)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def schema() -> dict[str, Any]:
    """JSON Schema of an experiment file, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "OverFill experiment",
        **ExperimentConfig.model_json_schema(),
    }
