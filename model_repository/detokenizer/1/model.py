# SPDX-License-Identifier: Apache-2.0
"""The detokenizer step: chunks of token ids in, text out, and word back to generation of what became of each chunk."""

import os
from queue import SimpleQueue
from threading import Thread

from lightllm_backend import triton_io
from lightllm_backend.engine.return_channel import ReturnChannel
from lightllm_backend.request import RequestError
from lightllm_backend.response import DecodeContext, ResponseDecoder

# The server takes its time with each response, so several are handed over at once; not where an engine on the CPU
# would be short of cores.
NUM_THREADS = max(1, min(8, len(os.sched_getaffinity(0)) // 4))


class TritonPythonModel:
    def initialize(self, args):
        triton_io.start_logging()
        self.tokenizer = triton_io.load_tokenizer(triton_io.engine_config(args))
        self.returns = ReturnChannel()
        self.decoders = {}  # by uid, of the requests that have not ended
        # All chunks of a request go to the same thread, and so stay in order.
        self.queues = [SimpleQueue() for _ in range(NUM_THREADS)]
        self.threads = [Thread(target=self.answer_all, args=(queue,), daemon=True) for queue in self.queues]
        for thread in self.threads:
            thread.start()

    def execute(self, requests):
        for request in requests:
            chunk, details = triton_io.read_chunk(request)
            self.returns.connect(details.get("return_address", ""))
            work = triton_io.ServerSender(request), chunk, details
            if "context" in details and chunk.finish_reason is None:
                self.answer(*work)  # the first text, which is waited for most; no other of its request is on its way
            else:
                self.queues[hash(details["uid"]) % NUM_THREADS].put(work)

    def finalize(self):
        for queue in self.queues:
            queue.put(None)
        for thread in self.threads:
            thread.join()

    def answer_all(self, queue):
        while (work := queue.get()) is not None:
            self.answer(*work)

    def answer(self, sender, chunk, details):
        try:
            self.respond(sender, chunk, details)
        except Exception as error:
            self.decoders.pop(details["uid"], None)
            self.returns.failed(details["uid"], repr(error))
            failure = RequestError("INTERNAL", f"the text could not be decoded: {error}")
            sender.send(triton_io.error_response(failure), final=True)

    def respond(self, sender, chunk, details):
        uid = details["uid"]
        if details.get("ask") and sender.is_cancelled():
            self.returns.gone(uid)
        if chunk is None:
            sender.send(None, final=True)
            self.returns.delivered(uid)
            return
        if "context" in details:
            self.decoders[uid] = ResponseDecoder(self.tokenizer, DecodeContext(**details["context"]))
        decoder = self.decoders[uid]
        if chunk.finish_reason is not None:
            del self.decoders[uid]
        if chunk.error is None:
            response = decoder.decode(chunk)
            sender.send(response and triton_io.client_response(response), final=True)
            self.returns.delivered(uid)
        else:
            held = decoder.flush()
            if held:
                sender.send(triton_io.client_response(held), final=False)
            sender.send(triton_io.error_response(chunk.error), final=True)
