"""Load the weights of one direction of a VAE from safetensors files. Pickle files are never read."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import diffusers
import torch
from safetensors import SafetensorError, safe_open

from ...model_info import Direction, ModelInfo
from .config_json import OTHER_PARTS
from .hub import CONFIG, WEIGHTS, Source

LFS_POINTER = b"version https://git-lfs"
NAMES_SHOWN = 3

# While diffusers builds a module without memory, it patches torch's modules. Two builds at the same time would leave
# them patched forever.
BUILDING = threading.Lock()
# For missing and unused tensors diffusers logs several lines that advise to train the model. `_check` reports them
# instead.
diffusers.utils.logging.set_verbosity_error()


def load_vae(info: ModelInfo, source: Source, dtype: torch.dtype, direction: Direction) -> torch.nn.Module:
    """Load the real diffusers module on the CPU, in evaluation mode, with the weights of one direction.

    The modules of the other direction stay, without weights, because some VAEs count the layers of both. The weights
    are copies in `dtype`, so later changes of the file do not affect them. Raises ModelUnavailable if the files cannot
    be read, or if a tensor of this direction is missing, is not finite, or overflows `dtype`. Raises MemoryError or
    OutOfMemoryError if there is not enough memory.
    """
    folder = source.folder()
    model_class = getattr(diffusers, info.class_name)
    try:
        _check_files(folder)
        with BUILDING:
            vae, found = model_class.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=True, output_loading_info=True
            )
        let_go(vae, OTHER_PARTS[direction])
        _check(vae, frozenset(found["missing_keys"]), direction, source)
        _convert(vae, dtype, source)
        loaded: torch.nn.Module = vae.eval().requires_grad_(False)
        return loaded
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        advice = "let this user read them" if isinstance(error, PermissionError) else "download the model again"
        raise source.failure(f"the weights do not load ({reason}); {advice}") from error


def _check_files(folder: Path) -> None:
    """Raise SafetensorError or ValueError if a file is damaged. diffusers itself would not tell the reason."""
    for path in sorted(path for pattern in WEIGHTS[:2] for path in folder.glob(pattern)):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            with path.open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise ValueError(f"{path.name} is a pointer of Git LFS; run `git lfs pull`") from None
            raise SafetensorError(f"{path.name}: {error}") from None


def let_go(vae: torch.nn.Module, parts: Sequence[str]) -> None:
    """Free the weights of the modules with these names."""
    for part in parts:
        module = getattr(vae, part, None)
        if module is not None:
            module.to("meta")


def _tensors(vae: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all parameters and buffers of the VAE with their names. Buffers may hold the statistics of the latents."""
    yield from vae.named_parameters()
    yield from vae.named_buffers()


def _check(vae: torch.nn.Module, missing_keys: frozenset[str], direction: Direction, source: Source) -> None:
    """Raise ModelUnavailable unless all tensors of this direction were in the file, with finite values.

    missing_keys: the names that diffusers did not find. Integer tensors, such as the counter of a batch norm, may be
        missing, because decoding and encoding do not use them.
    """
    ours = [(name, tensor) for name, tensor in _tensors(vae) if name.split(".")[0] not in OTHER_PARTS[direction]]
    missing = [name for name, tensor in ours if name in missing_keys and tensor.is_floating_point()]
    if missing:
        sentence = f"the weights lack {_some(missing)}, which its {CONFIG} asks for; do both belong to the same model?"
        raise source.failure(sentence)
    bad = [name for name, tensor in ours if not torch.isfinite(tensor).all()]
    if bad:
        raise source.failure(f"the weights are NaN or infinite in {_some(bad)}; download or save the model again")


def _convert(vae: torch.nn.Module, dtype: torch.dtype, source: Source) -> None:
    """Copy every tensor, and convert it to `dtype` if it holds floats, or to float32 where diffusers insists on it.

    diffusers' `torch_dtype` is not used, because it changes torch's default dtype while another model may be decoding.
    Tensors that have the dtype already are copied too, because they would otherwise stay mapped to the file: a write to
    the file would change results or crash the process. Raises ModelUnavailable if finite values overflow.
    """
    overflowing = []
    pinned = _pinned(vae)
    for name, tensor in _tensors(vae):
        if tensor.is_meta:
            continue
        wanted = torch.float32 if name in pinned else dtype
        tensor.data = tensor.data.to(wanted if tensor.is_floating_point() else tensor.dtype, copy=True)
        if not torch.isfinite(tensor).all():
            overflowing.append(name)
    if overflowing:
        short = str(dtype).removeprefix("torch.")
        raise source.failure(
            f"the weights overflow {short} in {_some(overflowing)}; set dtype: bfloat16 or float32 in models.yaml"
        )


def _pinned(vae: torch.nn.Module) -> frozenset[str]:
    """Return the names of the tensors that stay in float32, as with diffusers' `torch_dtype`.

    Some classes name modules that half precision would damage. Their buffers stay in float32 too.
    """
    modules = frozenset(getattr(vae, "_keep_in_fp32_modules", None) or ())
    parameters = (name for name, _ in vae.named_parameters() if modules.intersection(name.split(".")))
    return frozenset([*parameters, *(name for name, _ in vae.named_buffers() if modules)])


def _some(names: Sequence[str]) -> str:
    """Return the first names as text, and how many more there are."""
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
