# SPDX-License-Identifier: Apache-2.0
"""The detokenizer step: turns chunks of token ids into text and acknowledges each chunk to generation.

The step keeps no state of a request: the decoding state comes with each chunk and goes back with the Delivered message.
Generation sends a request's next chunk only after that message. So any instance may take any chunk, and the chunks of a
request stay in order.
"""

from lightllm_backend.messages.return_channel import ReturnChannel
from lightllm_backend.messages.return_messages import ClientGone, DecodingFailed, Delivered
from lightllm_backend.messages.run_directory import return_address, run_directory
from lightllm_backend.messages.seal import Purpose, Seal
from lightllm_backend.messages.vitals import Vitals
from lightllm_backend.request import RequestError
from lightllm_backend.text.response import DecodeState, ResponseDecoder
from lightllm_backend.triton_server.requests import read_chunk
from lightllm_backend.triton_server.responses import (
    KeptTensors,
    ServerSender,
    answers_response,
    client_response,
    error_response,
)
from lightllm_backend.triton_server.setup import engine_config, load_tokenizer, starting


class TritonPythonModel:
    def initialize(self, args):
        with starting():
            self.tokenizer = load_tokenizer(engine_config(args))
            directory = run_directory()
            self.vitals = Vitals(directory, "detokenizer")
            self.seal = Seal.of(directory, Purpose.CHUNK)
            self.kept_tensors = KeptTensors()
            self.returns = ReturnChannel(return_address(directory), Seal.of(directory, Purpose.RETURNS))

    def execute(self, requests):
        for request in requests:
            with self.vitals.working():
                self.answer(request)

    def answer(self, request):
        sender = ServerSender(request)
        try:
            message = read_chunk(request, self.seal)
        except Exception as error:  # not from generation: nobody but the caller hears of it
            sender.send(error_response(error), final=True)
            return
        try:
            self.respond(sender, message)
        except Exception as error:
            self.returns.send(DecodingFailed(message.uid, repr(error)))
            failure = RequestError("INTERNAL", f"the text could not be decoded: {error}")
            sender.send(error_response(failure), final=True)

    def respond(self, sender, message):
        uid, chunk = message.uid, message.chunk
        if message.check_client and sender.is_cancelled():
            self.returns.send(ClientGone(uid))
        if chunk is None:
            sender.send(None, final=True)
            self.returns.send(Delivered(uid, None))
            return
        decoder = self.decoder(message)
        if chunk.error is not None:
            held = decoder.flush()
            if held:
                sender.send(client_response(held, self.tokenizer, self.kept_tensors), final=False)
            sender.send(error_response(chunk.error), final=True)
            return
        if message.others:
            responses = [self.decoder(one).decode(one.chunk) for one in message.all()]
            sender.send(answers_response(responses, self.tokenizer), final=True)
            return
        response = decoder.decode(chunk)
        sender.send(response and client_response(response, self.tokenizer, self.kept_tensors), final=True)
        if chunk.finish_reason is None:  # generation needs no acknowledgement of the last chunk
            self.returns.send(Delivered(uid, decoder.state().pack()))

    def decoder(self, message):
        return ResponseDecoder(self.tokenizer, DecodeState.unpack(message.state))

    def finalize(self):
        self.vitals.close()
