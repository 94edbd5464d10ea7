"""What the manifests use of resources that are not Kubernetes' own, as closed JSON schemas.

Written from their documentation: an unknown or misspelt field is refused, and so is one that exists and is not used
here yet.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 1}
DURATION: Schema = {"type": "string", "pattern": "^[0-9]+(s|m|h|d)$"}
LABELS: Schema = {"type": "object", "additionalProperties": STRING}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}


def closed(required: dict[str, Schema], **optional: Schema) -> Schema:
    """An object with these fields and no others."""
    properties = {**required, **optional}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def resource(version: str, kind: str, spec: Schema) -> Schema:
    metadata = closed({"name": STRING, "namespace": STRING}, labels=LABELS)
    return closed({"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": metadata, "spec": spec})


def some(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


SELECTOR = closed({"matchLabels": LABELS})
ENDPOINT = closed({"port": STRING}, interval=DURATION)
POD_MONITOR = closed({"selector": SELECTOR, "podMetricsEndpoints": some(ENDPOINT)}, jobLabel=STRING)

RULE = closed({"alert": STRING, "expr": STRING, "labels": LABELS, "annotations": LABELS}, **{"for": DURATION})
PROMETHEUS_RULE = closed({"groups": some(closed({"name": STRING, "rules": some(RULE)}))})

POLICY = closed({"type": {"enum": ["Pods", "Percent"]}, "value": COUNT, "periodSeconds": COUNT})
SCALING = closed({"policies": some(POLICY)}, stabilizationWindowSeconds=COUNT)
HPA_CONFIG = closed({"behavior": closed({}, scaleDown=SCALING, scaleUp=SCALING)})
# All metadata of a trigger is text.
TRIGGER = closed(
    {
        "type": {"const": "prometheus"},
        "metricType": {"const": "AverageValue"},
        "metadata": closed(
            {
                "serverAddress": {"type": "string", "pattern": "^https?://"},
                "query": STRING,
                "threshold": {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$"},
            },
            ignoreNullValues={"enum": ["true", "false"]},
        ),
    }
)
SCALED_OBJECT = closed(
    {
        "scaleTargetRef": closed({"name": STRING}, kind={"enum": ["Deployment", "StatefulSet"]}),
        "minReplicaCount": COUNT,
        "maxReplicaCount": COUNT,
        "triggers": some(TRIGGER),
    },
    pollingInterval=COUNT,
    advanced=closed({"horizontalPodAutoscalerConfig": HPA_CONFIG}),
)

PICKER = closed({"name": STRING, "port": closed({"number": PORT})}, failureMode={"enum": ["FailOpen", "FailClose"]})
INFERENCE_POOL = closed(
    {
        "selector": SELECTOR,
        "targetPorts": some(closed({"number": PORT})),
        # without it a gateway speaks HTTP/1.1
        "appProtocol": {"const": "kubernetes.io/h2c"},
        "endpointPickerRef": PICKER,
    }
)

SCHEMAS: dict[str, Schema] = {
    "PodMonitor": resource("monitoring.coreos.com/v1", "PodMonitor", POD_MONITOR),
    "PrometheusRule": resource("monitoring.coreos.com/v1", "PrometheusRule", PROMETHEUS_RULE),
    "ScaledObject": resource("keda.sh/v1alpha1", "ScaledObject", SCALED_OBJECT),
    "InferencePool": resource("inference.networking.k8s.io/v1", "InferencePool", INFERENCE_POOL),
}
