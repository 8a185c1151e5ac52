"""Imports run one way, and what costs a second to import is imported only where it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import reap_stream

PACKAGE = Path(reap_stream.__file__).parent
FLOOR = {"reap_stream.errors", "reap_stream.exhaustion", "reap_stream._native"}
# Folder → the folders and modules of the package it may import.
ALLOWED = {
    "checkpoint": {"checkpoint"},
    "formats": {"formats", "checkpoint"},
    "model": {"model", "formats", "checkpoint"},
    "recoding": {"recoding", "model", "formats", "checkpoint"},
    "scoring": {"scoring", "checkpoint"},
    "calibration": {"calibration", "checkpoint"},
    "hub": {"hub", "checkpoint"},
    "ranks": {"ranks", "scoring"},
}
# On top of everything else: what whole jobs are made of, used by them and the command line alone.
TOP = {"batch", "card", "demo", "evaluation", "reporting", "upload"}
# Modules that may import torch without the forward pass being near.
TORCH = {"model", "formats", "recoding"}
TORCH_MODULES = {
    "reap_stream.calibration.activations",
    "reap_stream.calibration.batches",
    "reap_stream.calibration.carried",
    "reap_stream.scoring.accumulator",
}
INTERNALS = "reap_stream.model.transformers_api"


def name_of(path):
    parts = ["reap_stream", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path, *, at_run_time=False):
    """Full names a module imports; those under TYPE_CHECKING left out if `at_run_time`."""
    found = set()
    for node in walk(ast.parse(path.read_text(encoding="utf-8")), at_run_time=at_run_time):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found.update(
                full if (full := f"{module}.{alias.name}") in MODULES else module
                for alias in node.names
            )
            found.update({"reap_stream._native"} & {f"{module}.{a.name}" for a in node.names})
    return found


def walk(node, *, at_run_time):
    yield node
    is_guard = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    if at_run_time and is_guard:
        return
    for child in ast.iter_child_nodes(node):
        yield from walk(child, at_run_time=at_run_time)


def at_import(path):
    """Names imported when the module itself is imported: not in functions, not for types."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def folder(module):
    parts = module.split(".")
    if parts[1:2] and parts[1] in TOP:
        return ""
    return parts[1] if len(parts) > 2 or module in {f"reap_stream.{f}" for f in ALLOWED} else ""


@pytest.mark.parametrize("module", [name for name in MODULES if folder(name)])
def test_folders_import_only_what_lies_below_them(module):
    for imported in imports(MODULES[module]):
        if imported.startswith("reap_stream") and imported not in FLOOR | {"reap_stream"}:
            assert folder(imported) in ALLOWED[folder(module)], f"{module} imports {imported}"


@pytest.mark.parametrize("module", ["reap_stream.errors"])
def test_the_floor_imports_nothing_of_the_package(module):
    assert not [name for name in imports(MODULES[module]) if name.startswith("reap_stream")]


def test_no_import_goes_in_a_circle():
    graph = {
        name: {other for other in imports(path, at_run_time=True) if other in MODULES} - {name}
        for name, path in MODULES.items()
        # The package's own names are resolved on first use.
        if name != "reap_stream"
    }
    done: set[str] = set()

    def visit(name, trail):
        assert name not in trail, " → ".join([*trail[trail.index(name) :], name])
        if name in done or name not in graph:
            return
        for other in sorted(graph[name]):
            visit(other, [*trail, name])
        done.add(name)

    for name in graph:
        visit(name, [])
    assert done == set(graph)


@pytest.mark.parametrize("module", list(MODULES))
def test_only_one_folder_uses_the_inside_of_transformers(module):
    found = {name for name in imports(MODULES[module]) if name.split(".")[0] == "transformers"}
    if not module.startswith(f"{INTERNALS}."):
        assert found <= {"transformers"}, module


@pytest.mark.parametrize(
    "module", [name for name in MODULES if folder(name) and folder(name) not in TORCH]
)
def test_torch_is_used_only_where_it_must_be(module):
    if module not in TORCH_MODULES:
        assert not {name for name in at_import(MODULES[module]) if name.split(".")[0] == "torch"}


@pytest.mark.parametrize(
    "code",
    [
        "import reap_stream; reap_stream.__version__",
        "from reap_stream import cli; run(cli.main, ['--help'])",
        "from reap_stream import cli; run(cli.main, ['prune', '--help'])",
        "import reap_stream.settings, reap_stream.errors, reap_stream.checkpoint.source",
        "import reap_stream.scoring.selection, reap_stream.scoring.scores_file",
    ],
)
def test_torch_is_not_imported_before_it_is_needed(code):
    script = f"""
import contextlib, sys

def run(main, arguments):
    with contextlib.suppress(SystemExit):
        main(arguments)

{code}
found = {{"torch", "transformers", "huggingface_hub", "pyarrow", "datasets"}} & set(sys.modules)
assert not found, found
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
