"""The paths of the routes. Whatever treats a path in a special way takes it from here."""

from __future__ import annotations

HEALTH = ("/health", "/ping")
LIVE = "/health/live"
METRICS = "/metrics"
MODELS = "/models"
OPENAPI = "/openapi.json"
DECODE = ("/", "/predict", "/invocations")
ENCODE = "/encode"

PROBES = frozenset({*HEALTH, LIVE})
"""Answered without a key, and by any address."""

RESERVED = frozenset(path.split("/")[1] for path in (*HEALTH, METRICS, MODELS, OPENAPI, *DECODE, ENCODE)) - {""}
"""The first segments of these paths. No model can have such a name."""
