"""The simulation of benchmarks/scaling.py, where queueing theory knows the answer."""

from __future__ import annotations

import random

import numpy as np
import pytest

from benchmarks.scaling import Costs, bursts, simulate


def poisson(per_s: float, count: int) -> list[float]:
    return list(np.cumsum(np.random.default_rng(0).exponential(1 / per_s, count)))


@pytest.mark.parametrize("load", [0.3, 0.7, 0.9])
def test_one_device_waits_as_an_md1_queue_does(load: float) -> None:
    """Pollaczek and Khinchine: with a fixed service time the mean wait is load / (2 (1 - load)) services."""
    costs = Costs(first_s=0.0, each_s=0.1, spread=0.0, max_batch=1, max_queue=10**9)
    found = simulate(poisson(load / 0.1, 60_000), 1, costs)
    waited_s = np.mean(found.latencies_s) - 0.1
    assert waited_s == pytest.approx(0.1 * load / (2 * (1 - load)), rel=0.1)


def test_what_a_full_queue_cannot_take_is_refused() -> None:
    costs = Costs(first_s=0.0, each_s=0.1, spread=0.0, max_batch=1, max_queue=16)
    found = simulate(poisson(20, 20_000), 1, costs).summary()
    assert found["refused"] == pytest.approx(0.5, abs=0.01), "twice of what it can do"
    assert found["p99_ms"] == pytest.approx(1600, rel=0.05), "the whole queue"


def test_a_batch_shares_its_first_cost() -> None:
    costs = Costs(first_s=0.1, each_s=0.01, spread=0.0, max_batch=16, max_queue=10**9)
    together = simulate([0.0] + [0.001] * 16, 1, costs)
    assert sorted(together.latencies_s)[-1] == pytest.approx(0.109 + 0.26, abs=0.001)


def test_two_replicas_wait_less_than_one_at_the_same_load() -> None:
    costs = Costs(first_s=0.0, each_s=0.1, spread=0.2, max_batch=1, max_queue=10**9)
    one, two = (simulate(poisson(8 * replicas, 20_000), replicas, costs).summary() for replicas in (1, 2))
    assert two["p95_ms"] < one["p95_ms"]


def test_bursts_come_at_the_rate_asked_for_and_not_evenly() -> None:
    times = bursts(50, 2000, random.Random(0))
    assert len(times) / 2000 == pytest.approx(50, rel=0.05)
    seconds = np.bincount(np.asarray(times, int), minlength=2000)
    assert seconds.var() > 2 * seconds.mean(), "a Poisson process has as much variance as mean"
