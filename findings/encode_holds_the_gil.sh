#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# tokenizers 0.23.3: encode stops all other Python threads until it returns, encode_batch does not.
#
# encode and encode_batch do the same work in Rust, which needs no Python object while it runs. encode_batch releases
# the interpreter's lock for it, also for a list of one text; encode holds the lock. The documentation says neither. So
# encode_batch([text])[0] and encode(text) return the same tokens, but while encode reads a long text, no other thread
# of the process runs. Moving the call to a thread of its own does not help.
#
# Users meet it when they take transformers out of a server and call tokenizers directly (transformers itself calls
# encode_batch for a single text too): one long prompt stops the event loop, health checks and all streams
# while it is tokenized, even in another thread.
#
# Seen (another thread ticks every millisecond):
#   encode:       1.24 s, the other thread stood still for 100% of it
#   encode_batch: 1.43 s, the other thread stood still for 1% of it
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet tokenizers==0.23.3

venv/bin/python - <<'PYTHON'
import random
import threading
import time

from tokenizers import Tokenizer, models, pre_tokenizers


def longest_standstill(call):
    """Return what the call returns, and the longest part of its time in which another thread did not run."""
    ticks = []
    is_done = threading.Event()

    def tick():
        while not is_done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.monotonic()
    result = call()
    end = time.monotonic()
    is_done.set()
    thread.join()
    times = [start, *(t for t in ticks if start < t < end), end]
    standstill = max(later - earlier for earlier, later in zip(times, times[1:])) / (end - start)
    return result, standstill, end - start


vocabulary = {character: index for index, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
letters = random.Random(0)
text = " ".join("".join(letters.choices("abcdefghij", k=8)) for _ in range(100_000))

encoding, alone, seconds = longest_standstill(lambda: tokenizer.encode(text))
print(f"encode:       {seconds:.2f} s, the other thread stood still for {alone:.0%} of it")
[batch_encoding], batch, seconds = longest_standstill(lambda: tokenizer.encode_batch([text]))
print(f"encode_batch: {seconds:.2f} s, the other thread stood still for {batch:.0%} of it")
assert encoding.ids == batch_encoding.ids, "changed: the tokens differ"
assert alone > 0.9, "changed: other threads run while encode does"
assert batch < 0.5, "changed: other threads stand still while encode_batch runs"
PYTHON
