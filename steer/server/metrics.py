"""Prometheus metrics: steering's own counters beside vLLM's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import REGISTRY

from steer.engine import Engine

HELP = {
    "requests": "Requests answered or being answered",
    "steered_requests": "Requests with at least one acting intervention",
    "refused": "Requests refused because they could not be steered as asked",
    "tokens_generated": "Tokens sampled",
    "tokens_steered": "Tokens whose block outputs were changed",
    "tokens_cached": "Prompt tokens taken from the prefix cache",
    "captures": "Texts whose block outputs were read",
}


class SteeringCollector:
    """The counters of one engine."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """Metric families, as prometheus_client asks for them."""
        client = self.engine.client
        for name, value in asdict(client.tally).items():
            yield CounterMetricFamily(f"steer_{name}", HELP[name], value=value)
        yield GaugeMetricFamily("steer_weight_version", "Version of the served weights", value=client.weight_version)
        yield GaugeMetricFamily("steer_slots", "Vectors the table holds", value=client.vectors.count)
        yield GaugeMetricFamily("steer_slots_in_use", "Vectors that running requests hold", value=client.vectors.held)


def exposition(engine: Engine) -> tuple[bytes, str]:
    """(text, content type) of `/metrics`."""
    own: Any = CollectorRegistry()
    own.register(SteeringCollector(engine))
    return generate_latest(own) + generate_latest(REGISTRY), CONTENT_TYPE_LATEST
