"""The four hosted models' real weights against the values that diffusers' own remote-decode tests publish.

The latents are seeded on a CUDA device, as those tests seed them, so that elsewhere there is nothing to compare.
Source of the numbers: tests/remote/test_remote_decode.py of diffusers, measured on the hosted endpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.utils.remote_utils import remote_decode

from server.config import load_settings
from server.engine.weights.config_json import read_info
from server.engine.weights.hub import source_of
from server.errors import ModelUnavailable
from tests.conftest import Serve

pytestmark = [
    pytest.mark.hub,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="the published latents are seeded on a CUDA device"),
]


@dataclass(frozen=True)
class Published:
    """Of the corner of the first picture or frame: its first channel raw, and as uint8."""

    model: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    factors: dict[str, Any]
    raw: list[float]
    pixels: list[int]


FLUX = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
PUBLISHED = {
    "sd-v1": Published(
        "sd-v1", (1, 4, 64, 64), torch.float16, {"scaling_factor": 0.18215},
        [-0.2177, 0.0217, -0.2258, 0.0412, -0.1687, -0.1232, -0.2416, -0.2130, -0.0543],
        [100, 130, 99, 133, 106, 112, 97, 100, 121],
    ),
    "sd-xl": Published(
        "sd-xl", (1, 4, 128, 128), torch.float16, {"scaling_factor": 0.13025},
        [-0.3945, -0.3289, -0.2993, -0.6177, -0.5259, -0.4119, -0.5898, -0.4863, -0.3845],
        [77, 86, 89, 49, 60, 75, 52, 65, 78],
    ),
    "flux": Published(
        "flux", (1, 16, 128, 128), torch.bfloat16, FLUX,
        [0.5820, 0.5962, 0.5898, 0.5439, 0.5327, 0.5112, 0.4797, 0.4773, 0.3984],
        [202, 203, 203, 197, 195, 193, 189, 188, 178],
    ),
    "flux, packed": Published(
        "flux", (1, 4096, 64), torch.bfloat16, {**FLUX, "height": 1024, "width": 1024},
        [0.3198, 0.6631, 0.5864, 0.2131, 0.4944, 0.4482, 0.1776, 0.4153, 0.3176],
        [168, 212, 202, 155, 191, 185, 150, 180, 168],
    ),
    "hunyuan-video": Published(
        "hunyuan-video", (1, 16, 3, 40, 64), torch.float16, {"scaling_factor": 0.476986},
        [0.1656, 0.2661, 0.3157, 0.0693, 0.1755, 0.2252, 0.0127, 0.1221, 0.1708],
        [149, 161, 168, 136, 150, 156, 129, 143, 149],
    ),
}  # fmt: skip


def entry_of(model: str) -> dict[str, Any]:
    """The shipped entry; skips where its repository cannot be had."""
    settings = load_settings()
    try:
        read_info(source_of(settings, model))
    except ModelUnavailable as error:
        pytest.skip(error.detail)
    return settings.models[model].model_dump(exclude_defaults=True)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(("decoder", "within"), [("diffusers", 2e-3), ("auto", 2e-2)])
def test_real_weights_give_the_published_values(serve: Serve, name: str, decoder: str, within: float) -> None:
    """The exact decoder rounds half precision elsewhere than diffusers' own: within a hundredth, or two levels."""
    published = PUBLISHED[name]
    dtype = str(published.dtype).removeprefix("torch.")
    entry = entry_of(published.model) | {"dtype": dtype, "device": "cuda", "decoder": decoder}
    address = serve({published.model: entry}, request_timeout_s=1800)
    generator = torch.Generator("cuda").manual_seed(13)
    latents = torch.randn(published.shape, device="cuda", dtype=published.dtype, generator=generator).cpu()
    sample = remote_decode(address, latents, **published.factors, output_type="pt", return_type="pt")
    first = sample[0, 0, 0] if sample.ndim == 5 else sample[0, 0]  # [H, W]
    expected = torch.tensor(published.raw)
    torch.testing.assert_close(first[-3:, -3:].flatten().float(), expected, atol=within, rtol=within)
    pixels = remote_decode(
        address, latents, **published.factors, output_type="pt", return_type="pt", partial_postprocess=True
    )  # [B or F, H, W, C]
    off = pixels[0, -3:, -3:, 0].flatten().int() - torch.tensor(published.pixels)
    assert off.abs().max() <= 2
