"""Prometheus collectors, one registry a server. No label ever holds what a client sent."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)
BYTES = tuple(4.0**n for n in range(5, 15))


class Metrics:
    """What the server counts. `inf_*` are the names that the Hugging Face toolkit's scrapers know."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("vae_requests", "Requests answered", ["route", "model", "code"], registry=registry)
        self.duration_s = Histogram(
            "vae_request_duration_seconds", "Head read to answer ready", ["route"], buckets=SECONDS, registry=registry
        )
        self.queue_wait_s = Histogram(
            "vae_queue_wait_seconds", "Admission to device", buckets=SECONDS, registry=registry
        )
        self.decode_s = Histogram(
            "vae_decode_seconds", "On the device, copies included", ["model"], buckets=SECONDS, registry=registry
        )
        self.render_s = Histogram(
            "vae_render_seconds", "Pixels to bytes", ["format"], buckets=SECONDS, registry=registry
        )
        self.request_bytes = Histogram("vae_request_bytes", "Latents received", buckets=BYTES, registry=registry)
        self.response_bytes = Histogram("vae_response_bytes", "Answers sent", buckets=BYTES, registry=registry)
        self.output_pixels = Counter("vae_output_pixels", "Pixels decoded", ["model"], registry=registry)
        self.rejected = Counter("vae_rejected", "Requests refused", ["reason"], registry=registry)
        self.model_loaded = Gauge(
            "vae_model_loaded", "1 when the weights are on a device", ["model"], registry=registry
        )
        self.queue_depth = Gauge("inf_queue_size", "Requests that wait for the device", registry=registry)
        self.running = Gauge("inf_batch_current_size", "Requests on the device", registry=registry)
