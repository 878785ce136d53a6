# SPDX-License-Identifier: Apache-2.0
"""The detokenizer step: turns chunks of token ids into text and acknowledges each chunk to generation.

The step keeps no state of a request: the decoding state comes with each chunk and goes back with the Delivered message.
Generation sends a request's next chunk only after that message. So any instance may take any chunk, and the chunks of a
request stay in order.
"""

from lightllm_backend.messages.return_channel import ReturnChannel
from lightllm_backend.messages.return_messages import ClientGone, DecodingFailed, Delivered
from lightllm_backend.messages.run_directory import run_directory
from lightllm_backend.messages.vitals import Vitals
from lightllm_backend.request import RequestError
from lightllm_backend.text.response import DecodeState, ResponseDecoder
from lightllm_backend.triton_server.requests import read_chunk
from lightllm_backend.triton_server.responses import ServerSender, client_response, error_response
from lightllm_backend.triton_server.setup import engine_config, load_tokenizer, starting


class TritonPythonModel:
    def initialize(self, args):
        with starting():
            self.tokenizer = load_tokenizer(engine_config(args))
            self.returns = ReturnChannel()
            self.vitals = Vitals(run_directory(), "detokenizer")

    def execute(self, requests):
        for request in requests:
            with self.vitals.working():
                chunk, details = read_chunk(request)
                self.returns.connect(details.return_address)
                self.answer(ServerSender(request), chunk, details)

    def answer(self, sender, chunk, details):
        try:
            self.respond(sender, chunk, details)
        except Exception as error:
            self.returns.send(DecodingFailed(details.uid, repr(error)))
            failure = RequestError("INTERNAL", f"the text could not be decoded: {error}")
            sender.send(error_response(failure), final=True)

    def respond(self, sender, chunk, details):
        uid = details.uid
        if details.check_client and sender.is_cancelled():
            self.returns.send(ClientGone(uid))
        if chunk is None:
            sender.send(None, final=True)
            self.returns.send(Delivered(uid, None))
            return
        decoder = ResponseDecoder(self.tokenizer, DecodeState.from_json(details.state))
        if chunk.error is not None:
            held = decoder.flush()
            if held:
                sender.send(client_response(held, self.tokenizer), final=False)
            sender.send(error_response(chunk.error), final=True)
            return
        response = decoder.decode(chunk)
        sender.send(response and client_response(response, self.tokenizer), final=True)
        if chunk.finish_reason is None:  # generation needs no acknowledgement of the last chunk
            self.returns.send(Delivered(uid, decoder.state().to_json()))

    def finalize(self):
        self.vitals.close()
