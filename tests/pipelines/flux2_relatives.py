"""The models that took over FLUX.2's VAE: FLUX.3, ERNIE-Image, Ideogram 4, FIBO 2."""

from __future__ import annotations

from typing import Any

from diffusers.modular_pipelines.ernie_image.decoders import ErnieImageVaeDecoderStep
from diffusers.modular_pipelines.flux3.decoders import Flux3DecodeStep, Flux3UnpackLatentsStep
from diffusers.modular_pipelines.ideogram4.decoders import Ideogram4DecodeStep
from diffusers.modular_pipelines.ideogram4.denoise import Ideogram4AfterDenoiseStep

from tests.pipelines import vaes
from tests.pipelines.sample import Sample, noise, run_block

SIZE: dict[str, Any] = {"height": 64, "width": 48}
TOKENS = noise(1, 12, 128)
PATCHES = noise(1, 128, 4, 3)


def flux3() -> Sample:
    blocks = [Flux3UnpackLatentsStep(), Flux3DecodeStep()]
    return run_block("flux3", blocks, TOKENS, vae=vaes.flux2(), is_packed=True, **SIZE)


def ernie_image() -> Sample:
    """The batch norm has small variances, so that its eps shows."""
    vae = vaes.flux2()
    vae.bn.running_var.mul_(1e-2)
    vaes.brightened(vae, vae.decoder.conv_out, gain=8)
    return run_block("ernie-image", ErnieImageVaeDecoderStep(), PATCHES, vae=vae)


def ideogram4() -> Sample:
    blocks = [Ideogram4AfterDenoiseStep(), Ideogram4DecodeStep()]
    return run_block("ideogram4", blocks, TOKENS, vae=vaes.flux2(), is_packed=True, **SIZE)


def ideogram4_unpatched() -> Sample:
    return run_block("ideogram4-unpatched", Ideogram4DecodeStep(), noise(1, 32, 8, 6), vae=vaes.flux2())


SAMPLES = {
    "flux3": flux3,
    "ernie-image": ernie_image,
    "ideogram4": ideogram4,
    "ideogram4-unpatched": ideogram4_unpatched,
}
