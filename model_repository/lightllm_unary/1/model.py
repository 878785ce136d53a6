# SPDX-License-Identifier: Apache-2.0
"""The model for unary calls: encodes, submits to the ensemble's engine and decodes; one response per request."""

from lightllm_backend.generation.engine_client import EngineClient
from lightllm_backend.generation.streams import Streams
from lightllm_backend.messages.run_directory import engine_address, run_directory
from lightllm_backend.messages.vitals import Vitals
from lightllm_backend.text.prompt import encode_prompt
from lightllm_backend.text.response import DecodeState, ResponseDecoder
from lightllm_backend.text.text_stream import TextStream
from lightllm_backend.triton_server.requests import is_probe, read_deadline, read_request
from lightllm_backend.triton_server.responses import ServerSender, UnaryResponder, error_response
from lightllm_backend.triton_server.setup import engine_config, load_tokenizer, make_metrics, starting


class TritonPythonModel:
    def initialize(self, args):
        with starting():
            self.config = engine_config(args)
            self.tokenizer = load_tokenizer(self.config)
            self.metrics = make_metrics(with_engine=False)
            self.engine = EngineClient(engine_address(run_directory()))
            self.streams = Streams(self.engine, self.metrics)
            self.vitals = Vitals(run_directory(), "lightllm_unary", count_open=self.streams.count_open)

    def execute(self, requests):
        for request in requests:
            with self.vitals.working():
                self.answer(request)

    def answer(self, request):
        try:
            self.submit(request)
        except Exception as error:
            self.metrics.rejected()
            ServerSender(request).send(error_response(error), final=True)

    def submit(self, request):
        deadline = read_deadline(request)
        parsed = read_request(request).without_streaming()
        prompt = encode_prompt(parsed, self.tokenizer, self.config.max_prompt_bytes)
        text = TextStream.of(self.tokenizer, parsed.options, prompt.token_ids)
        state = DecodeState.of(parsed.options, self.engine.wait_ready(timeout=0).eos_ids, prompt.echo, text)
        decoder = ResponseDecoder(self.tokenizer, state)
        responder = UnaryResponder(request, decoder.decode, self.tokenizer)
        self.streams.submit(
            prompt.token_ids,
            parsed.options,
            deadline,
            lambda uid: responder,
            flow_control=False,
            text=text,
            urgent=is_probe(request),
        )

    def finalize(self):
        self.engine.close()  # this ends all requests
        self.streams.close()
        self.metrics.close()
        self.vitals.close()
