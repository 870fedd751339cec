"""When the first frames of a video arrive: `stream=True` against the whole MP4, alternating, from a real server.

    python -m benchmarks.stream --frames 21 --height 16 --width 16 --repeats 3

The model is a Wan 2.1 VAE of published size with random weights; the sizes are those of the latents. The first request
is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import requests
import torch
import yaml
from diffusers import AutoencoderKLWan

from tests.load import process

HEADER = "| answer | first fragment s | total s | of the total | bytes |\n| --- | --- | --- | --- | --- |"


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=21, help="latent frames")
    parser.add_argument("--height", type=int, default=16, help="of the latents")
    parser.add_argument("--width", type=int, default=16, help="of the latents")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    shape = 1, 16, arguments.frames, arguments.height, arguments.width
    latents = np.random.default_rng(0).normal(size=shape).astype("float16")
    with tempfile.TemporaryDirectory() as name:
        config = save_model(Path(name))
        with process(config, "--request-timeout-s", "3000") as (url, _):
            ask(url, latents, stream=True)
            found: dict[bool, list[tuple[float, float, int]]] = {False: [], True: []}
            for _ in range(arguments.repeats):
                for stream, results in found.items():
                    results.append(ask(url, latents, stream=stream))
    print(HEADER)
    for stream, results in found.items():
        first, total, size = (statistics.median(column) for column in zip(*results, strict=True))
        print(
            f"| {'stream=True' if stream else 'whole'} | {first:.3g} | {total:.3g} | {first / total:.1%} | {size:.0f} |"
        )
    ratios = [ours[1] / plain[1] for plain, ours in zip(found[False], found[True], strict=True)]
    print(f"total of the stream against the whole answer: {statistics.median(ratios):.3f}")


def save_model(folder: Path) -> Path:
    """Save the VAE and its models.yaml; return the path of the latter."""
    torch.manual_seed(0)
    AutoencoderKLWan().eval().save_pretrained(folder / "vae")
    config = folder / "models.yaml"
    config.write_text(yaml.safe_dump({"models": {"wan": {"repo": str(folder / "vae"), "preload": True}}}))
    return config


def ask(url: str, latents: np.ndarray, *, stream: bool) -> tuple[float, float, int]:  # type: ignore[type-arg]  # of any dtype
    """Return the seconds until the first fragment (or the first byte of a whole file), those of all, and the bytes."""
    began, first, size, seen = time.perf_counter(), 0.0, 0, b""
    sent = {"shape": latents.shape, "dtype": "float16", "output_type": "mp4", "stream": str(stream)}
    with requests.post(url, params=sent, data=latents.tobytes(), stream=True, timeout=3000) as response:
        response.raise_for_status()
        for piece in response.iter_content(None):
            size += len(piece)
            seen = b"" if first else seen + piece
            if not first and (not stream or b"mdat" in seen):
                first = time.perf_counter() - began
    return first, time.perf_counter() - began, size


if __name__ == "__main__":
    main()
