# SPDX-License-Identifier: Apache-2.0
"""Structured output and tools of LangChain: runs behind the script of docs/clients.md, whose `model` it asks."""

import json
from typing import Literal

from pydantic import BaseModel

QUESTION = "Which city is the capital of Japan?"


class City(BaseModel):
    """What the answers have to be."""

    name: Literal["Kyoto", "Tokyo"]
    is_capital: bool


patient = model.model_copy(update={"max_tokens": 200})  # noqa: F821 (of the page's script)
city = patient.with_structured_output(City).invoke(QUESTION)
caller = patient.bind_tools([City], tool_choice="any", strict=True, parallel_tool_calls=False)
[call] = caller.invoke(QUESTION).tool_calls
print(json.dumps([city.model_dump(), call["args"]]))
