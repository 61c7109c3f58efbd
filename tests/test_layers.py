"""The walls of the house: who may import whom, read from the sources' own import statements."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "overfill").rglob("*.py"), *(ROOT / "pipeline").rglob("*.py")])

ALLOWED = {
    "ray": (
        *("pipeline/cluster.py", "pipeline/tune.py", "pipeline/training/", "pipeline/stages/"),
        *("pipeline/submission/job_server.py", "pipeline/submission/jobs.py"),
    ),
    "deepspeed": ("pipeline/training/engine.py",),
    "mlflow": ("pipeline/tracking/server.py",),
    "lm_eval": ("pipeline/harness/",),
    "peft": ("overfill/lora.py",),
    "yaml": ("pipeline/config_io.py",),
    "fsspec": ("pipeline/objects/",),
    "s3fs": ("pipeline/objects/s3.py",),
    "botocore": ("pipeline/objects/s3.py",),
    "gcsfs": ("pipeline/objects/gs.py",),
}
"""Library -> the files and folders that may import it, at module level or inside a function."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere in it, absolute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import; write the whole module name"
            yield str(node.module)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_each_library_is_imported_only_where_it_belongs(path):
    for module in imports(path):
        library = module.split(".")[0]
        places = ALLOWED.get(library)
        assert places is None or name_of(path).startswith(places), f"{name_of(path)} imports {library}"


@pytest.mark.parametrize("path", [path for path in SOURCES if name_of(path).startswith("overfill/")], ids=name_of)
def test_the_method_does_not_know_the_machine(path):
    assert not [module for module in imports(path) if module.split(".")[0] == "pipeline"]


def test_modules_import_each_other_in_one_direction():
    modules = {name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in SOURCES}
    graph = {name: top_level_imports(path) & set(modules) - {name} for name, path in modules.items()}
    finished: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"circle: {' -> '.join([*way[way.index(name) :], name])}"
        if name not in finished:
            for other in sorted(graph[name]):
                visit(other, (*way, name))
            finished.add(name)

    for name in sorted(graph):
        visit(name, ())


def top_level_imports(path: Path) -> set[str]:
    """Modules imported at run time when the file is loaded; `from package import module` counts as the module."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_hold_one_concept_and_functions_do_one_thing(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400, f"{name_of(path)} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 60, f"{name_of(path)}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_models_and_results_never_travel_as_pickles(path):
    text = path.read_text(encoding="utf-8")
    for word in ("import pickle", "torch.save(", "torch.load("):
        if name_of(path) == "pipeline/training/checkpoints.py":
            continue  # step checkpoints of our own runs; read with weights_only=True, which the next test holds
        assert word not in text, f"{name_of(path)}: {word}"


def test_every_read_of_a_torch_file_refuses_code():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
                    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    assert keywords.get("weights_only") == "True", f"{name_of(path)}:{node.lineno}"
