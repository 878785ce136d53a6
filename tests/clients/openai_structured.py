# SPDX-License-Identifier: Apache-2.0
"""The openai package's structured output and tools against a front: prints what they have given, as JSON."""

import json
import sys
from typing import Literal

import openai
from pydantic import BaseModel

base_url, model = sys.argv[1:]
client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
question = {"role": "user", "content": "Which city is the capital of Japan?"}
asked = {"model": model, "messages": [question], "max_completion_tokens": 200, "temperature": 0}
found = {}


class City(BaseModel):
    """What the answers have to be."""

    name: Literal["Kyoto", "Tokyo"]
    is_capital: bool


[choice] = client.chat.completions.parse(**asked, response_format=City).choices
found["parsed"] = choice.message.parsed.model_dump()

tool = openai.pydantic_function_tool(City, name="remember")
call = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
[choice] = client.chat.completions.parse(**asked, **call).choices
[called] = choice.message.tool_calls
found["call"] = [choice.finish_reason, called.function.name, called.function.parsed_arguments.model_dump()]

named = {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "remember"}}}
with client.chat.completions.stream(**asked, **named) as stream:
    deltas = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
    [choice] = stream.get_final_completion().choices
[streamed] = choice.message.tool_calls
found["streamed"] = ["".join(deltas), streamed.function.parsed_arguments.model_dump()]

# The result of a call goes back into the conversation.
result = {"role": "tool", "tool_call_id": called.id, "content": "remembered"}
conversation = [question, {"role": "assistant", "content": None, "tool_calls": [called.to_dict()]}, result]
answer = client.chat.completions.create(**{**asked, "messages": conversation, "max_completion_tokens": 4})
found["after_the_result"] = answer.choices[0].finish_reason

print(json.dumps(found))
