# SPDX-License-Identifier: Apache-2.0
"""Streams an answer to the terminal. `python examples/stream.py [HOST:PORT]`"""

import sys

from lightllm_client import LightLLMClient

url = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"

with LightLLMClient(url, timeout=120) as client:
    # Leaving the loop cancels the request on the server.
    for chunk in client.stream("The capital of Japan is", max_tokens=16):
        print(chunk.text, end="", flush=True)
print()
