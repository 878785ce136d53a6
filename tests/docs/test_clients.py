# SPDX-License-Identifier: Apache-2.0
"""docs/clients.md and the lists of packages that the tests try."""

import pytest

from tests.clients.environments import FOLDER
from tests.clients.page import requirements, rows

TRIED = {name: requirements(name) for name in ("clients", "benchmarks")}


def test_the_page_has_the_versions_that_are_tried() -> None:
    named = {name.partition("]")[0].strip("["): version for name, version, *_ in rows()}
    tried = TRIED["clients"] | TRIED["benchmarks"]
    assert named.items() >= {name: version for name, version in tried.items() if name != "transformers"}.items()
    assert named.keys() - tried.keys() == {"curl", "Triton server's OpenAI frontend"}


@pytest.mark.parametrize("name", TRIED)
def test_what_is_asked_for_is_locked(name: str) -> None:
    locked = (FOLDER / f"{name}.txt").read_text().splitlines()
    assert {f"{package}=={version}" for package, version in TRIED[name].items()} <= set(locked)
