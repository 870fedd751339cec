"""`serve` with clients that keep their connections: answers per second, latency, and how busy the GPU is."""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np
import torch
import yaml

from benchmarks.gpu.report import Report
from benchmarks.gpu.sizes import sizes_for
from benchmarks.gpu.vaes import image_vae, video_vae
from benchmarks.load import Tally, closed_loop
from tests.load import process

VIDEO = "Wan 2.1"
SAMPLE_MS = 100  # between two samples of the GPU's share
FEWEST_SAMPLES = 3
SEEDS = 4  # different latents, so that no two answers in a row are the same
# The parameters and the Accept header of each kind of answer, and the model that gives it.
ANSWERS: dict[str, tuple[str, dict[str, str], str]] = {
    "JPEG": ("image", {"output_type": "pil", "image_format": "jpg"}, "image/jpeg"),
    "PNG": ("image", {"output_type": "pil", "image_format": "png"}, "image/png"),
    "pt": ("image", {"output_type": "pt"}, "tensor/binary"),
    "mp4": ("video", {"output_type": "mp4"}, "video/mp4"),
}


def run(report: Report) -> None:
    """Write the lines of this section."""
    sizes = sizes_for(report.device)
    with tempfile.TemporaryDirectory() as name, Busy(report.device) as busy:
        config, shapes = write_models(Path(name), report.device)
        flags = ("--device", report.device, "--max-queue", str(max(sizes.clients)))
        started = time.perf_counter()
        with process(config, *flags) as (url, _):
            report.line("start until ready, both models preloaded", s=time.perf_counter() - started)
            port = urlsplit(url).port
            assert port is not None
            for answer, (model, parameters, accept) in ANSWERS.items():
                shape = shapes[model]
                sent = [request(model, shape, seed, parameters, accept) for seed in range(SEEDS)]
                for clients in sizes.clients:
                    report.check_time(sizes.cell_s)
                    began = time.monotonic()
                    tally = asyncio.run(closed_loop(port, sent, clients, sizes.cell_s, lambda *_: None))
                    share = busy.share(began, time.monotonic())
                    size = "x".join(map(str, shape[2:]))
                    write(report, f"{answer} of latents {size}, {clients} clients", tally, share)


def write(report: Report, case: str, tally: Tally, share: float | str) -> None:
    """Write the line of one number of clients."""
    latencies = tally.latencies_ms
    p50, p99 = np.percentile(latencies, [50, 99]) if latencies else (None, None)
    report.line(
        case,
        per_s=len(latencies) / tally.seconds,
        p50_ms=None if p50 is None else float(p50),
        p99_ms=None if p99 is None else float(p99),
        answers=len(latencies),
        refused=tally.refused,
        body_bytes=len(tally.last[1]),
        busy_percent=share,
    )


def write_models(folder: Path, device: str) -> tuple[Path, dict[str, tuple[int, ...]]]:
    """Write an image and a video model with their models.yaml; return its path and the shapes of their latents."""
    sizes = sizes_for(device)
    with torch.no_grad():
        image_vae(device)[0].save_pretrained(folder / "image")
        video, family = video_vae(VIDEO, device)
        video.save_pretrained(folder / "video")
    spec, (frames, height, width) = family.describe(video.config), sizes.clip
    ratio, side = spec.vae_scale_factor, sizes.image_sides[1] // 8
    shapes = {
        "image": (1, 4, side, side),
        "video": (
            1,
            spec.channels,
            (frames - 1) // spec.temporal_compression_ratio + 1,
            height // ratio,
            width // ratio,
        ),
    }
    models: dict[str, Any] = {name: {"repo": str(folder / name), "preload": True} for name in shapes}
    path = folder / "models.yaml"
    path.write_text(yaml.safe_dump({"default": "image", "models": models}))
    del video
    if device == "cuda":
        torch.cuda.empty_cache()
    return path, shapes


def request(model: str, shape: Sequence[int], seed: int, parameters: dict[str, str], accept: str) -> bytes:
    """Return the bytes of a request to decode random latents."""
    latents = np.random.default_rng(seed).normal(size=shape).astype("float16").tobytes()
    query = urlencode({"shape": list(shape), "dtype": "float16", **parameters}, doseq=True)
    head = (
        f"POST /{model}?{query} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: tensor/binary\r\n"
        f"Accept: {accept}\r\nContent-Length: {len(latents)}\r\n\r\n"
    )
    return head.encode() + latents


class Busy:
    """Samples which share of the time the first GPU ran kernels, with nvidia-smi, while it is entered."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._samples: list[tuple[float, float]] = []  # when, as time.monotonic(), and percent
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Busy:
        """Begin to sample, if there is a GPU and nvidia-smi."""
        if self._device == "cuda":
            query = ("--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0", f"--loop-ms={SAMPLE_MS}")
            try:
                self._process = subprocess.Popen(("nvidia-smi", *query), stdout=subprocess.PIPE, text=True)
            except OSError:
                return self
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """End nvidia-smi."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def share(self, began: float, ended: float) -> float | str:
        """Return the mean of the samples between two times in percent, or `unknown` if there are too few."""
        percents = [percent for at, percent in self._samples if began <= at <= ended]
        return sum(percents) / len(percents) if len(percents) >= FEWEST_SAMPLES else "unknown"

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for text in self._process.stdout:
            try:
                self._samples.append((time.monotonic(), float(text)))
            except ValueError:  # "[N/A]" of a device that does not tell
                continue
