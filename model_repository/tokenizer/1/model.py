# SPDX-License-Identifier: Apache-2.0
"""The tokenizer step: turns text and parameters into token ids and checked parameters."""

from lightllm_backend.messages.ensemble_messages import EnsembleContext
from lightllm_backend.messages.run_directory import run_directory
from lightllm_backend.messages.seal import Purpose, Seal
from lightllm_backend.messages.vitals import Vitals
from lightllm_backend.triton_server.entrance import Entrance
from lightllm_backend.triton_server.responses import tokens_response
from lightllm_backend.triton_server.setup import (
    engine_config,
    known_lengths,
    load_tokenizer,
    make_telemetry,
    starting,
    warn_of_tokens_past_model,
)


class TritonPythonModel:
    def initialize(self, args):
        with starting():
            config = engine_config(args)
            tokenizer = load_tokenizer(config)
            warn_of_tokens_past_model(tokenizer)
            self.telemetry = make_telemetry(config, with_engine=False)
            self.entrance = Entrance(
                config, tokenizer, known_lengths(config), self.telemetry, run_directory(), self.pass_on
            )
            self.vitals = Vitals(run_directory(), "tokenizer")
            self.seal = Seal.of(run_directory(), Purpose.TOKENS)

    def execute(self, requests):
        with self.vitals.working():
            return [self.entrance.take(request) for request in requests]

    def pass_on(self, entered):
        ticket = self.entrance.door.ticket()
        context = EnsembleContext(entered.parsed.options, entered.prompt.echo, entered.deadline, ticket)
        return tokens_response(entered.prompt.token_ids, context, self.seal)

    def finalize(self):
        self.entrance.close()
        self.telemetry.close()
        self.vitals.close()
