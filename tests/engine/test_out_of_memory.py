"""What an encode does when memory runs out, on a device that has too little of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine import pipeline
from server.engine.coders.build import build_coder
from server.engine.coders.interface import Coded
from server.engine.loaded_model import LoadedModel
from server.families import family_of_class
from server.model_info import Direction, LoadedInfo
from tests.engine.live import LiveBytes
from tests.pipelines import vaes

PIXELS = torch.rand(1, 3, 5, 1024, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1  # [B, C, F, H, W]


class FullDevice:
    """Runs an encoder on a device on which every encode runs out of memory at its end, until `fits` attempts."""

    def __init__(self, choice: str, fits: int) -> None:
        vae = copy.deepcopy(vaes.wan())
        family = family_of_class(type(vae).__name__)
        assert family is not None
        self.coder: Any = build_coder(vae, family, Direction.ENCODE, choice, "none")[0]
        self.fits = fits
        self.budgets: list[int | None] = []
        self.peaks: list[int] = []
        spec = family.describe(vae.config)
        self.model: LoadedModel[Any] = LoadedModel(
            self.coder, family, spec, torch.device("cpu"), torch.float32, 0, LoadedInfo("cpu", "float32")
        )

    def compute(self, budget_bytes: int | None, _emit: Any) -> Coded:
        self.budgets.append(budget_bytes)
        with LiveBytes() as live:
            coded: Coded = self.coder.encode(PIXELS, budget_bytes=budget_bytes)
        self.peaks.append(live.most)
        if len(self.peaks) < self.fits:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return coded

    def encode(self) -> tuple[Tensor, tuple[str, ...]]:
        return pipeline._within_memory(self.model, None, self.compute)


def test_each_attempt_of_our_encoder_has_a_smaller_budget_and_a_smaller_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FullDevice("auto", fits=3)
    with LiveBytes() as live:
        expected = device.coder.encode(PIXELS).tensor
    monkeypatch.setattr(pipeline, "free_bytes", lambda _device: live.most)
    found, steps = device.encode()
    assert steps == ("free_caches", "smallest_bands")
    assert device.budgets == [None, live.most // 2, pipeline.SMALLEST_BUDGET_BYTES]
    assert device.peaks[0] > 1.3 * device.peaks[1] > 1.3 * 1.3 * device.peaks[2]
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


def test_an_encode_that_fits_nowhere_fails_after_the_smallest_attempt() -> None:
    device = FullDevice("auto", fits=4)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        device.encode()
    assert device.budgets[-1] == pipeline.SMALLEST_BUDGET_BYTES


def test_diffusers_own_encoder_does_not_repeat_the_same_allocations() -> None:
    device = FullDevice("diffusers", fits=2)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        device.encode()
    assert len(device.peaks) == 1
