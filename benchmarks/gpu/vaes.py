"""The VAEs of the report: real diffusers classes with seeded random weights, of published size on a GPU."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import torch

from benchmarks.decode import full_size_vae
from benchmarks.families import CASES
from server.families import Family, family_of_class
from tests.pipelines import vaes

# A small VAE of the same class for each case of `benchmarks.families`.
SMALL = {
    "Wan 2.1": vaes.wan,
    "Wan 2.2 5B": vaes.wan_22,
    "Qwen-Image": vaes.qwen_image,
    "HunyuanVideo": vaes.hunyuan_video,
    "HunyuanVideo 1.5": vaes.hunyuan_video_15,
    "LTX-Video": vaes.ltx,
    "LTX-2": vaes.ltx2,
    "CogVideoX": vaes.cogvideox,
    "Mochi": vaes.mochi,
    "EasyAnimate": vaes.magvit,
}


def image_vae(device: str) -> tuple[Any, Family]:
    """Return an AutoencoderKL of the size of SD1, SDXL, SD3 and Flux on a device, or a small one on a CPU."""
    with torch.device(device):
        vae = vaes.kl() if device == "cpu" else full_size_vae(without=None)
    return vae.requires_grad_(False), family_of(vae)


def video_vae(case: str, device: str) -> tuple[Any, Family]:
    """Return the VAE of a case of `benchmarks.families` on a device, or a small one of its class on a CPU."""
    with torch.device(device), warnings.catch_warnings(action="ignore"):
        if device == "cpu":
            vae = SMALL[case]()
        else:
            torch.manual_seed(0)
            vae = getattr(diffusers, CASES[case].class_name)(**CASES[case].config).eval()
    if CASES[case].class_name == "AutoencoderKLHunyuanVideo":  # temporal tiles would give another result
        vae.use_framewise_decoding = vae.use_framewise_encoding = False
    return vae.requires_grad_(False), family_of(vae)


def family_of(vae: Any) -> Family:
    """Return the family of a VAE."""
    family = family_of_class(type(vae).__name__)
    assert family is not None
    return family
