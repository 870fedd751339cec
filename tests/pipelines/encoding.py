"""How a pipeline's own image preparation is called: on the real class, with no parts but a VAE and a silent scheduler."""

from __future__ import annotations

import inspect
from copy import deepcopy
from typing import Any

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, FlowMatchEulerDiscreteScheduler

from tests.pipelines.sample import Sample, quiet

CPU: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
ONE_PICTURE: dict[str, Any] = {"batch_size": 1, "num_images_per_prompt": 1}


def bare(pipeline: Any, vae: Any, **parts: Any) -> Any:
    """The pipeline with None for every part that is neither given nor optional."""
    parameters = inspect.signature(pipeline).parameters.values()
    absent = {part.name: None for part in parameters if part.default is inspect.Parameter.empty}
    with quiet():
        return pipeline(**absent | {"vae": vae} | parts)


def certain(vae: Any) -> Any:
    """A copy whose posterior has no width: most pipelines sample it, which then gives its mode."""
    copy = deepcopy(vae)
    if isinstance(copy, AutoencoderTiny):  # it has no posterior
        return copy
    last = copy.quant_conv if getattr(copy, "quant_conv", None) is not None else copy.encoder.conv_out
    last = getattr(last, "conv", last)
    means = next(copy.config[key] for key in ("latent_channels", "z_dim", "z_channels") if key in copy.config)
    with torch.no_grad():
        last.weight[means:] = 0
        last.bias[means:] = -30  # log-variances
    return copy


def vae_input(sample: Sample) -> torch.Tensor:
    """The sample's pixels as `vae.encode` takes them: [B, C, H, W] or [B, C, F, H, W], in [-1, 1]."""
    pixels = 2 * sample.pixels - 1
    return pixels.transpose(1, 2) if pixels.ndim == 5 else pixels


def silent() -> Any:
    """A scheduler whose `add_noise` adds none."""
    return DDIMScheduler(trained_betas=[0.0, 0.0], steps_offset=1)


def silent_flow() -> Any:
    """A scheduler whose `scale_noise` adds none."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.0])
    return scheduler


START = torch.tensor([0])
"""The first timestep of either."""


def size(pixels: torch.Tensor) -> dict[str, int]:
    return {"height": pixels.shape[-2], "width": pixels.shape[-1]}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)
