# SPDX-License-Identifier: Apache-2.0
"""Runs a chat template, which is foreign code, in a sandbox with limits of time and size.

jinja2's sandbox keeps a template from Python's internals and from changing what it is given. It would let a template
loop for hours and fill the memory; this one does not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sized
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment

# A template renders in milliseconds, also for a thousand messages.
MAX_SECONDS = 10.0
# The limit for a prompt, in characters, and for each text or list on the way to it; the server refuses more than 1 MiB.
MAX_SIZE = 2**24
# The limit for a power, in bits: larger ones take minutes to compute.
MAX_BITS = 2**16


class TemplateLimitError(TemplateError):
    """The template takes too long, or makes something too large."""


class _LimitedCode(CodeGenerator):
    """Compiles `~` and filters so that their results are checked."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self._checked(super().visit_Concat, node, frame)

    def visit_Filter(self, node: nodes.Filter, frame: Frame) -> None:  # noqa: N802
        self._checked(super().visit_Filter, node, frame)

    def _checked(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.check_size(")
        visit(node, frame)
        self.write(")")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that ends a template at its limits: in loops, macros, calls, filters and operators."""

    code_generator_class = _LimitedCode
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(optimized=False, **options)  # nothing is computed before the clock runs
        self._rendering = threading.local()

    def render(self, template: Template, values: dict[str, Any]) -> str:
        """Render a template of this environment; raise TemplateLimitError at a limit."""
        self._rendering.end = time.monotonic() + MAX_SECONDS
        pieces, size = list[str](), 0
        for piece in template.generate(values):
            size += len(piece)
            _refuse_above(MAX_SIZE, size)
            self.check_time()
            pieces.append(piece)
        return "".join(pieces)

    def check_time(self) -> None:
        """Raise TemplateLimitError after MAX_SECONDS."""
        if time.monotonic() > self._rendering.end:
            raise TemplateLimitError(f"it takes more than {MAX_SECONDS:g} s")

    def check_size(self, value: Any) -> Any:
        """Return the value; raise TemplateLimitError if it is a text or a collection of more than MAX_SIZE."""
        self.check_time()
        if isinstance(value, Sized):
            _refuse_above(MAX_SIZE, len(value))
        return value

    def call(self, *arguments: Any, **named: Any) -> Any:
        self.check_time()
        return self.check_size(super().call(*arguments, **named))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for one, other in ((left, right), (right, left)):
            if operator == "*" and isinstance(one, Sized) and isinstance(other, int):
                _refuse_above(MAX_SIZE, len(one) * other)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _refuse_above(MAX_BITS, left.bit_length() * right)
        return self.check_size(super().call_binop(context, operator, left, right))

    def _generate(self, source: nodes.Template, *arguments: Any, **named: Any) -> str:
        """Compile with a check of the time at the beginning of each loop's and each macro's body."""
        bodies = [loop.body for loop in source.find_all(nodes.For)]
        bodies += [macro.body for macro in source.find_all(nodes.Macro)]
        for body in bodies:
            check = nodes.Call(nodes.EnvironmentAttribute("check_time"), [], [], None, None)
            body.insert(0, nodes.ExprStmt(check))
        return super()._generate(source, *arguments, **named)


def _refuse_above(most: int, size: int) -> None:
    if size > most:
        raise TemplateLimitError(f"it makes something of size {size}; allowed: at most {most}")
