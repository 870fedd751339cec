"""Choose the device and the dtype of a model, and move it there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...families import FAMILIES
from ...model_info import ModelInfo
from ..kernels.cpu import preferred_cpu_dtype
from ..tensors import DTYPES


def choose_device(wanted: str) -> torch.device:
    """Return the device. A CUDA device has a number, so that the same device always compares as equal.

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
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@dataclass(frozen=True)
class Precision:
    """The dtype of a model's weights and activations.

    allows_tf32: a GPU may round the factors of float32 convolutions to TensorFloat-32, which keeps ten bits of the
        mantissa, as torch does by default. A user who chooses float32 expects its full precision.
    reason: why it was chosen, one sentence for `GET /models`.
    """

    dtype: torch.dtype
    reason: str
    allows_tf32: bool = False


UPCAST = Precision(
    torch.float32, "The model is loaded again in float32, because its result in half precision was not finite."
)


def choose_precision(wanted: str, info: ModelInfo, device: torch.device, *, is_exact: bool) -> Precision:
    """Return the precision to compute in.

    wanted: `auto`, `float16`, `bfloat16` or `float32`.
    is_exact: the VAE can run on an exact coder.

    `auto` on a CPU means bfloat16 if the VAE can run on an exact coder and the CPU multiplies bfloat16 in hardware,
    else float32. `auto` on a GPU means the dtype of the family; where that is bfloat16 but the device cannot compute in
    it, float32. Where the GPU has TensorFloat-32, float32 uses it, because otherwise it would be slower than the user's
    own pipeline.

    If config.json has `force_upcast`, float16 would overflow: `auto` then means bfloat16 instead of float16, and an
    explicit float16 becomes float32, as in `StableDiffusionXLPipeline`.

    Raises ValueError, with a sentence for the operator, for a dtype that the device lacks.
    """
    must_upcast = info.latents.force_upcast
    if wanted == "float16" and must_upcast:
        return Precision(torch.float32, "config.json has force_upcast: float16, which was asked for, would overflow.")
    if wanted == "bfloat16" and device.type == "cuda" and not has_bfloat16(device):
        raise ValueError("dtype bfloat16: this GPU is too old to compute in it; set dtype: auto, float16 or float32")
    if wanted != "auto":
        return Precision(DTYPES[wanted], "It was asked for in models.yaml or with --dtype.")
    if device.type == "cpu":
        return _on_cpu(is_exact)
    return _on_gpu(FAMILIES[info.latents.family].gpu_dtype, must_upcast, device)


def _on_cpu(is_exact: bool) -> Precision:
    if not is_exact:
        return Precision(torch.float32, "dtype auto: on a CPU, classes without layers of our own run in float32.")
    if preferred_cpu_dtype() is torch.float32:
        return Precision(torch.float32, "dtype auto: this CPU does not multiply bfloat16 in hardware.")
    return Precision(torch.bfloat16, "dtype auto: this CPU multiplies bfloat16 in hardware.")


def _on_gpu(usual: str, must_upcast: bool | None, device: torch.device) -> Precision:
    """Return the usual dtype of a family, or what the device and the checkpoint allow."""
    if usual == "float32":
        reason = "dtype auto: this family's pipelines decode in float32, with TensorFloat-32 where the GPU has it."
        return Precision(torch.float32, reason, allows_tf32=True)
    if usual == "float16" and not must_upcast:
        return Precision(torch.float16, "dtype auto: the usual dtype of this family on a GPU.")
    if device.type == "cuda" and has_bfloat16(device):
        why = "config.json has force_upcast" if usual == "float16" else "the usual dtype of this family on a GPU"
        return Precision(torch.bfloat16, f"dtype auto: {why}.")
    reason = "dtype auto: this device does not multiply bfloat16 in hardware."
    return Precision(torch.float32, reason, allows_tf32=True)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a CUDA GPU multiplies bfloat16 in hardware."""
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(False))


def move(vae: torch.nn.Module, device: torch.device) -> None:
    """Move a VAE to a device, except modules whose weights were freed."""
    for child in vae.children():
        if not any(weight.is_meta for weight in child.parameters()):
            child.to(device)
    for name, buffer in vae.named_buffers(recurse=False):
        setattr(vae, name, buffer.to(device))
    for weight in vae.parameters(recurse=False):
        weight.data = weight.data.to(device)
