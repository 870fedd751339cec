"""Which device and dtype a model runs in."""

from __future__ import annotations

import torch

from ...families import FAMILIES
from ...model_info import ModelInfo
from ..kernels.cpu import preferred_cpu_dtype


def choose_device(wanted: str) -> torch.device:
    """`auto` is the first CUDA device, then Apple's, then the CPU. Raises ValueError with a sentence."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(wanted)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {wanted}: this torch ({torch.__version__}) sees no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {wanted}: there are only {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps: not an Apple GPU; use --device cpu")
    return device


def choose_dtype(wanted: str, info: ModelInfo, device: torch.device, *, is_exact: bool) -> torch.dtype:
    """The dtype to compute in.

    `auto` on a CPU: bfloat16 where the exact decoder may run and the CPU multiplies it in hardware, else float32.
    `auto` on a GPU: the family's, but bfloat16 where the config asks to upcast (its activations overflow float16). An
    explicit float16 is upcast to float32 then, as `StableDiffusionXLPipeline` does.
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
