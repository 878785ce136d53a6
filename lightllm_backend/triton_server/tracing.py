# SPDX-License-Identifier: Apache-2.0
"""RequestSpans: the engine's phases of a request as OpenTelemetry spans. No torch; imported only if tracing is on.

Triton server makes the spans of a traced request's way: the call, the ensemble, each step of it. It does not see what
the engine does, since the generation step returns at once. So this adds, below the span of the step that has submitted
the request, a span `request` with its phases `queue`, `prefill` and `decode`, once the request has ended. Triton server
decides which requests are traced.
"""

from __future__ import annotations

import json
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from lightllm_backend.generation.token_times import EndedRequest
from lightllm_backend.version import VERSION

SERVICE = "lightllm"


class RequestSpans:
    """Makes the spans of requests and has a thread of its own send them to the collector at `url`."""

    def __init__(self, url: str, model: str) -> None:
        resource = Resource.create({"service.name": SERVICE, "service.version": VERSION})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        self._tracer = self._provider.get_tracer("lightllm_backend", VERSION)
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    def finished(self, ended: EndedRequest, end: int) -> None:
        """Make the spans of a request that has ended at `end`, in nanoseconds of the clock, if it is traced."""
        identity = ended.identity
        if not identity.trace_context:
            return
        parent = self._propagator.extract(carrier=json.loads(identity.trace_context))
        start = end - _nanoseconds(ended.seconds)
        request = self._tracer.start_span("request", context=parent, start_time=start, attributes=self._facts(ended))
        if ended.error_code:
            request.set_status(StatusCode.ERROR, ended.error_code)
        within = trace.set_span_in_context(request)

        def phase(name: str, first: int, last: int, **facts: Any) -> None:
            span: Span = self._tracer.start_span(name, context=within, start_time=first, attributes=facts)
            span.end(last)

        if ended.queue_seconds is None or ended.first_token_seconds is None:
            phase("queue", start, end)  # it has not got as far as a token
        else:
            admitted = start + _nanoseconds(ended.queue_seconds)
            first_token = start + _nanoseconds(ended.first_token_seconds)
            computed = ended.num_prompt_tokens - ended.num_cached_tokens
            phase("queue", start, admitted)
            phase("prefill", admitted, first_token, **{"lightllm.tokens": computed})
            phase("decode", first_token, end, **{"lightllm.tokens": ended.num_answer_tokens})
        request.end(end)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _facts(self, ended: EndedRequest) -> dict[str, Any]:
        # Names of OpenTelemetry's conventions for generative AI, and our own where those have none.
        return {
            "gen_ai.request.model": self._model,
            "gen_ai.response.id": ended.identity.id,
            "gen_ai.response.finish_reasons": [ended.status],
            "gen_ai.usage.input_tokens": ended.num_prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": ended.num_cached_tokens,
            "gen_ai.usage.output_tokens": ended.num_answer_tokens,
            "lightllm.tenant": ended.identity.tenant,
        }


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
