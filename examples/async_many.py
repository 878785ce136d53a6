# SPDX-License-Identifier: Apache-2.0
"""Sends many requests at once on one connection, with asyncio. `python examples/async_many.py [HOST:PORT]`"""

import asyncio
import sys

from lightllm_client import AsyncLightLLMClient

COUNTRIES = ("Japan", "France", "Italy", "Spain", "Egypt", "Peru", "India", "Canada")


async def main(url: str) -> None:
    """Print the answers in the order of the prompts; the server computes them together."""
    async with AsyncLightLLMClient(url, timeout=120) as client:
        requests = [client.generate(f"The capital of {country} is", max_tokens=4) for country in COUNTRIES]
        for country, answer in zip(COUNTRIES, await asyncio.gather(*requests), strict=True):
            print(f"{country}:{answer.text.splitlines()[0]}")


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"))
