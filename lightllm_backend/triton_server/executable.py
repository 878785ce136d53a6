# SPDX-License-Identifier: Apache-2.0
"""Finds the tritonserver to run, and makes the environment that its Python backend needs.

The server is the command line that an environment variable names, else the complete server of NVIDIA's container, else
the one inside the package nvidia-pytriton. In the package, the backend directory has no stub, the stub looks for
libpython and for the first `python3` on PATH, and is built for numpy 1; `command` corrects all that.
`python -m lightllm_backend.triton_server.executable ARGUMENTS` runs the server, and `write_wrapper` makes that the
virtual environment's `tritonserver`.
"""

import importlib.metadata
import importlib.util
import os
import shlex
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lightllm_backend.environment import STUB, remember_library_path

COMMAND_VARIABLE = "LIGHTLLM_TRITONSERVER"
CONTAINER_BINARIES = "/opt/tritonserver/bin"
MODULE = "lightllm_backend.triton_server.executable"
# LightLLM's models, whose config.pbtxt are complete.
MODELS = frozenset({"lightllm", "ensemble", "lightllm_unary", "tokenizer", "generation", "detokenizer", "health"})


class TritonServerError(Exception):
    """No tritonserver can be run here; the message says what to install or to set."""


def command(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment that run tritonserver with these arguments."""
    server_environment = dict(os.environ if environment is None else environment)
    remember_library_path(server_environment)
    prefix = shlex.split(server_environment.get(COMMAND_VARIABLE, ""))
    if prefix:
        return [*prefix, *arguments], server_environment
    installed = _installed_server(server_environment.get("PATH", ""))
    if installed is not None:
        if sys.prefix != sys.base_prefix:  # a virtual environment: the stub must find the packages that are in it
            _put_in_front(server_environment, "PATH", [Path(sys.executable).parent])
        return [str(installed), *arguments], server_environment
    return _packaged_command(arguments, server_environment)


def completion_options(repository: Path, arguments: Sequence[str] = ()) -> list[str]:
    """Return the option with which tritonserver takes each config.pbtxt as it is, if all models are LightLLM's own.

    Else it would start a stub of each model, which imports all that the model needs, only to ask what is missing.
    arguments: the user's own, which may name another repository.
    """
    models = {path.name for path in repository.iterdir() if path.is_dir()}
    has_others = any(argument.startswith(("--model-repository", "--model-store")) for argument in arguments)
    return [] if has_others or models - MODELS else ["--disable-auto-complete-config"]


def write_wrapper() -> Path:
    """Write a script `tritonserver` into this virtual environment that runs this module."""
    wrapper = Path(sys.executable).parent / "tritonserver"
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m {MODULE} "$@"\n')
    wrapper.chmod(0o755)
    return wrapper


def _installed_server(search_path: str) -> Path | None:
    """A tritonserver that is neither our wrapper nor part of nvidia-pytriton, such as that of NVIDIA's container."""
    for directory in [*search_path.split(os.pathsep), CONTAINER_BINARIES]:
        candidate = Path(directory or ".", "tritonserver")
        if candidate.is_file() and os.access(candidate, os.X_OK) and not _is_wrapper(candidate):
            return candidate
    return None


def _is_wrapper(script: Path) -> bool:
    with script.open("rb") as file:
        return MODULE.encode() in file.read(4096)


def _packaged_command(arguments: Sequence[str], environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    specification = importlib.util.find_spec("pytriton")
    if specification is None or specification.origin is None:
        raise TritonServerError(
            f"there is no tritonserver on PATH or in {CONTAINER_BINARIES}, and the package nvidia-pytriton is not"
            f" installed for {sys.executable}; run ./build.sh, use NVIDIA's container, or set {COMMAND_VARIABLE}"
        )
    numpy_version = importlib.metadata.version("numpy")
    if not numpy_version.startswith("1."):
        raise TritonServerError(
            f"numpy {numpy_version} is installed for {sys.executable}, but the server of nvidia-pytriton passes"
            f" garbage to models under numpy 2; allowed: numpy < 2 (or set {COMMAND_VARIABLE} to another server)"
        )
    package = Path(specification.origin).parent
    libraries = [package.parent / "nvidia_pytriton.libs", libpython_directory()]
    _put_in_front(environment, "LD_LIBRARY_PATH", libraries)
    _put_in_front(environment, "PATH", [Path(sys.executable).parent])
    argv = [str(package / "tritonserver" / "bin" / "tritonserver")]
    if not any(argument.split("=")[0] == "--backend-directory" for argument in arguments):
        argv.append(f"--backend-directory={_backend_directory(package / 'tritonserver')}")
    return [*argv, *arguments], environment


def _put_in_front(environment: dict[str, str], variable: str, directories: Sequence[Path]) -> None:
    front = [str(directory) for directory in directories]
    behind = [part for part in environment.get(variable, "").split(os.pathsep) if part and part not in front]
    environment[variable] = os.pathsep.join([*front, *behind])


def libpython_directory() -> Path:
    """The directory of this interpreter's shared library, to which the stub is linked."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    for directory in _library_directories():
        if (directory / name).exists():
            return directory
    raise TritonServerError(
        f"{name}, the shared library of {sys.executable}, is not to be found, and the Python backend of tritonserver"
        f" needs it; on Debian and Ubuntu: apt-get install {name.removesuffix('.so.1.0')}"
    )


def _library_directories() -> Iterator[Path]:
    library_directory = sysconfig.get_config_var("LIBDIR")
    if library_directory:
        yield Path(library_directory)
        yield Path(library_directory, sysconfig.get_config_var("MULTIARCH") or "")
    yield Path(sys.base_prefix, "lib")


def _backend_directory(server: Path) -> Path:
    """The Python backend with the stub of this interpreter's version, as links into the package.

    Every start renews it, link by link, so that it follows an upgraded package and two servers may start at once.
    """
    stub = server / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}" / STUB
    if not stub.exists():
        raise TritonServerError(f"nvidia-pytriton has no {STUB} for Python {sys.version}; expected {stub}")
    backends = Path(sys.prefix, "share", "lightllm", "backends")
    python_backend = backends / "python"
    python_backend.mkdir(parents=True, exist_ok=True)
    for target in [*(path for path in (server / "backends" / "python").iterdir() if path.is_file()), stub]:
        _link(python_backend / target.name, target)
    return backends


def _link(link: Path, target: Path) -> None:
    if link.is_symlink() and link.readlink() == target:
        return
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.symlink_to(target)
    fresh.replace(link)


def main() -> None:
    try:
        argv, environment = command(sys.argv[1:])
    except TritonServerError as error:
        sys.exit(f"tritonserver: {error}")
    os.execvpe(argv[0], argv, environment)


if __name__ == "__main__":
    main()
