# SPDX-License-Identifier: Apache-2.0
"""Every module imports only what the rules in layers.py allow, and no import circle exists."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.layers import ALLOWED, ALLOWED_PACKAGES, SHARED_RULES, WITHOUT_TORCH

ROOT = Path(__file__).parent.parent
PACKAGE = "lightllm_backend"

OUTSIDE_THE_PACKAGE = ("lightllm_client", "examples", "model_repository", "perf", "tests")

# The client is a package of its own: what each of its modules may import besides itself and the standard library.
CLIENT = "lightllm_client"
CLIENT_PACKAGES = ("grpc", "numpy", "tritonclient")
CLIENT_EXTRAS = {"chat": ("jinja2",), "template_sandbox": ("jinja2",)}

# Requirements that are imported by another name than their own, and what needs none.
IMPORT_NAMES = {"grpcio": "grpc", "protobuf": "google"}
# pydantic_core is a part of pydantic, which pins it; opentelemetry is the extra "tracing" of pyproject.toml.
WITHOUT_REQUIREMENT = {
    PACKAGE,
    CLIENT,
    "triton_python_backend_utils",
    "pydantic_core",
    "opentelemetry",
    *sys.stdlib_module_names,
}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, package: str, for_type_checkers: bool = False) -> Iterator[str]:
    """The full name of every import, by default but those for type checkers; of `from a import b` it is `a.b`."""
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        is_for_type_checkers = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if isinstance(node, ast.If) and is_for_type_checkers and not for_type_checkers:
            pending.extend(node.orelse)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        else:
            pending.extend(ast.iter_child_nodes(node))


@cache
def modules(for_type_checkers: bool = False) -> dict[str, list[str]]:
    """Every module of the package (its name without the package's) and what it imports."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = module_name(path, ROOT)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name.removeprefix(PACKAGE).removeprefix(".")] = list(
            imports(path.read_text(), package, for_type_checkers)
        )
    return found


def is_in(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.")


def layer_of(module: str, layers: dict[str, tuple[str, ...]]) -> str | None:
    return max((layer for layer in layers if is_in(module, layer)), key=len, default=None)


def without_rule(names: Iterable[str]) -> list[str]:
    """The modules that have no rule of their own and lie in no folder whose modules share one."""
    ruled = [name for name in names if name in ALLOWED or any(is_in(name, folder) for folder in SHARED_RULES)]
    return [name for name in names if name and name not in ruled]


def layer_violations(module: str, imported: list[str]) -> list[str]:
    layer = layer_of(module, ALLOWED)
    if layer is None:  # a module without a rule is for `without_rule` to report
        return []
    inside = [name.removeprefix(f"{PACKAGE}.") for name in imported if name.startswith(f"{PACKAGE}.")]
    return [name for name in inside if not any(is_in(name, allowed) for allowed in (layer, *ALLOWED[layer]))]


def package_violations(module: str, imported: list[str]) -> list[str]:
    layer = layer_of(module, ALLOWED_PACKAGES)
    if layer is None:
        return []
    allowed = {*sys.stdlib_module_names, *ALLOWED_PACKAGES[layer], PACKAGE}
    return [name for name in imported if name.partition(".")[0] not in allowed]


def circles(imported: dict[str, list[str]]) -> list[list[str]]:
    """The groups of modules that import each other, directly or through others."""
    graph = {
        module: {
            found
            for name in names
            if (found := layer_of(name.removeprefix(f"{PACKAGE}."), dict.fromkeys(imported, ()))) not in (None, module)
        }
        for module, names in imported.items()
    }

    def reachable(module: str) -> set[str]:
        seen: set[str] = set()
        pending = [*graph[module]]
        while pending:
            if (other := pending.pop()) not in seen:
                seen.add(other)
                pending.extend(graph[other])
        return seen

    everywhere = {module: reachable(module) for module in graph}
    groups = {
        tuple(sorted(other for other in everywhere if other in seen and module in everywhere[other]))
        for module, seen in everywhere.items()
        if module in seen
    }
    return [list(group) for group in sorted(groups)]


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
    assert set(imports(source, "p.q", for_type_checkers=True)) - set(imports(source, "p.q")) == {"h"}


def test_a_circle_is_found() -> None:
    names = {"a": ["b.c.d"], "b.c": ["torch", "e"], "e": ["a.Name"], "f": ["a", "g"], "g": []}
    assert circles({module: [f"{PACKAGE}.{name}" for name in imported] for module, imported in names.items()}) == [
        ["a", "b.c", "e"]
    ]


def test_no_modules_import_each_other() -> None:
    """Also not for type checkers alone."""
    assert circles(modules(for_type_checkers=True)) == []


def test_no_folders_import_each_other() -> None:
    """So that a newcomer can read the folders one after the other."""
    folders: dict[str, list[str]] = {}
    for module, names in modules(for_type_checkers=True).items():
        parts = [name.split(".") for name in names if name.startswith(f"{PACKAGE}.")]
        folders.setdefault(module.partition(".")[0], []).extend(f"{PACKAGE}.{name[1]}" for name in parts)
    assert circles(folders) == []


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


def test_a_module_without_a_rule_is_found() -> None:
    assert without_rule(["router", "router.router", "router.new", "kernels.new", "text_new", ""]) == [
        "router.new",
        "text_new",
    ]


def test_every_module_has_a_rule() -> None:
    assert without_rule(modules()) == []


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
    """The front is a client of the ensemble."""
    found = [
        (module, name)
        for module, imported in modules().items()
        for name in imported
        if name.partition(".")[0] in OUTSIDE_THE_PACKAGE and not (is_in(module, "front") and is_in(name, CLIENT))
    ]
    assert found == []


def test_the_client_imports_only_itself_and_what_it_requires() -> None:
    paths = sorted((ROOT / "client" / CLIENT).glob("*.py"))
    assert paths
    for path in paths:
        allowed = {*sys.stdlib_module_names, CLIENT, *CLIENT_PACKAGES, *CLIENT_EXTRAS.get(path.stem, ())}
        assert {name.partition(".")[0] for name in imports(path.read_text(), CLIENT)} <= allowed, path


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


@pytest.fixture(scope="module")
def heavy_packages() -> dict[str, list[str]]:
    """By module, those that its import has loaded which the modules before it have not."""
    program = f"""
import importlib, json, sys
loaded = {{}}
for module in {WITHOUT_TORCH!r}:
    before = set(sys.modules)
    importlib.import_module(f"{PACKAGE}.{{module}}")
    loaded[module] = sorted({{"torch", "transformers", "triton"}} & (set(sys.modules) - before))
print(json.dumps(loaded))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    loaded: dict[str, list[str]] = json.loads(run.stdout)
    return loaded


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_importing_it_does_not_load_torch(heavy_packages: dict[str, list[str]], module: str) -> None:
    assert heavy_packages[module] == []
