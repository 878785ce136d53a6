# SPDX-License-Identifier: Apache-2.0
"""Figures from traces that can be computed by hand, and the refusal of wrong answers."""

from dataclasses import replace

import pytest

from perf.serving.measure import ClientShare, RequestFailed, Trace, check, clients_summary, distribution, summary
from perf.serving.timeline import Moment, delivery_lag, device_share, moment_from_metrics, pool_share
from perf.serving.workload import Length, WorkItem

ITEM = WorkItem((1, 2, 3), Length(3, 4))
GOOD = Trace(7, sent=10.0, arrivals=[11.0, 12.0, 14.0], tokens=[1, 2, 1], prompt_tokens=3, finish_reason="length")


def test_a_right_answer_passes() -> None:
    check(GOOD, ITEM, streaming=True, ignore_eos=True)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"tokens": [1, 2]}, "3 tokens came"),
        ({"tokens": [1, 2, 2]}, "5 tokens came"),
        ({"finish_reason": "stop"}, "finish_reason is 'stop'"),
        ({"finish_reason": ""}, "finish_reason is ''"),
        ({"prompt_tokens": 4}, "the server counted 4 prompt tokens"),
    ],
)
def test_a_wrong_answer_is_refused_by_name(change: dict, fault: str) -> None:
    with pytest.raises(RequestFailed, match=rf"^request 7 \(3 prompt tokens, 4 wanted\): {fault}"):
        check(replace(GOOD, **change), ITEM, streaming=True, ignore_eos=True)


def test_a_request_that_does_not_stream_has_one_response() -> None:
    with pytest.raises(RequestFailed, match="3 responses came"):
        check(GOOD, ITEM, streaming=False, ignore_eos=True)
    check(replace(GOOD, arrivals=[14.0], tokens=[4]), ITEM, streaming=False, ignore_eos=True)


def test_without_ignore_eos_an_answer_may_stop_early_but_not_be_cut() -> None:
    short = replace(GOOD, tokens=[1, 1], finish_reason="stop")
    check(short, ITEM, streaming=True, ignore_eos=False)
    for change in ({"finish_reason": "length"}, {"tokens": []}, {"tokens": [5]}):
        with pytest.raises(RequestFailed):
            check(replace(short, **change), ITEM, streaming=True, ignore_eos=False)


def test_the_figures_of_a_run() -> None:
    other = Trace(8, sent=11.0, arrivals=[13.0], tokens=[6], prompt_tokens=5, finish_reason="length")
    figures = summary([GOOD, other], started=9.0, streaming=True)
    assert (figures["requests"], figures["prompt_tokens"], figures["output_tokens"]) == (2, 8, 10)
    assert figures["seconds"] == 5.0
    assert figures["requests_per_second"] == 0.4
    assert figures["output_tokens_per_second"] == 2.0
    assert figures["total_tokens_per_second"] == 3.6
    assert figures["tokens_per_response"] == 2.5
    assert figures["end_to_end"]["mean"] == 3.0
    assert figures["time_to_first_token"]["mean"] == 1.5
    assert figures["inter_token"]["mean"] == 1.5
    # Three tokens came after the first response of the one; of the other, none.
    assert figures["time_per_output_token"]["p99"] == pytest.approx(1.0)


def test_without_streaming_there_is_nothing_between_tokens() -> None:
    figures = summary([replace(GOOD, arrivals=[14.0], tokens=[4])], started=9.0, streaming=False)
    assert figures["end_to_end"]["p50"] == 4.0
    assert not {"time_to_first_token", "time_per_output_token", "inter_token"} & set(figures)


def test_percentiles() -> None:
    values = [float(value) for value in range(101)]
    assert distribution(values[::-1]) == {"mean": 50.0, "p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert distribution([]) is None


@pytest.mark.parametrize(
    ("share", "limit"),
    [
        (ClientShare(0.3, 0.002, 0.002), False),
        (ClientShare(0.9, 0.002, 0.002), True),
        (ClientShare(0.3, 0.2, 0.002), True),
        (ClientShare(0.3, 0.002, 0.2), True),
    ],
)
def test_one_busy_or_late_client_is_the_limit(share: ClientShare, limit: bool) -> None:
    summed = clients_summary([ClientShare(0.2, 0.001, 0.001), share])
    assert summed["were_the_limit"] is limit
    assert (summed["processes"], summed["cpu_share"]) == (2, share.cpu_share)


METRICS = """# HELP lightllm_running_requests Requests that are being computed
# TYPE lightllm_running_requests gauge
lightllm_running_requests{} 3
lightllm_queued_requests 2
lightllm_kv_tokens_used{} 1.5e+03
lightllm_kv_tokens_total{} 2000
lightllm_generated_tokens_total{} 40
lightllm_device_seconds_total{} 1.5
lightllm_requests_total{status="stop"} 9
nv_gpu_utilization 0.5
"""


def test_a_moment_is_read_from_the_metrics() -> None:
    assert moment_from_metrics(METRICS, 5.0) == Moment(5.0, 3, 2, 1500, 0, 2000, 40, 1.5)


def test_the_pool_counts_while_requests_wait() -> None:
    waiting = Moment(0.0, 3, 2, 1500, 0, 2000, 40, 1.5)
    moments = [waiting, replace(waiting, kv_tokens_used=500), replace(waiting, queued_requests=0, kv_tokens_used=2000)]
    assert pool_share(moments) == 0.5
    assert pool_share(moments[2:]) is None


def test_the_device_computes_for_a_share_of_the_time() -> None:
    first = Moment(10.0, 3, 0, 0, 0, 2000, 40, 1.5)
    assert device_share(first, [first, replace(first, at=12.0)], 2.0) is None
    assert device_share(first, [first, replace(first, at=14.6, device_seconds_total=4.5)], 4.0) == 0.75
    assert device_share(first, [], 2.0) is None


def test_how_far_clients_are_behind_the_engine() -> None:
    before = Moment(8.0, 0, 0, 0, 0, 2000, 100, 1.0)
    moments = [
        replace(before, at=at, generated_tokens_total=made) for at, made in ((8.5, 100), (11.5, 103), (13.0, 101))
    ]
    # 3 tokens were there at 12.0, 0.5 s after the engine had told; the first was there long before.
    lag = delivery_lag(before, moments, [GOOD])
    assert lag is not None
    assert lag["mean"] == pytest.approx(0.25)
    assert lag["p99"] == pytest.approx(0.495)
    assert delivery_lag(before, [replace(before, at=20.0, generated_tokens_total=105)], [GOOD]) is None
