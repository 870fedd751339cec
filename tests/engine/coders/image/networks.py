"""Small seeded AutoencoderKLs of every kind a decoder or an encoder can be, and latents and pixels for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from server.engine.coders.image.decoder import ExactKLDecoder
from server.engine.coders.image.encoder import ExactKLEncoder

CONFIGS: dict[str, dict[str, Any]] = {
    "sd": {"block_out_channels": (32, 64, 64), "layers_per_block": 2},
    "no-quant": {
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    },
    "no-attention": {"block_out_channels": (16, 32), "layers_per_block": 1, "mid_block_add_attention": False},
    "flux-channels": {"block_out_channels": (32, 64), "layers_per_block": 1, "latent_channels": 16},
    "one-block": {"block_out_channels": (64,), "layers_per_block": 1},
    "odd-groups": {"block_out_channels": (24, 48), "layers_per_block": 1, "norm_num_groups": 8},
    "grey": {"block_out_channels": (16, 32), "layers_per_block": 1, "out_channels": 1, "in_channels": 1},
}


def build(name: str, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    config = {"latent_channels": 4, "norm_num_groups": 16, **CONFIGS[name]}
    blocks = len(config["block_out_channels"])
    torch.manual_seed(list(CONFIGS).index(name))
    vae = AutoencoderKL(
        up_block_types=("UpDecoderBlock2D",) * blocks, down_block_types=("DownEncoderBlock2D",) * blocks, **config
    )
    for module in (*vae.decoder.modules(), *vae.encoder.modules()):
        if isinstance(module, torch.nn.GroupNorm):  # diffusers starts them as 1 and 0, which would hide a mix-up
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
        elif isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.bias.data.normal_(0, 0.2)
    return torch.nn.Module.to(vae.eval(), dtype)  # diffusers' own `to` logs a warning each time


def exact(vae: AutoencoderKL, **keys: Any) -> ExactKLDecoder:
    """Of a copy: the decoder takes the weights away."""
    return ExactKLDecoder(copy.deepcopy(vae), **keys)


def exact_encoder(vae: AutoencoderKL, **keys: Any) -> ExactKLEncoder:
    """Of a copy: the encoder takes the weights away."""
    return ExactKLEncoder(copy.deepcopy(vae), **keys)


def latents_for(vae: AutoencoderKL, batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * height + width)
    shape = (batch, vae.config.latent_channels, height, width)
    return torch.randn(shape, generator=generator).to(vae.device, vae.dtype)  # [B, C, h, w]


def pixels_for(vae: AutoencoderKL, batch: int, height: int, width: int) -> Tensor:
    """That encode to latents of height x width."""
    generator = torch.Generator().manual_seed(1000 * height + width)
    ratio = 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (batch, vae.config.in_channels, ratio * height, ratio * width)
    return (2 * torch.rand(shape, generator=generator) - 1).to(vae.device, vae.dtype)  # [B, C, H, W]


def stock_encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    with torch.inference_mode():
        return vae.encode(pixels).latent_dist.parameters  # [B, 2 C, h, w]


def stock(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    with torch.inference_mode():
        return vae.decode(latents).sample  # [B, C, H, W]


def psnr(image: Tensor, reference: Tensor) -> float:
    peak = reference.max() - reference.min()
    return float(10 * torch.log10(peak**2 / (image.float() - reference).square().mean()))
