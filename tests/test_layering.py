# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: the package's layers, and the modules that run where torch must not be loaded."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PACKAGE = "lightllm_backend"

# A layer, and the modules of the package that it may import besides itself. The longest matching layer decides.
ALLOWED = {
    "request": (),
    "config": (),
    "kernels": (),
    "models": ("kernels", "parallel"),
    "runner": ("models", "kernels", "kv_pool.storage", "router.batch", "parallel", "request"),
    "router": ("kv_pool.allocator", "request", "config"),
    "kv_pool.allocator": (),
    "kv_pool.storage": (),
    "parallel": ("kernels.mailboxes",),
    "messages": ("request", "lengths", "router.statistics"),
    "generation": (
        "config",
        "messages",
        "options",
        "request",
        "router.statistics",
        "text.text_stream",
        "triton_server.executable",
    ),
    "worker": (
        "config",
        "kernels",
        "kv_pool.storage",
        "launch.embedded_model",
        "lengths",
        "messages",
        "models",
        "parallel",
        "request",
        "router",
        "runner",
    ),
    "triton_server": (
        "config",
        "generation.worker_group",
        "launch.embedded_model",
        "messages",
        "models.errors",
        "option_table",
        "options",
        "request",
        "router.statistics",
        "text",
    ),
    "triton_server.executable": (),
}

# A layer, and the packages that it may import besides the standard library.
ALLOWED_PACKAGES = {
    "request": (),
    "config": (),
    "triton_server.executable": (),
    "kernels": ("torch", "triton"),
    "router": ("numpy",),
    "kv_pool.allocator": ("numpy",),
}

# These run in Triton server's processes, or decide without knowing tensors.
WITHOUT_TORCH = (
    "config",
    "worker.batch_channel",
    "messages.channel",
    "messages.engine_messages",
    "messages.return_messages",
    "messages.run_directory",
    "generation.engine_client",
    "kv_pool.allocator",
    "request",
    "router.admission",
    "router.batch",
    "router.router",
    "router.sequence",
    "router.statistics",
    "serve",
    "worker.loop",
    "worker.server",
    "worker.statistics_log",
    "messages.return_channel",
    "generation.stream",
    "generation.streams",
    "generation.token_times",
    "generation.supervisor",
    "generation.worker_group",
    "triton_server.metrics",
    "triton_server.model_configs",
    "text.model_tokenizer",
    "option_table",
    "options",
    "text.prompt",
    "text.response",
    "triton_server.tensors",
    "text.text_stream",
    "text.incremental_decoding",
    "text.tokenizer",
    "triton_server.setup",
    "triton_server.requests",
    "triton_server.responses",
    "messages.ensemble_messages",
    "triton_server.executable",
)

OUTSIDE_THE_PACKAGE = ("client", "model_repository", "perf", "tests")

# Requirements that are imported by another name than their own, and what needs none.
IMPORT_NAMES = {"grpcio": "grpc", "protobuf": "google"}
WITHOUT_REQUIREMENT = {PACKAGE, "client", "triton_python_backend_utils", *sys.stdlib_module_names}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, package: str) -> Iterator[str]:
    """The full name of every import but those for type checkers; of `from a import b` it is `a.b`."""
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            pending.extend(node.orelse)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        else:
            pending.extend(ast.iter_child_nodes(node))


def modules() -> dict[str, list[str]]:
    """Every module of the package (its name without the package's) and what it imports."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = module_name(path, ROOT)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name.removeprefix(PACKAGE).removeprefix(".")] = list(imports(path.read_text(), package))
    return found


def is_in(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.")


def layer_of(module: str, layers: dict[str, tuple[str, ...]]) -> str | None:
    return max((layer for layer in layers if is_in(module, layer)), key=len, default=None)


def layer_violations(module: str, imported: list[str]) -> list[str]:
    layer = layer_of(module, ALLOWED)
    if layer is None:
        return []
    inside = [name.removeprefix(f"{PACKAGE}.") for name in imported if name.startswith(f"{PACKAGE}.")]
    return [name for name in inside if not any(is_in(name, allowed) for allowed in (layer, *ALLOWED[layer]))]


def package_violations(module: str, imported: list[str]) -> list[str]:
    layer = layer_of(module, ALLOWED_PACKAGES)
    if layer is None:
        return []
    allowed = {*sys.stdlib_module_names, *ALLOWED_PACKAGES[layer], PACKAGE}
    return [name for name in imported if name.partition(".")[0] not in allowed]


def test_the_reader_of_imports_sees_every_kind_but_those_for_type_checkers() -> None:
    source = """
import os.path
from a.b import c as d
from . import e
from ..f import g
def later():
    import torch
if TYPE_CHECKING:
    import h
else:
    import i
"""
    assert sorted(imports(source, "p.q")) == ["a.b.c", "i", "os.path", "p.f.g", "p.q.e", "torch"]


def test_a_forbidden_import_is_found() -> None:
    assert layer_violations("router.router", [f"{PACKAGE}.runner.sampler.Sampler", f"{PACKAGE}.request.Request"]) == [
        "runner.sampler.Sampler"
    ]
    assert layer_violations("runner.sampler", [f"{PACKAGE}.router.router.Router"]) == ["router.router.Router"]
    assert layer_violations("kv_pool.allocator", [f"{PACKAGE}.kv_pool.storage"]) == ["kv_pool.storage"]
    assert package_violations("request", ["numpy", "dataclasses.dataclass"]) == ["numpy"]
    assert package_violations("router.batch", ["numpy.typing.NDArray", "torch.Tensor"]) == ["torch.Tensor"]


def test_every_layer_exists() -> None:
    present = modules()
    layers = {*ALLOWED, *ALLOWED_PACKAGES, *(allowed for values in ALLOWED.values() for allowed in values)}
    assert [layer for layer in sorted(layers) if not any(is_in(module, layer) for module in present)] == []


def test_a_layer_imports_only_the_layers_below_it() -> None:
    found = {module: layer_violations(module, imported) for module, imported in modules().items()}
    assert {module: names for module, names in found.items() if names} == {}


def test_a_layer_imports_only_its_packages() -> None:
    found = {module: package_violations(module, imported) for module, imported in modules().items()}
    assert {module: names for module, names in found.items() if names} == {}


def test_the_router_and_the_runner_meet_only_in_the_worker() -> None:
    meeting = []
    for module, imported in modules().items():
        names = [name.removeprefix(f"{PACKAGE}.") for name in imported if name.startswith(f"{PACKAGE}.")]
        router = any(is_in(name, "router.router") for name in names)
        if router and any(is_in(name, "runner") for name in names):
            meeting.append(module)
    assert set(meeting) <= {"worker.main", "worker.loop"}


def test_the_package_imports_nothing_that_is_built_on_it() -> None:
    found = [
        (module, name)
        for module, imported in modules().items()
        for name in imported
        if name.partition(".")[0] in OUTSIDE_THE_PACKAGE
    ]
    assert found == []


@pytest.mark.parametrize("folder", [PACKAGE, "client", "model_repository"])
def test_the_packages_that_are_imported_are_required(folder: str) -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = {Requirement(line).name for line in lines if line and not line.startswith("#")}
    known = {IMPORT_NAMES.get(name, name) for name in names} | WITHOUT_REQUIREMENT
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    missing = {
        (str(path.relative_to(ROOT)), name)
        for path in paths
        for name in imports(path.read_text(), module_name(path.parent, ROOT))
        if name.partition(".")[0] not in known
    }
    assert missing == set()


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_importing_it_does_not_load_torch(module: str) -> None:
    program = f"import sys, {PACKAGE}.{module}; print(sorted({{'torch', 'transformers', 'triton'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr
