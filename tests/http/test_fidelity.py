"""The pictures are as bright and as colourful as a local decode's: people had dark and pale ones from other servers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.remote_utils import remote_decode, remote_encode
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import REPOSITORY, Serve
from tests.vaes import LocalVae

DEMO = REPOSITORY / "server" / "demo"


def look(image: Image.Image) -> np.ndarray:
    """Mean saturation and brightness, in levels of 255."""
    return np.asarray(image.convert("HSV"), float)[..., 1:].mean((0, 1))


def locally(vae: AutoencoderKL, latents: torch.Tensor) -> Image.Image:
    with torch.no_grad():
        sample = vae.decode(latents.float(), return_dict=False)[0]
    image: Image.Image = VaeImageProcessor().postprocess(sample, output_type="pil")[0]
    return image


@pytest.mark.parametrize("sample", sorted((DEMO / "latents").glob("*.safetensors")), ids=lambda path: path.stem)
def test_a_png_of_the_demo_looks_as_a_local_decode_does(serve: Serve, sample: Path) -> None:
    vae = AutoencoderKL.from_pretrained(DEMO).eval()
    latents = load_file(sample)["latents"]
    expected = look(locally(vae, latents.float() / vae.config.scaling_factor))
    for dtype, within in [("float32", [0.005, 0.005]), ("bfloat16", [1, 0.05])]:  # noise of rounding is some colour
        address = serve({"demo": {"repo": str(DEMO), "dtype": dtype}})
        png = remote_decode(address, latents, scaling_factor=vae.config.scaling_factor, image_format="png")
        assert (np.abs(look(png) - expected) < within).all(), dtype


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_a_png_of_any_kind_of_scaling_looks_as_a_local_decode_does(
    url: str, vaes: dict[str, LocalVae], name: str
) -> None:
    latents = vaes[name].latents(16, 16)
    png = remote_decode(url + name, latents, scaling_factor=0.7, shift_factor=0.1, image_format="png")
    assert np.abs(look(png) - look(locally(vaes[name].module, latents / 0.7 + 0.1))).max() < 0.005


def test_a_picture_survives_the_way_there_and_back(serve: Serve) -> None:
    """The demo encodes the picture that it decoded, and decodes it again, to nearly the same."""
    address = serve({"demo": {"repo": str(DEMO), "dtype": "float32"}})
    latents = load_file(DEMO / "latents" / "astronaut.safetensors")["latents"]
    first = remote_decode(address, latents, scaling_factor=0.37304, image_format="png")

    again = remote_encode(address + "encode", first, scaling_factor=0.37304)
    second = remote_decode(address, again, scaling_factor=0.37304, image_format="png")
    assert again.shape == latents.shape
    error = (np.asarray(first, float) - np.asarray(second, float)) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 25
    assert np.abs(look(first) - look(second)).max() < 3
