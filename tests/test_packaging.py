from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import zipfile
from importlib import resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import reap_stream
from reap_stream.cli import build_parser

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in found}


def commands():
    """Names of all commands, as the parser has them."""
    subparsers = next(
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return sorted(subparsers.choices)


def readme_commands():
    """The commands that README's first section gives, one a line."""
    start = re.search(
        r"^## Start\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    blocks = re.findall(r"```bash\n(.*?)```", start[1], re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if "venv" in line]


def run(*arguments):
    """A Python process that sees the package as users do, not the working directory's."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=os.sep,
        timeout=120,
    )


def test_ci_runs_the_readmes_commands_verbatim():
    script = (ROOT / ".ci" / "run").read_text()
    install, test = readme_commands()
    assert "reap-stream demo" in install
    assert test.endswith("pytest")
    for command in (install, test):
        assert f"bash -c '{command}'\n" in script


def test_pins_are_within_the_bounds(project, pins):
    metadata = project["project"]
    groups = [metadata["dependencies"], *metadata["optional-dependencies"].values()]
    needed = [Requirement(text) for group in groups for text in group]
    for requirement in [*needed, *map(Requirement, project["build-system"]["requires"])]:
        if requirement.name == "reap-stream":
            continue
        (pin,) = pins[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "=="
        assert pin.version in requirement.specifier, requirement


def test_only_lower_bounds_are_asked_for(project):
    metadata = project["project"]
    groups = [metadata["dependencies"], *metadata["optional-dependencies"].values()]
    for requirement in (Requirement(text) for group in groups for text in group):
        assert all(bound.operator == ">=" for bound in requirement.specifier), requirement


def test_version_is_the_projects(project):
    result = run("-m", "reap_stream", "--version")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["reap-stream", project["project"]["version"]]
    assert reap_stream.__version__ == project["project"]["version"]


def test_help_imports_no_torch():
    code = """
import sys
from reap_stream.cli import main
for command in sys.argv[1:]:
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert end.code == 0, command
    heavy = {"torch", "transformers", "numpy"} & sys.modules.keys()
    assert not heavy, (command, heavy)
"""
    result = run("-c", code, *commands())
    assert result.returncode == 0, result.stderr
    for command in commands():
        assert f"usage: reap-stream {command} " in result.stdout


def test_the_package_carries_its_types():
    package = resources.files("reap_stream")
    assert (package / "py.typed").is_file()
    stub = (package / "_native.pyi").read_text()
    code = "from reap_stream import _native; print(*dir(_native))"
    defined = set(run("-c", code).stdout.split())
    public = {name for name in defined if not name.startswith("_")}
    assert public
    assert public == set(re.findall(r"^def (\w+)", stub, re.MULTILINE))


@pytest.mark.slow
def test_a_wheel_built_from_the_source_distribution_is_whole(tmp_path):
    pytest.importorskip("build")
    built = run("-m", "build", "--outdir", str(tmp_path), str(ROOT))
    assert built.returncode == 0, built.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    package = (path for path in (ROOT / "reap_stream").rglob("*") if path.is_file())
    sources = {
        str(path.relative_to(ROOT)) for path in package if path.suffix not in {".pyc", ".so"}
    }
    assert {"reap_stream/py.typed", "reap_stream/demo/model/tokenizer.json"} <= sources
    assert sources <= names
    assert sum(name.endswith(".so") for name in names) == 1
    assert not [name for name in names if name.startswith(("tests/", "csrc/"))]
