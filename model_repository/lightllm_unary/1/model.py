# SPDX-License-Identifier: Apache-2.0
"""The model for unary calls: encodes, submits to the ensemble's engine and decodes; one response per request."""

from lightllm_backend.generation.engine_client import EngineClient
from lightllm_backend.generation.streams import Streams
from lightllm_backend.messages.run_directory import engine_address, run_directory
from lightllm_backend.messages.vitals import Vitals
from lightllm_backend.text.response import DecodeState, ResponseDecoder
from lightllm_backend.text.text_stream import TextStream
from lightllm_backend.triton_server.entrance import Entrance
from lightllm_backend.triton_server.requests import is_probe
from lightllm_backend.triton_server.responses import UnaryResponder
from lightllm_backend.triton_server.setup import engine_config, known_lengths, load_tokenizer, make_metrics, starting


class TritonPythonModel:
    def initialize(self, args):
        with starting():
            config = engine_config(args)
            self.tokenizer = load_tokenizer(config)
            self.metrics = make_metrics(with_engine=False)
            self.engine = EngineClient(engine_address(run_directory()))
            self.streams = Streams(self.engine, self.metrics)
            self.entrance = Entrance(
                config, self.tokenizer, known_lengths(config), self.metrics, run_directory(), self.submit
            )
            self.vitals = Vitals(run_directory(), "lightllm_unary", count_open=self.streams.count_open)

    def execute(self, requests):
        with self.vitals.working():
            return [self.entrance.take(request) for request in requests]

    def submit(self, entered):
        options, prompt = entered.parsed.without_streaming().options, entered.prompt
        text = TextStream.of(self.tokenizer, options, prompt.token_ids)
        state = DecodeState.of(options, self.engine.wait_ready(timeout=0).eos_ids, prompt.echo, text)
        decoder = ResponseDecoder(self.tokenizer, state)
        responder = UnaryResponder(entered.request, decoder.decode, self.tokenizer)
        self.streams.submit(
            prompt.token_ids,
            options,
            entered.deadline,
            lambda uid: responder,
            flow_control=False,
            text=text,
            urgent=is_probe(entered.request),
        )

    def finalize(self):
        self.entrance.close()
        self.engine.close()  # this ends all requests
        self.streams.close()
        self.metrics.close()
        self.vitals.close()
