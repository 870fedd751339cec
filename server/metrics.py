"""The metrics for Prometheus, in one registry per server. No label contains a text that a client sent."""

from __future__ import annotations

import os
from collections.abc import Callable

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

Count = Callable[[], float]

# Otherwise every counter would have a second series with its creation time, which nothing reads.
disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus_client leaves it untyped

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)
BYTES = tuple(4.0**n for n in range(5, 15))


class Metrics:
    """All metrics of a server. The names `inf_*` are those that scrapers for Hugging Face's toolkit know."""

    def __init__(self) -> None:
        """Make the metrics in a new registry."""
        self.registry = registry = CollectorRegistry()
        self._workers = 0
        self.requests = Counter("vae_requests", "Requests answered", ["route", "model", "code"], registry=registry)
        self.duration_s = Histogram(
            "vae_request_duration_seconds",
            "Time from the head of a request to the end of its answer",
            ["route", "model"],
            buckets=SECONDS,
            registry=registry,
        )
        self.queue_wait_s = Histogram(
            "vae_queue_wait_seconds",
            "Time from the complete request until a device begins it",
            buckets=SECONDS,
            registry=registry,
        )
        self.decode_s = Histogram(
            "vae_decode_seconds",
            "Time of a decode on the device, including copies",
            ["model"],
            buckets=SECONDS,
            registry=registry,
        )
        self.encode_s = Histogram(
            "vae_encode_seconds",
            "Time of an encode on the device, including copies",
            ["model"],
            buckets=SECONDS,
            registry=registry,
        )
        self.render_s = Histogram(
            "vae_render_seconds",
            "Time to render a result in its format",
            ["format"],
            buckets=SECONDS,
            registry=registry,
        )
        self.request_bytes = Histogram(
            "vae_request_bytes", "Bytes of the latents or pixels of a request", buckets=BYTES, registry=registry
        )
        self.response_bytes = Histogram("vae_response_bytes", "Bytes of an answer", buckets=BYTES, registry=registry)
        self.output_pixels = Counter("vae_output_pixels", "Pixels decoded", ["model"], registry=registry)
        self.input_pixels = Counter("vae_input_pixels", "Pixels encoded", ["model"], registry=registry)
        self.rejected = Counter(
            "vae_rejected", "Requests answered with an error", ["reason", "model"], registry=registry
        )
        self.batch_size = Histogram(
            "vae_batch_size", "Requests in the batch of each request", buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        self.out_of_memory = Counter(
            "vae_oom", "Times that a device ran out of memory, by the step that followed", ["step"], registry=registry
        )
        self.nonfinite = Counter(
            "vae_nonfinite",
            "Half-precision overflows, after which the latents were decoded again in float32",
            ["where"],
            registry=registry,
        )
        self.cancelled = Counter(
            "vae_cancelled",
            "Requests whose client left or read the answer too slowly",
            ["stage"],
            registry=registry,
        )
        self.jobs = Gauge("vae_jobs", "Jobs that are kept, done or not", registry=registry)
        self.job_bytes = Gauge("vae_job_bytes", "Memory that the answers of jobs hold", registry=registry)
        self.worker_restarts = Counter(
            "vae_worker_restarts", "Worker processes that ended", ["cause"], registry=registry
        )
        self.model_loaded = Gauge(
            "vae_model_loaded", "Devices that have the model loaded", ["model"], registry=registry
        )
        self.resident_memory = Gauge(
            "vae_resident_memory_bytes",
            "Resident memory of the front process and of each worker",
            ["process"],
            registry=registry,
        )
        self.resident_memory.labels("front").set_function(lambda: resident_bytes(os.getpid()))
        self.queue_depth = Gauge("vae_queue_depth", "Requests that wait for a device", registry=registry)
        self.queue_bytes = Gauge(
            "vae_queue_bytes", "Bytes that accepted requests and their answers hold", registry=registry
        )
        self.inflight = Gauge("vae_inflight", "Requests that a device has begun", registry=registry)
        self._toolkit = (
            Gauge("inf_queue_size", "The same as vae_queue_depth, for the toolkit's scrapers", registry=registry),
            Gauge("inf_batch_current_size", "The same as vae_inflight, for the toolkit's scrapers", registry=registry),
        )

    def watch_worker(self, device: str, pid: Callable[[], int | None]) -> None:
        """Report the memory of a worker whenever the metrics are read.

        device: part of the label. pid: returns the id of the worker's process; None if there is none.
        """
        self._workers += 1
        name = f"worker {self._workers} on {device}"
        self.resident_memory.labels(name).set_function(lambda: resident_bytes(pid()))

    def watch_jobs(self, count: Count, size_bytes: Count) -> None:
        """Report the jobs whenever the metrics are read. size_bytes: returns the memory that their answers hold."""
        self.jobs.set_function(count)
        self.job_bytes.set_function(size_bytes)

    def watch_queue(self, waiting: Count, running: Count, size_bytes: Count) -> None:
        """Report the queue whenever the metrics are read.

        waiting, running: return the number of requests. size_bytes: returns the memory that requests hold.
        """
        for gauge in (self.queue_depth, self._toolkit[0]):
            gauge.set_function(waiting)
        for gauge in (self.inflight, self._toolkit[1]):
            gauge.set_function(running)
        self.queue_bytes.set_function(size_bytes)


def resident_bytes(pid: int | None) -> float:
    """Return the resident memory of a process; 0 when it has ended, or has not started."""
    try:
        return float(psutil.Process(pid).memory_info().rss) if pid is not None else 0.0
    except psutil.Error:
        return 0.0
