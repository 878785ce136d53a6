# SPDX-License-Identifier: Apache-2.0
"""The Router as a state machine: hypothesis chooses what happens, and router_world.py says what must hold.

A longer search than CI's, some thousand worlds:

    ROUTER_MACHINE_EXAMPLES=5000 python -m pytest -q tests/router/test_router_machine.py
"""

from __future__ import annotations

import os
from pathlib import Path

from click.testing import CliRunner
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.router import router_world
from tests.router.router_world import GROUPS, POLICIES, TENANTS, Conditions, World, make_request

conditions = st.builds(
    Conditions,
    recompute_at=st.none() | st.integers(2, 20),
    capacity=st.integers(20, 80),
    max_running=st.integers(1, 5),
    batch_max_tokens=st.integers(1, 30),
    max_queue_size=st.integers(1, 6),
    depth=st.integers(0, 2),
    policy=st.sampled_from(list(POLICIES)),
    prefix_cache=st.sampled_from([True, "tenant", False]),
    tenant_reserve=st.sampled_from([0.0, 0.3]),
    queue_timeout_s=st.sampled_from([None, 5.0]),
    groups=st.sampled_from(GROUPS),
)


class RouterMachine(RuleBasedStateMachine):
    world: World
    number = 0

    @initialize(given=conditions)
    def begin(self, given: Conditions) -> None:
        self.world = World(given)

    @rule(
        family=st.integers(0, 1),
        prompt_length=st.integers(1, 20),
        max_tokens=st.integers(1, 9),
        tenant=st.sampled_from(TENANTS),
        priority=st.sampled_from([0, 0, -1, 3]),
        deadline=st.none() | st.integers(1, 9),
        urgent=st.integers(0, 9).map(lambda value: value == 9),
        ignore_eos=st.booleans(),
        min_tokens=st.integers(0, 2),
        return_log_probs=st.booleans(),
        n=st.sampled_from([1, 1, 3]),
        copies=st.integers(1, 3),
    )
    def submit(self, deadline: int | None, copies: int, **request: object) -> None:
        for _ in range(copies):
            self.number += 1
            at = None if deadline is None else self.world.now + deadline
            self.world.submit(make_request(self.number, deadline=at, **request))  # type: ignore[arg-type]

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.world.step()

    @precondition(lambda self: self.world.live)
    @rule(choice=st.randoms(use_true_random=False), stops=st.booleans())
    def break_off(self, choice, stops: bool) -> None:
        uid = choice.choice(list(self.world.live))
        (self.world.stop if stops else self.world.cancel)(uid)

    @rule(seconds=st.integers(1, 8))
    def wait(self, seconds: int) -> None:
        self.world.wait(seconds)

    @precondition(lambda self: self.world.live and self.number > 6)
    @rule()
    def fail(self) -> None:
        self.world.fail()

    @precondition(lambda self: self.world.live and self.number > 9)
    @rule()
    def close(self) -> None:
        self.world.close()

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "world"):
            self.world.router.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish()


RouterMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("ROUTER_MACHINE_EXAMPLES", "100")),
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestRouterMachine = RouterMachine.TestCase


def test_the_command_that_lives_long_counts_its_steps(tmp_path: Path) -> None:
    out = tmp_path / "router_world.json"
    run = CliRunner().invoke(router_world.main, ["--steps", "1500", "--seed", "3", "--out", str(out)])
    assert run.exit_code == 0, run.output
    assert "no broken invariant" in run.output
