# SPDX-License-Identifier: Apache-2.0
"""Chats over several turns, with the embedded model's chat template. `python examples/chat.py [HOST:PORT]`

Another model's template: `ChatTemplate.load(<its Hugging Face directory>)`.
"""

import sys

from lightllm_client import LightLLMClient
from lightllm_client.chat import ChatTemplate, default_model_dir

url = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"
template = ChatTemplate.load(default_model_dir())
messages = [{"role": "system", "content": "You answer in one short sentence."}]

with LightLLMClient(url, timeout=120) as client:
    for question in ("What is the capital of Japan?", "And of France?"):
        messages.append({"role": "user", "content": question})
        answer = client.generate(template.render(messages), max_tokens=64)
        messages.append({"role": "assistant", "content": answer.text})
        print(f"> {question}\n{answer.text}")
