# SPDX-License-Identifier: Apache-2.0
"""The tokenizer step: text and parameters in, token ids and checked parameters out."""

from lightllm_backend.messages.run_directory import leave_run_directory, run_directory
from lightllm_backend.messages.vitals import Vitals
from lightllm_backend.text.prompt import encode_prompt
from lightllm_backend.triton_server import triton_io


class TritonPythonModel:
    def initialize(self, args):
        with triton_io.starting():
            self.config = triton_io.engine_config(args)
            self.tokenizer = triton_io.load_tokenizer(self.config)
            triton_io.warn_of_tokens_past_model(self.tokenizer)
            self.metrics = triton_io.metrics(with_engine=False)
            self.vitals = Vitals(run_directory(), "tokenizer")

    def execute(self, requests):
        with self.vitals.working():
            return [self.encode(request) for request in requests]

    def encode(self, request):
        try:
            deadline = triton_io.deadline(request)
            parsed = triton_io.read_request(request)
            prompt = encode_prompt(parsed, self.tokenizer, self.config.max_prompt_bytes)
        except Exception as error:
            self.metrics.rejected()
            return triton_io.error_response(error)
        ensemble = {"prompt_text": prompt.echo, "deadline": deadline}
        return triton_io.tokens_response(prompt.token_ids, parsed.options.to_json(), ensemble)

    def finalize(self):
        self.metrics.close()
        self.vitals.close()
        leave_run_directory()
