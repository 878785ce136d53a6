# SPDX-License-Identifier: Apache-2.0
"""Asks with tritonclient's own unary call, over HTTP. `python examples/unary_tritonclient.py [HOST:PORT]`

A decoupled model refuses unary calls, so this one goes to the model `lightllm_unary`.
"""

import sys

import numpy as np
import tritonclient.http as http

text = http.InferInput("text_input", [1], "BYTES")
text.set_data_from_numpy(np.array([b"The capital of Japan is"], dtype=object))

with http.InferenceServerClient(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8000") as client:
    result = client.infer("lightllm_unary", [text], parameters={"max_tokens": 16})
    print(result.as_numpy("text_output")[0].decode())
