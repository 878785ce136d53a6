# SPDX-License-Identifier: Apache-2.0
"""The entry for unary calls: encodes, submits to the same engine as the ensemble, decodes; one response a request."""

from lightllm_backend.generation.engine_client import EngineClient
from lightllm_backend.generation.streams import Streams
from lightllm_backend.messages.run_directory import leave_run_directory, run_directory
from lightllm_backend.messages.vitals import Vitals
from lightllm_backend.text.prompt import encode_prompt
from lightllm_backend.text.response import DecodeState, ResponseDecoder
from lightllm_backend.text.text_stream import TextStream
from lightllm_backend.triton_server import triton_io


class TritonPythonModel:
    def initialize(self, args):
        with triton_io.starting():
            self.config = triton_io.engine_config(args)
            self.tokenizer = triton_io.load_tokenizer(self.config)
            self.metrics = triton_io.metrics(with_engine=False)
            self.engine = EngineClient(str(run_directory() / "engine"))
            self.streams = Streams(self.engine, self.metrics)
            self.vitals = Vitals(run_directory(), "lightllm_unary")

    def execute(self, requests):
        for request in requests:
            with self.vitals.working():
                self.answer(request)

    def answer(self, request):
        try:
            self.submit(request)
        except Exception as error:
            self.metrics.rejected()
            triton_io.ServerSender(request).send(triton_io.error_response(error), final=True)

    def submit(self, request):
        deadline = triton_io.deadline(request)
        parsed = triton_io.read_request(request).without_streaming()
        prompt = encode_prompt(parsed, self.tokenizer, self.config.max_prompt_bytes)
        text = TextStream.of(self.tokenizer, parsed.options, prompt.token_ids)
        state = DecodeState.of(parsed.options, self.engine.wait_ready(timeout=0).eos_ids, prompt.echo, text)
        decoder = ResponseDecoder(self.tokenizer, state)
        responder = triton_io.UnaryResponder(request, decoder.decode, self.tokenizer)
        self.streams.submit(
            prompt.token_ids, parsed.options, deadline, lambda uid: responder,
            flow_control=False, text=text, urgent=triton_io.is_probe(request),
        )  # fmt: skip

    def finalize(self):
        self.engine.close()  # which ends all requests
        self.streams.close()
        self.metrics.close()
        self.vitals.close()
        leave_run_directory()
