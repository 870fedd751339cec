"""The paths of the routes. All code that treats a path in a special way imports it from here."""

from __future__ import annotations

HEALTH = ("/health", "/ping")
LIVE = "/health/live"
METRICS = "/metrics"
MODELS = "/models"
OPENAPI = "/openapi.json"
DOCS = "/docs"
JOBS = "/jobs"
PAGE = "/page"
REQUESTS = "/requests"
DECODE = ("/", "/predict", "/invocations")
ENCODE = "/encode"

PROBES = frozenset({*HEALTH, LIVE})
"""The health routes, which need no key and accept any IP address as Host."""

ALL = (*HEALTH, METRICS, MODELS, OPENAPI, DOCS, JOBS, PAGE, REQUESTS, *DECODE, ENCODE)
RESERVED = frozenset(path.split("/")[1] for path in ALL) - {""}
"""The first segments of all paths. A model cannot have such a name."""
