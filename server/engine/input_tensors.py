"""Turn the tensor of a request into the input of a VAE, on its device and in its dtype."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..errors import BadRequest, FreedMemory, NonFiniteInput
from ..model_info import Direction
from ..values import Request
from .freed_memory import ADVICE, looks_freed
from .loaded_model import LoadedModel
from .tensors import NAMES, to_device

# The largest float pixel that is accepted. Pixels are in [-1, 1]; resampling can exceed that, but not by this much.
LARGEST_PIXEL = 2.0


def input_tensor(model: LoadedModel[Any], request: Request) -> torch.Tensor | BadRequest:
    """Return latents `[B, C, (F,) h, w]` to decode, or pixels `[B, C, (F,) H, W]` in [-1, 1] to encode.

    Returns an error instead if values are not finite or out of range, or come from memory that the client freed.
    """
    return _pixels(model, request) if request.job.direction is Direction.ENCODE else _latents(model, request)


def _latents(model: LoadedModel[Any], request: Request) -> torch.Tensor | BadRequest:
    job = request.job
    sent = to_device(request.tensor, model.device)
    if job.scaling.is_from_comfyui:
        latents = model.family.comfyui_latents_in(sent, model.spec, job.geometry).to(model.dtype)
    else:
        latents = model.family.latents_in(sent, model.spec, job.geometry, job.scaling).to(model.dtype)
    if is_finite(sent) and looks_freed(request.tensor, sent):
        return _freed("latents")
    if is_finite(latents):
        return latents
    bad = int((~torch.isfinite(latents)).sum())
    return NonFiniteInput(
        f"{bad} of {latents.numel()} latent values are NaN or infinite after unscaling to {NAMES[model.dtype]}; "
        f"send finite latents, and check scaling_factor and dtype{_hint('latents', sent)}"
    )


def is_finite(values: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite."""
    return bool(torch.isfinite(values).all())


def _freed(name: str) -> FreedMemory:
    return FreedMemory(f"a few values of the {name} come from memory that the client had freed; {_advice(name)}")


def _hint(name: str, sent: torch.Tensor) -> str:
    """Return advice for the error if few values are NaN or infinite: freed memory is one possible cause."""
    bad = int((~torch.isfinite(sent)).sum())
    return f"; {_advice(name)}" if 0 < bad <= sent.numel() / 2 else ""


def _advice(name: str) -> str:
    return ADVICE.format(name=name)


def _pixels(model: LoadedModel[Any], request: Request) -> torch.Tensor | BadRequest:
    job = request.job
    sent = to_device(request.tensor, model.device)
    pixels = ordered(sent, job.pixel_axes, model.spec.kind == "video")
    if job.dtype == "uint8":
        pixels = pixels / 255 * 2 - 1  # bit-identical to `VaeImageProcessor.preprocess`
    elif not is_finite(pixels):
        hint = _hint("image", sent)
        return NonFiniteInput(f"some pixels are NaN or infinite; send finite values in [-1, 1]{hint}")
    elif looks_freed(request.tensor, sent):
        return _freed("image")
    elif (largest := float(pixels.abs().max())) > LARGEST_PIXEL:
        return BadRequest(f"float pixels must be in [-1, 1], but these reach {largest:g}; send uint8, or x / 127.5 - 1")
    if pixels.shape[1] < model.spec.image_channels:  # add an opaque alpha channel
        pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)
    return fitted(pixels, job.geometry.height, job.geometry.width).to(model.dtype)


def ordered(pixels: torch.Tensor, order: str, is_video: bool) -> torch.Tensor:
    """Return pixels as `[B, C, H, W]`, or as `[B, C, F, H, W]` for a video model.

    order: the axes as they were sent, one letter each, without B or F if the tensor has only one image or frame.
    """
    missing = [axis for axis in "BF" if axis not in order]
    pixels = pixels.reshape(*[1] * len(missing), *pixels.shape)
    axes = "".join(missing) + order
    pixels = pixels.permute(*[axes.index(axis) for axis in "BCFHW"])  # [B, 3, F, H, W]
    return pixels if is_video else pixels[:, :, 0]


def fitted(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize pixels by taking the nearest pixel, as `VaeImageProcessor.resize` does with tensors."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    frames = pixels.flatten(0, -4) if pixels.ndim == 4 else pixels.transpose(1, 2).flatten(0, 1)  # [N, 3, H, W]
    frames = F.interpolate(frames, (height, width))  # [N, 3, H', W']
    if pixels.ndim == 4:
        return frames
    videos = frames.reshape(len(pixels), -1, *frames.shape[1:])  # [B, F, 3, H', W']
    return videos.transpose(1, 2)
