# SPDX-License-Identifier: Apache-2.0
"""The openai package against a front: prints what each way of calling it has given, as JSON."""

import asyncio
import json
import sys

import openai

base_url, model = sys.argv[1:]
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]
ASKED = {"model": model, "messages": QUESTION, "max_completion_tokens": 8, "temperature": 0}
client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
found = {}

found["models"] = [one.id for one in client.models.list()]

parts = list(client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True}))
found["stream"] = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
found["stream_usage"] = parts[-1].usage.completion_tokens

# The package's own events; their end is an error unless the answer has ended by itself or at a stop string.
with client.chat.completions.stream(**ASKED, stop=found["stream"][-3:], logprobs=True, top_logprobs=2) as stream:
    text = "".join(event.delta for event in stream if event.type == "content.delta")
    [choice] = stream.get_final_completion().choices
found["events"] = [text, choice.message.content, choice.finish_reason]
found["top_logprobs"] = [len(token.top_logprobs) for token in choice.logprobs.content]


async def ask_both() -> list[str]:
    """One whole answer and one stream at the same time."""
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as asked:

        async def streamed() -> str:
            parts = await asked.chat.completions.create(**ASKED, stream=True)
            return "".join([part.choices[0].delta.content or "" async for part in parts])

        whole, joined = await asyncio.gather(asked.chat.completions.create(**ASKED), streamed())
        return [whole.choices[0].message.content, joined]


found["async"] = asyncio.run(ask_both())

completion = client.completions.create(
    model=model, prompt=["The capital of Japan is", "Water is"], max_tokens=4, temperature=0, logprobs=1, echo=True
)
found["completions"] = [choice.text for choice in completion.choices]

found["errors"] = []
for wrong in ({"model": "another"}, {"temperature": -1}, {"max_completion_tokens": 10**6}, {"best_of": 3}):
    try:
        client.chat.completions.create(**ASKED, extra_body=wrong)
    except openai.APIStatusError as error:
        found["errors"].append([type(error).__name__, error.code, error.param])

print(json.dumps(found))
