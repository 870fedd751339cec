"""Choose the device and the dtype of a model, and move it there."""

from __future__ import annotations

import torch

from ...families import FAMILIES
from ...model_info import ModelInfo
from ..kernels.cpu import preferred_cpu_dtype


def choose_device(wanted: str) -> torch.device:
    """Return the device.

    wanted: the name of a torch device, or `auto` for a CUDA GPU, else an Apple GPU, else the CPU.
    Raises ValueError, with a sentence for the operator, if there is no such device.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(wanted)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {wanted}: this torch ({torch.__version__}) sees no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {wanted}: this machine has only {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps: there is no Apple GPU; use --device cpu")
    return device


def choose_dtype(wanted: str, info: ModelInfo, device: torch.device, *, is_exact: bool) -> torch.dtype:
    """Return the dtype to compute in.

    wanted: `auto`, `float16`, `bfloat16` or `float32`.
    is_exact: the VAE can run on an exact coder.

    `auto` on a CPU means bfloat16 if the VAE can run on an exact coder and the CPU multiplies bfloat16 in hardware,
    else float32. `auto` on a GPU means the dtype of the family; where that is bfloat16 but the device cannot compute in
    it, float32.

    If config.json has `force_upcast`, float16 would overflow: `auto` then means bfloat16 instead of float16, and an
    explicit float16 becomes float32, as in `StableDiffusionXLPipeline`.
    """
    must_upcast = info.latents.force_upcast
    if wanted == "float16" and must_upcast:
        return torch.float32
    if wanted != "auto":
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype
    if device.type == "cpu":
        return preferred_cpu_dtype() if is_exact else torch.float32
    usual = FAMILIES[info.latents.family].gpu_dtype
    if usual == "float32" or (usual == "float16" and not must_upcast):
        return torch.float32 if usual == "float32" else torch.float16
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32


def move(vae: torch.nn.Module, device: torch.device) -> None:
    """Move a VAE to a device, except modules whose weights were freed."""
    for child in vae.children():
        if not any(weight.is_meta for weight in child.parameters()):
            child.to(device)
    for name, buffer in vae.named_buffers(recurse=False):
        setattr(vae, name, buffer.to(device))
    for weight in vae.parameters(recurse=False):
        weight.data = weight.data.to(device)
