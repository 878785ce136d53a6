# SPDX-License-Identifier: Apache-2.0
"""Health: answers "ready", or UNAVAILABLE with what is wrong. It looks at the other processes and asks none of them."""

from lightllm_backend.launch.health import why_unready
from lightllm_backend.messages.run_directory import run_directory
from lightllm_backend.request import RequestError
from lightllm_backend.triton_server import triton_io


class TritonPythonModel:
    def initialize(self, args):  # noqa: ARG002, as Triton server calls it
        with triton_io.starting():
            self.run_directory = run_directory()

    def execute(self, requests):
        return [self.report() for _ in requests]

    def report(self):
        reason = why_unready(self.run_directory)
        if reason:
            return triton_io.error_response(RequestError("UNAVAILABLE", reason))
        return triton_io.health_response("ready")
