# SPDX-License-Identifier: Apache-2.0
"""Makes tritonserver's options for OpenTelemetry spans. Standard library only."""

from __future__ import annotations

import importlib.util

from lightllm_backend.config import EngineConfig

# What triton_server/tracing.py imports; pyproject.toml has them as the extra `tracing`.
PACKAGES = ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http")


class TraceError(Exception):
    """Spans cannot be made; the message says what to install."""


def trace_options(config: EngineConfig) -> list[str]:
    """Make the options that have the server trace requests as the settings say; none if there is no collector.

    The server traces a request whose client sends a traceparent whatever its rate.
    """
    if config.trace_url is None:
        return []
    try:
        found = importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise TraceError(
            f"trace_url is {config.trace_url}, and the packages that make spans are missing; "
            f"pip install {' '.join(PACKAGES)}"
        )
    return [
        "--trace-config=mode=opentelemetry",
        "--trace-config=level=TIMESTAMPS",
        f"--trace-config=rate={config.trace_rate}",
        f"--trace-config=opentelemetry,url={config.trace_url}",
        "--trace-config=opentelemetry,resource=service.name=lightllm",
    ]
