"""Prometheus collectors, one registry a server. No label ever holds what a client sent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

Count = Callable[[], float]

# A second series for every one, which Prometheus does not need and this server never reads.
disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus_client leaves it untyped

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)
BYTES = tuple(4.0**n for n in range(5, 15))


class Metrics:
    """What the server counts. `inf_*` are the names that the Hugging Face toolkit's scrapers know."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._workers = 0
        self.requests = Counter("vae_requests", "Requests answered", ["route", "model", "code"], registry=registry)
        self.duration_s = Histogram(
            "vae_request_duration_seconds",
            "From the head of a request to the end of its answer",
            ["route", "model"],
            buckets=SECONDS,
            registry=registry,
        )
        self.queue_wait_s = Histogram(
            "vae_queue_wait_seconds", "Admission to device", buckets=SECONDS, registry=registry
        )
        self.decode_s = Histogram(
            "vae_decode_seconds", "On the device, copies included", ["model"], buckets=SECONDS, registry=registry
        )
        self.encode_s = Histogram(
            "vae_encode_seconds", "On the device, copies included", ["model"], buckets=SECONDS, registry=registry
        )
        self.render_s = Histogram(
            "vae_render_seconds", "Pixels to bytes", ["format"], buckets=SECONDS, registry=registry
        )
        self.request_bytes = Histogram(
            "vae_request_bytes", "Latents or pixels received", buckets=BYTES, registry=registry
        )
        self.response_bytes = Histogram("vae_response_bytes", "Answers sent", buckets=BYTES, registry=registry)
        self.output_pixels = Counter("vae_output_pixels", "Pixels decoded", ["model"], registry=registry)
        self.input_pixels = Counter("vae_input_pixels", "Pixels encoded", ["model"], registry=registry)
        self.rejected = Counter("vae_rejected", "Requests refused", ["reason", "model"], registry=registry)
        self.batch_size = Histogram(
            "vae_batch_size", "Requests decoded together", buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        self.out_of_memory = Counter("vae_oom", "Decodes that ran out of memory", ["step"], registry=registry)
        self.nonfinite = Counter(
            "vae_nonfinite", "CoderId-precision overflows, decoded again in float32", ["where"], registry=registry
        )
        self.cancelled = Counter(
            "vae_cancelled", "Clients that left, or read their answer too slowly", ["stage"], registry=registry
        )
        self.worker_restarts = Counter(
            "vae_worker_restarts", "Worker processes that ended", ["cause"], registry=registry
        )
        self.model_loaded = Gauge("vae_model_loaded", "Devices that hold the weights", ["model"], registry=registry)
        self.resident_memory = Gauge(
            "vae_resident_memory_bytes", "Of the front process and each worker", ["process"], registry=registry
        )
        self.resident_memory.labels("front").set_function(lambda: resident_bytes(os.getpid()))
        self.queue_depth = Gauge("vae_queue_depth", "Requests that wait for a device", registry=registry)
        self.queue_bytes = Gauge("vae_queue_bytes", "Bytes of accepted requests and answers", registry=registry)
        self.inflight = Gauge("vae_inflight", "Requests given to a device", registry=registry)
        self._toolkit = (
            Gauge("inf_queue_size", "As vae_queue_depth, for the toolkit's scrapers", registry=registry),
            Gauge("inf_batch_current_size", "As vae_inflight, for the toolkit's scrapers", registry=registry),
        )

    def watch_worker(self, device: str, pid: Callable[[], int | None]) -> None:
        """Read its process's memory whenever the metrics are."""
        self._workers += 1
        name = f"worker {self._workers} on {device}"
        self.resident_memory.labels(name).set_function(lambda: resident_bytes(pid()))

    def watch_queue(self, waiting: Count, running: Count, size_bytes: Count) -> None:
        """Read these whenever the metrics are."""
        for gauge in (self.queue_depth, self._toolkit[0]):
            gauge.set_function(waiting)
        for gauge in (self.inflight, self._toolkit[1]):
            gauge.set_function(running)
        self.queue_bytes.set_function(size_bytes)


def resident_bytes(pid: int | None) -> float:
    """Of a process; 0 when it has ended, and where there is no /proc."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return float(pages * os.sysconf("SC_PAGE_SIZE"))
