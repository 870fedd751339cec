"""The server's device path on a CUDA device; `make test-gpu` runs these, other machines skip them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils.remote_utils import remote_decode

from server.config import load_settings
from server.contract import Parameters
from server.engine.models import LoadedModels
from server.errors import TooLargeForDevice
from server.families import FAMILIES
from server.values import Geometry, Request
from tests.conftest import Serve, write_models_yaml
from tests.requests import decode_job
from tests.vaes import LocalVae

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
Vaes = dict[str, LocalVae]


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "hunyuan"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.15), ("float16", 0.02)])
def test_a_gpu_decodes_what_a_cpu_does(serve: Serve, vaes: Vaes, name: str, dtype: str, tolerance: float) -> None:
    if (name, dtype) == ("sdxl", "float16"):
        tolerance = 1e-4  # it must upcast
    address = serve({name: {"repo": str(vaes[name].folder), "dtype": dtype, "device": "cuda", "preload": True}})
    latents = vaes[name].latents(*([3, 8, 12] if name == "hunyuan" else [8, 12]))
    sample = remote_decode(address, latents, scaling_factor=0.7, output_type="pt", return_type="pt")
    expected = vaes[name].decode(latents / 0.7)
    torch.testing.assert_close(sample.float(), expected, atol=tolerance, rtol=tolerance)
    pixels = remote_decode(
        address, latents, scaling_factor=0.7, output_type="pt", return_type="pt", partial_postprocess=True
    )
    unit = (sample.float() / 2 + 0.5).clamp(0, 1).mul(255).round()
    unit = unit[0].movedim(0, -1) if name == "hunyuan" else unit.movedim(1, -1)
    assert np.abs(pixels.numpy().astype(int) - unit.numpy()).max() <= 1


def test_a_decode_that_does_not_fit_is_refused_and_the_next_one_goes_on(vaes: Vaes, tmp_path: Path) -> None:
    models = {"sd": {"repo": str(vaes["sd"].folder), "device": "cuda", "decoder": "diffusers"}}
    engine = LoadedModels(load_settings(config=write_models_yaml(tmp_path / "models.yaml", models, "sd")))

    def request(side: int) -> Request:
        shape = (1, 4, side, side)
        geometry: Geometry = FAMILIES["kl"].decode_geometry(engine.describe("sd").latents, shape, Parameters([]))
        return Request(decode_job("sd", geometry), memoryview(bytes(16 * side * side)))

    engine.run([request(16)])
    torch.cuda.set_per_process_memory_fraction(0.02)
    try:
        assert isinstance(engine.run([request(2048)])[0], TooLargeForDevice)
        assert engine.run([request(16)])[0].body.shape == (1, 128, 128, 3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
