"""What a message between the front process and a worker costs to encode: three ways, alternating in one process.

`python -m benchmarks.messages [--mebibytes 48] [--repeats 9]` prints the fastest time of each and its ratio.
A message is a request with a tensor of that size, as the front process sends it; an answer is encoded in the same way.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import msgspec

from server.model_info import Direction
from server.values import Geometry, Job, RenderOptions, Request, Scaling
from server.workers.messages import LENGTH_BYTES, Run, encode


def message_of(mebibytes: int) -> Run:
    """Return a message with float32 latents of about this size."""
    side = math.isqrt((mebibytes << 20) // 16)
    geometry = Geometry((1, 4, side, side), is_packed=False, num_frames=1, height=8 * side, width=8 * side)
    render = RenderOptions(fps=10, quality=None, media_type="image/png")
    job = Job("demo", Direction.DECODE, geometry.latent_shape, "float32", geometry, Scaling(), "png", render)
    return Run(0, [Request(job, memoryview(bytearray(job.bytes_needed)))])


def with_length_added(message: Run) -> bytes:
    """Encode, then put the length in front, which copies everything once more."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    message, buffer = message_of(arguments.mebibytes), bytearray()
    ways: dict[str, Callable[[], object]] = {
        "length added in front": lambda: with_length_added(message),
        "encoded into a new buffer": lambda: encode(message),
        "encoded into a reused buffer": lambda: encode(message, buffer),
    }
    best = dict.fromkeys(ways, math.inf)
    for _ in range(arguments.repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            best[name] = min(best[name], (time.perf_counter() - started) * 1e3)
    first = next(iter(best.values()))
    for name, ms in best.items():
        print(f"{name}: {ms:.1f} ms, {first / ms:.2f} times as fast as the first")


if __name__ == "__main__":
    main()
