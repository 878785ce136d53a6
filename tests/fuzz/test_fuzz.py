# SPDX-License-Identifier: Apache-2.0
"""The same inputs for each parser in every run; `python -m tests.fuzz` draws as many others as one likes."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.coverage_guided import checker, kept_inputs
from tests.fuzz.targets import TARGETS

CASES = 60


@pytest.mark.parametrize("name", TARGETS)
def test_bad_input_is_a_clear_error(name: str) -> None:
    target = TARGETS[name]
    bounded = settings(
        max_examples=CASES // target.cases_each,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    bounded(given(target.inputs)(target.check))()


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_that_atheris_has_chosen(name: str) -> None:
    check = checker(TARGETS[name])
    for data in kept_inputs(name):
        check(data)
