# SPDX-License-Identifier: Apache-2.0
"""The Router's table grows with the longest sequence, and takes memory for the tokens that there are."""

import numpy as np
import psutil

from lightllm_backend.request import Request, SamplingParams
from lightllm_backend.router.request_table import RequestTable
from lightllm_backend.router.sequence import Sequence


def sequence(prompt_length: int, max_tokens: int) -> Sequence:
    request = Request("uid", tuple(range(prompt_length)), SamplingParams(max_tokens=max_tokens))
    return Sequence(request, handle=0, arrival_index=0, arrival_time=0.0, quantiles=np.zeros(1))


def test_what_is_known_stays_when_the_table_grows() -> None:
    table = RequestTable(num_rows=3)
    expected = {}
    # The second begins with more cached tokens than the table was wide.
    for length, cached in [(40, 3), (700, 650), (20000, 0)]:
        slots = np.arange(cached, dtype=np.int32) + length
        row = table.take_row(sequence(length, 9), slots)
        chunk = np.arange(length - cached, dtype=np.int32)
        table.append_chunk(row, chunk[np.newaxis])
        expected[row] = (length, np.concatenate([slots, chunk]))
    for row, (length, slots) in expected.items():
        assert table.known_token_ids(row).tolist() == list(range(length))
        assert table.slots_of(row).tolist() == slots.tolist()


def test_a_long_sequence_costs_no_memory_in_the_rows_of_others() -> None:
    before = psutil.Process().memory_info().rss
    table = RequestTable(num_rows=1000)
    for length in (100, 131072, 200000):
        table.take_row(sequence(length, 1), np.empty(0, dtype=np.int32))
    # Each table has 800 MB of addresses.
    assert psutil.Process().memory_info().rss - before < 200 << 20
