# SPDX-License-Identifier: Apache-2.0
"""The model for unary calls: encodes, submits to the ensemble's engine and decodes; one response per request."""

from dataclasses import replace
from functools import partial

from lightllm_backend.generation.engine_client import EngineClient
from lightllm_backend.generation.streams import Streams
from lightllm_backend.messages.run_directory import engine_address, run_directory
from lightllm_backend.messages.vitals import Vitals
from lightllm_backend.text.response import DecodeState, ResponseDecoder
from lightllm_backend.text.text_stream import TextStream
from lightllm_backend.triton_server.entrance import Entrance
from lightllm_backend.triton_server.requests import is_probe
from lightllm_backend.triton_server.responders import UnaryResponder
from lightllm_backend.triton_server.setup import engine_config, known_lengths, load_tokenizer, make_telemetry, starting


class TritonPythonModel:
    def initialize(self, args):
        with starting():
            config = engine_config(args)
            self.tokenizer = load_tokenizer(config)
            self.telemetry = make_telemetry(config, with_engine=False)
            self.engine = EngineClient(engine_address(run_directory()))
            self.streams = Streams(self.engine, self.telemetry)
            self.entrance = Entrance(
                config, self.tokenizer, known_lengths(config), self.telemetry, run_directory(), self.submit
            )
            self.vitals = Vitals(run_directory(), "lightllm_unary", count_open=self.streams.count_open)

    def execute(self, requests):
        with self.vitals.working():
            return [self.entrance.take(request) for request in requests]

    def submit(self, entered):
        options, prompt = entered.parsed.without_streaming().options, entered.prompt
        new_text = partial(TextStream.of, self.tokenizer, options, prompt.token_ids)
        eos_ids = self.engine.wait_ready(timeout=0).eos_ids
        answers = UnaryResponder.sender(entered.request, options.sampling.n, self.tokenizer)

        def responder(_uid, number):
            state = replace(DecodeState.of(options, eos_ids, prompt.echo, new_text()), index=number)
            return UnaryResponder(answers, number, ResponseDecoder(self.tokenizer, state).decode)

        self.streams.submit(
            prompt.token_ids,
            options,
            entered.deadline,
            responder,
            flow_control=False,
            new_text=new_text,
            urgent=is_probe(entered.request),
            identity=self.telemetry.identity(
                entered.request, options.tenant, partial(self.tokenizer.decode_prompt, prompt.token_ids, False)
            ),
        )

    def finalize(self):
        self.entrance.close()
        self.engine.close()  # this ends all requests
        self.streams.close()
        self.telemetry.close()
        self.vitals.close()
