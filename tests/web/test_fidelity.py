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
SAMPLES = sorted((DEMO / "latents").glob("*.safetensors"))


def look(image: Image.Image) -> np.ndarray:
    """Return the means of red, green, blue and of the colourfulness, in levels of 255.

    Colourfulness is a pixel's largest channel minus its smallest. HSV's saturation divides that by the largest
    channel, so that one level more in one channel of a nearly black pixel changes it by up to 255 levels.
    """
    pixels = np.asarray(image, float)  # [H, W, 3]
    return np.array([*pixels.mean((0, 1)), np.ptp(pixels, -1).mean()])


def psnr(image: Image.Image, reference: Image.Image) -> float:
    error = (np.asarray(image, float) - np.asarray(reference, float)) ** 2
    return float(10 * np.log10(255**2 / error.mean()))


def locally(vae: AutoencoderKL, latents: torch.Tensor) -> Image.Image:
    with torch.no_grad():
        sample = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    image: Image.Image = VaeImageProcessor().postprocess(sample.float(), output_type="pil")[0]
    return image


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.stem)
def test_a_float32_png_of_the_demo_looks_like_a_local_decode(serve: Serve, sample: Path) -> None:
    vae = AutoencoderKL.from_pretrained(DEMO).eval()
    latents = load_file(sample)["latents"]
    expected = locally(vae, latents.float() / vae.config.scaling_factor)
    address = serve({"demo": {"repo": str(DEMO), "dtype": "float32"}})
    png = remote_decode(address, latents, scaling_factor=vae.config.scaling_factor, image_format="png")
    assert np.abs(look(png) - look(expected)).max() < 0.005


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.stem)
def test_a_bfloat16_png_of_the_demo_is_no_further_from_float32_than_diffusers_own(serve: Serve, sample: Path) -> None:
    """Compare with diffusers' bfloat16 decode on this machine, because each kind of CPU rounds in its own way."""
    vae = AutoencoderKL.from_pretrained(DEMO).eval()
    latents, factor = load_file(sample)["latents"], vae.config.scaling_factor
    reference = locally(vae, latents.float() / factor)
    theirs = locally(torch.nn.Module.to(vae, torch.bfloat16), latents.float() / factor)

    address = serve({"demo": {"repo": str(DEMO), "dtype": "bfloat16"}})
    ours = remote_decode(address, latents, scaling_factor=factor, image_format="png")
    assert psnr(ours, reference) > psnr(theirs, reference) - 0.3
    assert (np.abs(look(ours) - look(reference)) < np.abs(look(theirs) - look(reference)) + 0.1).all()


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
    assert psnr(second, first) > 25
    assert np.abs(look(first) - look(second)).max() < 3
