"""Compare the rate at which many clients get images encoded with the device's own rate, in one run.

    python -m benchmarks.trainers [--clients 64] [--side 512] [--model demo] [--seconds 20] [--rounds 3]

The clients send JPEG files to /encode of a server in its own process. "device" is a loop in this process that encodes
the same pixels, already read, without HTTP. Both take turns, so that changes of the machine's speed affect both alike.
The clients and the server share the cores with the device if that is a CPU.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import uvloop
from PIL import Image

from benchmarks.load import Tally, WrongAnswer, closed_loop
from benchmarks.peers import OURS, running
from benchmarks.server import machine_name, per_second
from benchmarks.traffic import DEMO, write_models
from server.config import load_settings
from server.inprocess.direct import Direct
from server.model_info import Direction
from server.values import Request


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--side", type=int, default=512, help="height and width of the images, in pixels")
    parser.add_argument("--model", choices=["tiny", "demo"], default="demo")
    parser.add_argument("--seconds", type=float, default=20.0, help="time of each round of both")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models_yaml = write_models(Path(folder))
        direct = Direct(load_settings(config=models_yaml))
        images = [picture(path, arguments.side) for path in sorted((DEMO / "latents").glob("*.jpg"))]
        jobs = [job(direct, arguments.model, image) for image in images]
        info = direct.models.load(arguments.model, Direction.ENCODE).info
        print(f"{machine_name(f'{info.dtype} {info.encoder} encoder')}\n")
        lengths = [len(bytes(direct.run(each).body.data)) for each in jobs]

        def check(index: int, body: bytes) -> None:
            if len(body) != lengths[index]:
                raise WrongAnswer(f"an answer of {len(body)} bytes, not {lengths[index]}")

        device: list[Tally] = []
        served: list[Tally] = []
        with running(models_yaml, info.dtype, arguments.clients, [OURS]) as (peer,):
            sent = [request(arguments.model, image) for image in images]
            for _ in range(arguments.rounds):
                device.append(loop(direct, jobs, arguments.seconds))
                with peer.measured():
                    served.append(uvloop.run(closed_loop(peer.port, sent, arguments.clients, arguments.seconds, check)))
    print("| images | device, per second | clients | served, per second | share of the device's rate | refused |")
    print("| --- | --- | --- | --- | --- | --- |")
    rates, refused = (per_second(device), per_second(served)), sum(tally.refused for tally in served)
    size = f"{arguments.model}, {arguments.side}x{arguments.side}"
    share = rates[1] / rates[0]
    print(f"| {size} | {rates[0]:.3g} | {arguments.clients} | {rates[1]:.3g} | {share:.0%} | {refused} |")


def picture(path: Path, side: int) -> bytes:
    """Return an image of this size as a JPEG file."""
    buffer = io.BytesIO()
    Image.open(path).resize((side, side)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def job(direct: Direct, model: str, image: bytes) -> Request:
    """Return the request to encode the pixels of an image."""
    pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))[None]  # [1, H, W, 3]
    parameters = {"shape": list(pixels.shape), "dtype": "uint8"}
    return direct.parse(model, parameters, pixels.tobytes(), "*/*", Direction.ENCODE)


def request(model: str, image: bytes) -> bytes:
    """Return a whole HTTP request."""
    head = f"POST /{model}/encode HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(image)}\r\n\r\n"
    return head.encode() + image


def loop(direct: Direct, jobs: list[Request], seconds: float) -> Tally:
    """Encode one image after the other."""
    tally, index = Tally(), 0
    direct.run(jobs[0])  # so that the threads are awake
    started = time.perf_counter()
    while (before := time.perf_counter()) < started + seconds:
        direct.run(jobs[index % len(jobs)])
        tally.latencies_ms.append((time.perf_counter() - before) * 1e3)
        index += 1
    tally.seconds = time.perf_counter() - started
    return tally


if __name__ == "__main__":
    main()
