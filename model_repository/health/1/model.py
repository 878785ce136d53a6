# SPDX-License-Identifier: Apache-2.0
"""The health model: answers "ready", or UNAVAILABLE with the reason, from the vitals of the other processes."""

from lightllm_backend.launch.health import why_unready
from lightllm_backend.messages.run_directory import run_directory
from lightllm_backend.messages.vitals import Vitals
from lightllm_backend.request import RequestError
from lightllm_backend.triton_server.responses import error_response, health_response
from lightllm_backend.triton_server.setup import starting


class TritonPythonModel:
    def initialize(self, args):  # noqa: ARG002, as Triton server calls it
        with starting():
            self.run_directory = run_directory()
            self.vitals = Vitals(self.run_directory, "health")

    def execute(self, requests):
        with self.vitals.working():
            return [self.report() for _ in requests]

    def report(self):
        reason = why_unready(self.run_directory)
        if reason:
            return error_response(RequestError("UNAVAILABLE", reason))
        return health_response("ready")

    def finalize(self):
        self.vitals.close()
