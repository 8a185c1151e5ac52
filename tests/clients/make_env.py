"""Makes the virtual environments of the clients.

    python tests/clients/make_env.py [--into DIR] [CLIENT ...]

Each client gets DIR/CLIENT with the versions of requirements/CLIENT.txt; one that is there and up to
date stays. pip must find torch's CPU build (``torch==2.13.0+cpu``): the default build brings gigabytes
for GPUs, which nothing here uses. llama.cpp comes with llama-cpp-python's source distribution and is
compiled, which needs a C++17 compiler. A client that cannot be installed ends the script with the
command that failed and its last words.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from pathlib import Path

HERE = Path(__file__).parent
DEFAULT_INTO = HERE.parents[1] / "build" / "clients"
# Clients, and what an environment that works can import.
CLIENTS = {"llamacpp": "llama_cpp", "mlx": "mlx_lm", "mistralrs": "mistralrs", "vllm": "vllm"}
OLDEST_PYTHON = (3, 11)
LLAMA_CPP_PYTHON = "llama-cpp-python==0.3.36"
JOBS = "2"
# The library alone, compiled fast rather than well: the models are tiny.
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DCMAKE_C_FLAGS_RELEASE=-O1",
    "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
    "-DBUILD_SHARED_LIBS=ON",
    # The libraries find each other wherever they are moved to.
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
    "-DLLAMA_OPENSSL=OFF",
    *(
        f"-DLLAMA_BUILD_{part}=OFF"
        for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")
    ),
)


class InstallError(Exception):
    """A command that an environment needs has failed."""


def main() -> int:
    """Makes what is asked for; 1 if a client cannot be installed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, default=DEFAULT_INTO)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=", ".join(CLIENTS))
    arguments = parser.parse_args()
    clients = arguments.clients or list(CLIENTS)
    if unknown := set(clients) - set(CLIENTS):
        parser.error(
            f"no such client: {', '.join(sorted(unknown))}; there are {', '.join(CLIENTS)}"
        )
    if sys.version_info < OLDEST_PYTHON:
        sys.stderr.write(f"the clients need Python 3.11 or later, this is {sys.version}\n")
        return 1
    for client in clients:
        started = time.monotonic()
        try:
            made = make(client, (arguments.into / client).resolve())
        except InstallError as error:
            sys.stderr.write(f"{client} cannot be installed: {error}\n")
            return 1
        state = f"made in {time.monotonic() - started:.0f} s" if made else "is up to date"
        sys.stdout.write(f"{client} {state}\n")
        sys.stdout.flush()
    return 0


def make(client: str, environment: Path) -> bool:
    """Makes one environment; False if there is one of the same requirements and script."""
    requirements = HERE / "requirements" / f"{client}.txt"
    recipe = requirements.read_bytes() + Path(__file__).read_bytes() + sys.version.encode()
    digest = hashlib.sha256(recipe).hexdigest()
    stamp = environment / "made.json"
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == digest:
        return False
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, with_pip=True)
    _pip(environment, "install", "--no-deps", "--requirement", str(requirements))
    if client == "llamacpp":
        _add_llama_cpp(environment)
    _run(str(environment / "bin" / "python"), "-c", f"import {CLIENTS[client]}")
    stamp.write_text(json.dumps(digest), encoding="utf-8")
    return True


def _add_llama_cpp(environment: Path) -> None:
    """Adds the bindings, the built libraries where they look, and the converter's source."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        options = ("--no-deps", "--no-build-isolation")
        only_source = ("--no-binary", "llama-cpp-python", "--dest", scratch)
        _pip(environment, "download", *options, *only_source, LLAMA_CPP_PYTHON)
        (sdist,) = work.glob("llama_cpp_python-*.tar.gz")
        bindings = "--config-settings=cmake.define.LLAMA_BUILD=OFF"
        _pip(environment, "install", *options, bindings, str(sdist))
        with tarfile.open(sdist) as archive:
            # As an attribute, older patch releases of Python, which have no such filter, ignore it.
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            archive.extractall(work)
        (source,) = work.glob("llama_cpp_python-*/vendor/llama.cpp")
        tools, build = environment / "bin", work / "build"
        generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}")
        _run(str(tools / "cmake"), "-S", str(source), "-B", str(build), *generator, *CMAKE_OPTIONS)
        _run(str(tools / "cmake"), "--build", str(build), "--target", "llama", "--parallel", JOBS)
        (package,) = environment.glob("lib/python*/site-packages/llama_cpp")
        shutil.copytree(build / "bin", package / "lib", symlinks=True)
        converter = environment / "llama.cpp"
        for part in ("conversion", "gguf-py"):
            shutil.copytree(source / part, converter / part)
        shutil.copy(source / "convert_hf_to_gguf.py", converter)


def _pip(environment: Path, *arguments: str) -> None:
    quiet = ("--quiet", "--disable-pip-version-check", "--no-input")
    _run(str(environment / "bin" / "python"), "-m", "pip", *arguments, *quiet)


def _run(*command: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        words = done.stdout.decode(errors="replace")[-2000:]
        raise InstallError(f"{' '.join(command)}: exit {done.returncode}\n{words}")


if __name__ == "__main__":
    sys.exit(main())
