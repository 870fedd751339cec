"""When a coder records a CUDA graph, keeps it, and drops it. The recorder here records nothing and only counts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from server.engine.coders.image import exact_coder
from server.engine.coders.image import plan as plans
from server.engine.coders.image.plan import fit, footprint, wanted
from server.engine.graphs import Function, Graphs, Recording, clear_graphs, graph_bytes
from server.values import Layout
from tests.engine.coders.image.networks import build, exact, latents_for

DEVICE = torch.device("cpu")
POOL = 1 << 20


class CountingRecorder:
    """Its recordings compute the function again; each holds `size` bytes. broken: recording raises."""

    def __init__(self) -> None:
        self.device, self.held_bytes = DEVICE, 0
        self.recorded, self.size = 0, POOL
        self.broken = False

    def record(self, function: Function, x: Tensor) -> Recording:
        self.recorded += 1
        if self.broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.held_bytes += self.size
        return function

    def forget(self) -> None:
        self.held_bytes = 0


@pytest.fixture
def recorder() -> Iterator[CountingRecorder]:
    recorder = CountingRecorder()
    yield recorder
    recorder.forget()


def double(x: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * x, torch.tensor(True)


def run(graphs: Graphs, key: object) -> float:
    return float(graphs.run(key, double, torch.tensor(3.0))[0])


def test_a_shape_is_recorded_when_it_comes_for_the_second_time(recorder: CountingRecorder) -> None:
    graphs = Graphs(recorder)
    counts = []
    for _ in range(4):
        assert run(graphs, "shape") == 6
        counts.append(recorder.recorded)
    assert counts == [0, 1, 1, 1]


def test_a_recording_that_fails_is_not_tried_again(
    recorder: CountingRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = Graphs(recorder)
    recorder.broken = True
    assert [run(graphs, "shape") for _ in range(5)] == [6] * 5
    assert recorder.recorded == 1
    assert len(graphs) == 0
    assert caplog.text.count("this size runs without one") == 1
    recorder.broken = False
    assert [run(graphs, "other") for _ in range(3)] == [6] * 3
    assert len(graphs) == 1


def test_the_least_recently_used_recording_is_dropped(recorder: CountingRecorder) -> None:
    graphs = Graphs(recorder, limit=2)
    for key in "aabbaacc":
        run(graphs, key)
    assert len(graphs) == 2
    before = recorder.recorded
    run(graphs, "a")
    assert recorder.recorded == before
    run(graphs, "b")  # was dropped; the other two were used since it came last
    assert recorder.recorded == before
    run(graphs, "b")
    assert recorder.recorded == before + 1


def test_more_shapes_in_rotation_than_are_kept_are_not_recorded_again_and_again(recorder: CountingRecorder) -> None:
    graphs, rounds = Graphs(recorder, limit=8), 5
    for _ in range(rounds):
        for key in range(12):
            assert run(graphs, key) == 6
    assert recorder.recorded == 8
    for key in range(100, 108):  # other shapes take their places at once
        assert [run(graphs, key) for _ in range(2)] == [6, 6]
    assert recorder.recorded == 16


def test_the_memory_of_all_coders_graphs_is_counted_and_freed(recorder: CountingRecorder) -> None:
    other = CountingRecorder()
    all_graphs = Graphs(recorder), Graphs(other)
    for graphs in all_graphs:
        for key in "aabb":
            run(graphs, key)
    assert graph_bytes(DEVICE) == 4 * POOL
    assert graph_bytes(torch.device("cuda:1")) == 0
    clear_graphs(torch.device("cuda:1"))
    assert graph_bytes(DEVICE) == 4 * POOL
    clear_graphs(DEVICE)
    assert graph_bytes(DEVICE) == 0
    assert [len(graphs) for graphs in all_graphs] == [0, 0]


def test_budgets_that_differ_a_little_give_few_plans() -> None:
    """Each plan is a key of its own, so a hundred plans would be a hundred recordings."""
    network = exact(build("sd")).network
    need = footprint(network, 128, 128)
    ideal = plans.Plan(1, 2, need.largest, plans.SCORES_BYTES)
    budgets = range(need.peak(ideal) // 4, need.peak(ideal), need.peak(ideal) // 133)
    found = {fit(need, ideal, budget) for budget in budgets}
    assert len(budgets) == 100
    assert len(found) <= 8


def test_a_recording_does_not_shrink_the_plan_of_its_own_shape(
    recorder: CountingRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a small GPU the memory of a recording is missing to the next plan, but the recording already has it."""
    vae = build("sd")
    coder, latents = exact(vae), latents_for(vae, 1, 8, 8)
    coder.graphs = Graphs(recorder)
    ample = coder.peak_bytes(1, 8, 8, 1 << 40)
    recorder.size = ample
    monkeypatch.setattr(exact_coder, "free_bytes", lambda _device, own=0: ample - graph_bytes(DEVICE) + own)
    for _ in range(5):
        coder.decode(latents, Layout.SAMPLE)
    assert recorder.recorded == 1
    assert coder.plan(1, 8, 8) != coder.plan(1, 8, 8, ample)  # which another shape gets meanwhile


def test_a_band_on_a_gpu_has_at_most_a_gigabyte() -> None:
    network = exact(build("sd")).network
    need = footprint(network, 4096, 4096)
    assert need.largest > 1 << 30
    meta = type("Network", (), {"device": torch.device("cuda"), "dtype": torch.bfloat16})()
    assert wanted(need, 4, meta).band_bytes == 1 << 30
