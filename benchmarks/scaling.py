"""Simulate how many replicas a load needs, with measured service times, and check it against one and two workers.

    python -m benchmarks.scaling --measure --save scaling-cpu     # measure, check, then simulate
    python -m benchmarks.scaling --load scaling-cpu               # only simulate
    python -m benchmarks.scaling --costs 3 19.6 --max-batch 1     # another device: ms per batch, ms per image

A replica has one device and a queue. Requests arrive in bursts: a Poisson process that changes between two rates. Like
the server, every replica takes the waiting requests, up to a batch, and refuses a request if its queue is full.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from pathlib import Path

import numpy as np
import simpy

from benchmarks.load import ANSWER_S, WrongAnswer, closed_loop, connect
from benchmarks.traffic import CASES, DEMO, photo_latents
from tests.load import process

RESULTS = Path(__file__).parent / "results"
CASE, WORKERS = CASES["demo-256"], (1, 2)
LOADS = (0.5, 0.8, 1.2)  # as shares of the most requests per second that the workers can answer
CHECK_S, SETTLE_S = 40.0, 6.0
# The rate in a burst relative to the calm rate, and how long calm times and bursts last on average.
BURST, CALM_S, BURST_S = 2.5, 6.0, 2.0
SEEDS = 5
REPLICAS = (1, 2, 4, 8, 16, 32, 100, 320, 1000)


@dataclass(frozen=True)
class Costs:
    """The costs of one device.

    first_s, each_s: a batch of n images takes `first_s + n * each_s` seconds.
    spread: the standard deviation of the logarithm of a batch's time.
    """

    first_s: float
    each_s: float
    spread: float = 0.15
    max_batch: int = 16
    max_queue: int = 16

    @property
    def most_per_s(self) -> float:
        """The throughput with full batches, in images per second."""
        return self.max_batch / (self.first_s + self.max_batch * self.each_s)


@dataclass
class Outcome:
    """The results of the clients of one run."""

    latencies_s: list[float] = field(default_factory=list)
    refused: int = 0

    @property
    def asked(self) -> int:
        """The number of requests."""
        return len(self.latencies_s) + self.refused

    def summary(self) -> dict[str, float]:
        """Return the percentiles of the latency, the share of refused requests, and the number of requests."""
        at = np.percentile(self.latencies_s, [50, 95, 99]) * 1e3 if self.latencies_s else [np.nan] * 3
        ms = dict(zip(("p50_ms", "p95_ms", "p99_ms"), map(float, at), strict=True))
        return {**ms, "refused": self.refused / max(1, self.asked), "asked": self.asked}


class Replica:
    """A simulated replica: a queue and a device."""

    def __init__(self, env: simpy.Environment, costs: Costs, outcome: Outcome, rng: random.Random) -> None:
        """Start the replica. outcome: gets its results."""
        self.env, self.costs, self.outcome, self.rng = env, costs, outcome, rng
        self.waiting: list[float] = []
        self.running = 0
        self.wake = env.event()
        env.process(self._serve())

    @property
    def load(self) -> int:
        """The number of waiting and running requests."""
        return len(self.waiting) + self.running

    def ask(self) -> None:
        """Queue a request that arrives now, or refuse it."""
        if self.load >= self.costs.max_queue:
            self.outcome.refused += 1
            return
        self.waiting.append(self.env.now)
        if not self.wake.triggered:
            self.wake.succeed()

    def _serve(self) -> Iterator[simpy.Event]:
        while True:
            if not self.waiting:
                self.wake = self.env.event()
                yield self.wake
            batch, self.waiting = self.waiting[: self.costs.max_batch], self.waiting[self.costs.max_batch :]
            self.running = len(batch)
            took_s = self.costs.first_s + len(batch) * self.costs.each_s
            yield self.env.timeout(took_s * self.rng.lognormvariate(0, self.costs.spread))
            self.running = 0
            self.outcome.latencies_s += [self.env.now - arrived for arrived in batch]


def bursts(per_s: float, seconds: float, rng: random.Random) -> list[float]:
    """Return the arrival times of requests in seconds, with `per_s` requests per second on average."""
    share = BURST_S / (CALM_S + BURST_S)
    calm_per_s = per_s / (1 - share + share * BURST)
    times, now, is_burst = [], 0.0, False
    change = rng.expovariate(1 / CALM_S)
    while now < seconds:
        now += rng.expovariate(calm_per_s * (BURST if is_burst else 1))
        if now > change:
            is_burst = not is_burst
            now, change = change, change + rng.expovariate(1 / (BURST_S if is_burst else CALM_S))
        elif now < seconds:
            times.append(now)
    return times


def simulate(times: Sequence[float], replicas: int, costs: Costs, seed: int = 0) -> Outcome:
    """Simulate replicas of which each request asks the less loaded of two random ones. times: the arrivals."""
    env, outcome, rng = simpy.Environment(), Outcome(), random.Random(seed)
    pool = [Replica(env, costs, outcome, rng) for _ in range(replicas)]

    def arrive() -> Iterator[simpy.Event]:
        for at in times:
            yield env.timeout(at - env.now)
            min(rng.sample(pool, min(2, replicas)), key=lambda replica: replica.load).ask()

    env.process(arrive())
    env.run()
    return outcome


def request_of(port: int) -> bytes:
    """Return the bytes of a request for the server at this port."""
    side = CASE.side // 8
    body = photo_latents("astronaut", (1, 4, side, side))
    query = f"shape=1,4,{side},{side}&dtype=float16&do_scaling=True"
    head = f"POST /?{query} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: tensor/binary\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def replay(port: int, times: Sequence[float]) -> Outcome:
    """Send requests to the real server at these times, each on a new connection."""
    outcome, request = Outcome(), request_of(port)
    started = time.perf_counter()

    async def one(at: float) -> None:
        await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
        connection = await connect(port)
        sent = time.perf_counter()
        status, _ = await connection.ask(request)
        connection.transport.close()
        if status == HTTPStatus.OK:
            outcome.latencies_s.append(time.perf_counter() - sent)
        elif status == HTTPStatus.TOO_MANY_REQUESTS:
            outcome.refused += 1
        else:
            raise WrongAnswer(f"status {status}")

    async with asyncio.timeout(times[-1] + ANSWER_S):
        await asyncio.gather(*(one(at) for at in times))
    return outcome


def measure(port: int, workers: int) -> Costs:
    """Measure the costs of a device, with one client per worker, and with as many clients as the queue accepts."""

    def ignore(index: int, body: bytes) -> None:
        return None

    alone = asyncio.run(closed_loop(port, [request_of(port)], workers, SETTLE_S, ignore))
    full = asyncio.run(closed_loop(port, [request_of(port)], 16 * workers, SETTLE_S, ignore))
    alone_s = float(np.median(alone.latencies_ms)) / 1e3
    in_batches_s = full.seconds * workers / len(full.latencies_ms)
    each_s = max(1e-4, (16 * in_batches_s - alone_s) / 15)
    spread = float(np.std(np.log(alone.latencies_ms)))
    return Costs(max(1e-4, alone_s - each_s), each_s, spread)


def check(workers: int) -> tuple[Costs, list[dict[str, object]]]:
    """Compare the simulation with the real server, for loads below and above its capacity."""
    rows: list[dict[str, object]] = []
    devices = ",".join(["cpu"] * workers)
    with process(DEMO.parent.parent / "models.yaml", "--device", devices) as (url, _):
        port = int(url.rsplit(":", 1)[1].strip("/"))
        costs = measure(port, workers)
        for load in LOADS:
            times = bursts(load * workers * costs.most_per_s, CHECK_S, random.Random(workers))
            real = asyncio.run(replay(port, times)).summary()
            # The real load, because the share of bursts in 40 s is random.
            offered = len(times) / (CHECK_S * workers * costs.most_per_s)
            rows.append(
                {"workers": workers, "load": offered, "real": real, "predicted": one_queue(times, workers, costs)}
            )
    return costs, rows


def one_queue(times: Sequence[float], workers: int, costs: Costs) -> dict[str, float]:
    """Simulate the workers of one server, which share a queue with the places of all of them. Return the summary."""
    env, outcome, rng = simpy.Environment(), Outcome(), random.Random(0)
    pool = [Replica(env, costs, outcome, rng) for _ in range(workers)]

    def arrive() -> Iterator[simpy.Event]:
        for at in times:
            yield env.timeout(at - env.now)
            min(pool, key=lambda replica: replica.load).ask()

    env.process(arrive())
    env.run()
    return outcome.summary()


def plan(costs: Costs, say: Callable[[str], None]) -> list[dict[str, float]]:
    """Return the highest load for each number of replicas at which at most one request in a thousand is refused.

    say: called with each line of the table.
    """
    rows = []
    for replicas in REPLICAS:
        seconds = max(60.0, 2000 / (replicas * costs.most_per_s))
        seconds = min(seconds, 200_000 / (replicas * costs.most_per_s) + 20)
        load = best_load(replicas, costs, seconds)
        times = bursts(load * replicas * costs.most_per_s, seconds, random.Random(1))
        found = simulate(times, replicas, costs).summary()
        rows.append({"replicas": replicas, "load": load, "per_s": load * replicas * costs.most_per_s, **found})
        say(f"| {replicas} | {load:.0%} | {rows[-1]['per_s']:.0f} | {found['p50_ms']:.0f} | {found['p99_ms']:.0f} |")
    return rows


def best_load(replicas: int, costs: Costs, seconds: float) -> float:
    """Return the highest load, as a share of the capacity, at which at most one request in a thousand is refused."""
    low, high = 0.05, 1.0
    for _ in range(6):
        middle = (low + high) / 2
        times = bursts(middle * replicas * costs.most_per_s, seconds, random.Random(1))
        if simulate(times, replicas, costs).summary()["refused"] <= 1e-3:
            low = middle
        else:
            high = middle
    return low


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="first start servers, measure their costs, and check")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    parser.add_argument("--load", metavar="NAME", default="scaling-cpu", help="use the costs of an earlier run")
    parser.add_argument("--costs", nargs=2, type=float, metavar="MS", help="use these costs per batch and per image")
    parser.add_argument("--max-batch", type=int, default=16, help="the largest batch, with --costs")
    arguments = parser.parse_args()
    found: dict[str, object] = {}
    if arguments.measure:
        costs_of, checks = {}, []
        for workers in WORKERS:
            costs, rows = check(workers)
            costs_of[workers], checks = costs, checks + rows
        found |= {"costs": {workers: asdict(costs) for workers, costs in costs_of.items()}, "checks": checks}
        print_checks(checks)
        costs = costs_of[1]
    elif arguments.costs:
        first_ms, each_ms = arguments.costs
        costs = Costs(first_ms / 1e3, each_ms / 1e3, max_batch=arguments.max_batch)
        found["costs"] = {"1": asdict(costs)}
    else:
        saved = json.loads((RESULTS / f"{arguments.load}.json").read_text())
        found |= saved
        costs = Costs(**saved["costs"]["1"])
    first_ms, each_ms = costs.first_s * 1e3, costs.each_s * 1e3
    print(
        f"\na device: {first_ms:.1f} ms + {each_ms:.1f} ms per image, at most {costs.most_per_s:.1f} images per second"
    )
    print("\n| replicas | load | images per second | p50 ms | p99 ms |\n| --- | --- | --- | --- | --- |")
    found["plan"] = plan(costs, print)
    if arguments.save:
        (RESULTS / f"{arguments.save}.json").write_text(json.dumps(found, indent=1) + "\n")


def print_checks(rows: Sequence[dict[str, object]]) -> None:
    """Print the comparisons of the simulation with the real server as a table."""
    print("| workers | load | p50 ms real / predicted | p95 ms | p99 ms | refused |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        real, predicted = row["real"], row["predicted"]
        assert isinstance(real, dict)
        assert isinstance(predicted, dict)
        ms = " | ".join(f"{real[key]:.0f} / {predicted[key]:.0f}" for key in ("p50_ms", "p95_ms", "p99_ms"))
        print(f"| {row['workers']} | {row['load']:.0%} | {ms} | {real['refused']:.1%} / {predicted['refused']:.1%} |")


if __name__ == "__main__":
    main()
