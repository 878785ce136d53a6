# SPDX-License-Identifier: Apache-2.0
"""The tokenizer step: turns text and parameters into token ids and checked parameters."""

from lightllm_backend.messages.ensemble_messages import EnsembleContext
from lightllm_backend.messages.run_directory import run_directory
from lightllm_backend.messages.vitals import Vitals
from lightllm_backend.text.prompt import encode_prompt
from lightllm_backend.triton_server.requests import read_deadline, read_request
from lightllm_backend.triton_server.responses import error_response, tokens_response
from lightllm_backend.triton_server.setup import (
    engine_config,
    load_tokenizer,
    make_metrics,
    starting,
    warn_of_tokens_past_model,
)


class TritonPythonModel:
    def initialize(self, args):
        with starting():
            self.config = engine_config(args)
            self.tokenizer = load_tokenizer(self.config)
            warn_of_tokens_past_model(self.tokenizer)
            self.metrics = make_metrics(with_engine=False)
            self.vitals = Vitals(run_directory(), "tokenizer")

    def execute(self, requests):
        with self.vitals.working():
            return [self.encode(request) for request in requests]

    def encode(self, request):
        try:
            deadline = read_deadline(request)
            parsed = read_request(request)
            prompt = encode_prompt(parsed, self.tokenizer, self.config.max_prompt_bytes)
        except Exception as error:
            self.metrics.rejected()
            return error_response(error)
        context = EnsembleContext(prompt.echo, deadline)
        return tokens_response(prompt.token_ids, parsed.options.to_json(), context)

    def finalize(self):
        self.metrics.close()
        self.vitals.close()
