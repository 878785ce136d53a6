# SPDX-License-Identifier: Apache-2.0
"""The generation step: submits token ids to the engine, another process, and sends its chunks on. Only I/O."""

from functools import partial

from lightllm_backend.generation.engine_client import EngineClient
from lightllm_backend.generation.streams import Streams
from lightllm_backend.generation.supervisor import EngineSupervisor
from lightllm_backend.messages.engine_load import EngineLoad
from lightllm_backend.messages.run_directory import (
    engine_address,
    remove_addresses,
    remove_stale_run_directories,
    return_address,
    run_directory,
)
from lightllm_backend.messages.seal import Purpose, Seal
from lightllm_backend.messages.vitals import Vitals
from lightllm_backend.text.response import DecodeState
from lightllm_backend.text.text_stream import TextStream
from lightllm_backend.triton_server.metrics import info_labels
from lightllm_backend.triton_server.requests import is_probe, read_generation_request
from lightllm_backend.triton_server.responders import DirectResponder, GenerationResponder
from lightllm_backend.triton_server.responses import ServerSender, error_response
from lightllm_backend.triton_server.setup import engine_config, load_tokenizer, make_telemetry, served_name, starting

CONNECT_SECONDS = 60.0  # generous, since the supervisor has already reported a ready engine


class TritonPythonModel:
    def initialize(self, args):
        with starting():
            self.start(engine_config(args))

    def start(self, config):
        remove_stale_run_directories()
        self.run_directory = run_directory()
        self.tokenizer = load_tokenizer(config)
        self.telemetry = make_telemetry(config, with_engine=True)
        metrics = self.telemetry.metrics
        address = engine_address(self.run_directory)
        self.supervisor = EngineSupervisor(config, address, on_restart=metrics.engine_restarted)
        self.supervisor.wait_ready()
        name = served_name(config)

        def on_up(info):
            metrics.engine_up(info and info_labels(info, name))

        self.engine = EngineClient(address, on_stats=metrics.engine_stats, on_up=on_up)
        self.engine.wait_ready(CONNECT_SECONDS)
        self.load = EngineLoad(self.run_directory)
        self.tokens_seal, self.chunk_seal, returns_seal = (Seal.of(self.run_directory, purpose) for purpose in Purpose)
        self.streams = Streams(self.engine, self.telemetry, return_address(self.run_directory), returns_seal)
        self.vitals = Vitals(self.run_directory, "generation", count_open=self.streams.count_open)

    def execute(self, requests):
        for request in requests:
            with self.vitals.working():
                self.answer(request)

    def answer(self, request):
        try:
            self.submit(request)
        except Exception as error:
            self.telemetry.refused(request, error)
            ServerSender(request).send(error_response(error), final=True)

    def submit(self, request):
        token_ids, options, deadline, context = read_generation_request(request, self.tokens_seal)
        in_ensemble = context is not None
        new_text = partial(TextStream.of, self.tokenizer, options, token_ids)
        if in_ensemble:
            eos_ids = self.engine.wait_ready(timeout=0).eos_ids
            state = DecodeState.of(options, eos_ids, context.prompt_text, new_text())
            answers = GenerationResponder.sender(request, options, self.chunk_seal)
        else:
            answers = DirectResponder.sender(request, options)

        def responder(uid, number):
            if in_ensemble:
                return GenerationResponder(answers, number, uid, state, self.chunk_seal)
            return DirectResponder(answers, number)

        ticket = context.ticket if in_ensemble else 0
        try:
            self.streams.submit(
                token_ids,
                options,
                deadline,
                responder,
                flow_control=in_ensemble,
                new_text=new_text,
                urgent=is_probe(request),
                ticket=ticket,
                identity=self.telemetry.identity(
                    request, options.tenant, partial(self.tokenizer.decode_prompt, token_ids, False)
                ),
            )
        except Exception:
            self.load.refused(ticket)
            raise

    def finalize(self):
        self.engine.close()  # this ends all requests
        self.streams.close()
        self.supervisor.stop()
        self.telemetry.close()
        self.vitals.close()
        remove_addresses(self.run_directory)
