# SPDX-License-Identifier: Apache-2.0
"""JSON schemas of the custom resources that the manifests use, as far as they use them.

These schemas are written by hand after the API references of prometheus-operator's monitoring.coreos.com/v1,
LeaderWorkerSet's v1, the Gateway API's v1 and its inference extension's v1: no package that we found has the CRDs of
the second and the last. A field that is not listed here is refused, so that a new one is looked up before it is used.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 253}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
DURATION: Schema = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
LABELS: Schema = {"type": "object", "additionalProperties": {"type": "string", "maxLength": 63}}
COUNT_OR_SHARE: Schema = {
    "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^(100|[1-9]?[0-9])%$"}]
}


def fields(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


def many(items: Schema, least: int = 1, most: int = 16) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


METADATA = fields(("name",), name=NAME, namespace=NAME, labels=LABELS)
SELECTOR = fields(("matchLabels",), matchLabels={**LABELS, "minProperties": 1})
POD_TEMPLATE = {"type": "object", "required": ["spec"]}  # Kubernetes' own schema judges it

SPECS: dict[tuple[str, str], Schema] = {
    ("monitoring.coreos.com/v1", "PodMonitor"): fields(
        ("selector", "podMetricsEndpoints"),
        selector=SELECTOR,
        podMetricsEndpoints=many(fields(("port",), port=TEXT, path=TEXT, interval=DURATION)),
    ),
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): fields(
        ("leaderWorkerTemplate",),
        replicas={"type": "integer", "minimum": 0},
        startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
        rolloutStrategy=fields(
            ("type",),
            type={"enum": ["RollingUpdate"]},
            rollingUpdateConfiguration=fields(maxSurge=COUNT_OR_SHARE, maxUnavailable=COUNT_OR_SHARE),
        ),
        leaderWorkerTemplate=fields(
            ("workerTemplate",),
            size={"type": "integer", "minimum": 1},
            restartPolicy={"enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
            leaderTemplate=POD_TEMPLATE,
            workerTemplate=POD_TEMPLATE,
        ),
    ),
    ("inference.networking.k8s.io/v1", "InferencePool"): fields(
        ("selector", "targetPorts", "endpointPickerRef"),
        selector=SELECTOR,
        targetPorts=many(fields(("number",), number=PORT), most=8),
        endpointPickerRef=fields(
            ("name", "port"),  # the port is required for a Service, which is the default kind
            name=NAME,
            port=fields(("number",), number=PORT),
            failureMode={"enum": ["FailOpen", "FailClose"]},
        ),
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): fields(
        parentRefs=many(fields(("name",), name=NAME)),
        rules=many(
            fields(
                matches=many(
                    fields(path=fields(type={"enum": ["Exact", "PathPrefix", "RegularExpression"]}, value=TEXT))
                ),
                backendRefs=many(fields(("name",), group={"type": "string"}, kind=TEXT, name=NAME, port=PORT)),
                timeouts=fields(request=DURATION, backendRequest=DURATION),
            )
        ),
    ),
}


def schema_of(api_version: str, kind: str) -> Schema:
    return fields(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": api_version},
        kind={"const": kind},
        metadata=METADATA,
        spec=SPECS[api_version, kind],
    )
