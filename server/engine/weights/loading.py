"""Load the weights of one direction of a VAE from safetensors files. Pickle files are never read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import diffusers
import torch
from safetensors import SafetensorError, safe_open

from ...model_info import Direction, ModelInfo
from .agreement import directions_in, skeleton, translated
from .defaults import whole_config
from .headers import UnreadableWeights
from .hub import Source
from .key_maps import Tensors
from .stored import OTHER_PARTS, Stored, read_stored, some
from .which_config import configuration_of

# diffusers warns of entries in a config.json that the class does not have.
diffusers.utils.logging.set_verbosity_error()


def load_vae(info: ModelInfo, source: Source, dtype: torch.dtype, direction: Direction) -> torch.nn.Module:
    """Load the real diffusers module on the CPU, in evaluation mode, with the weights of one direction.

    The modules of the other direction stay, without weights, because some VAEs count the layers of both. The weights
    are copies in `dtype`, so later changes of the file do not affect them. Raises ModelUnavailable if the files cannot
    be read, or if a tensor of this direction is missing, is not finite, or overflows `dtype`. Raises MemoryError or
    OutOfMemoryError if there is not enough memory.
    """
    files = source.files()
    found = configuration_of(source)
    config = whole_config(info.class_name, found.values)
    with reading(source):
        stored = read_stored(files.weights, files.index)
        vae = skeleton(info.class_name, found.values, found.origin)
        if direction not in directions_in(vae, stored, config, found.origin, may_have_more=found.is_of_the_author):
            raise UnreadableWeights(
                f"{stored.file} has no weights to {direction} with, only those of the other direction"
            )
        with torch.no_grad():
            vae.load_state_dict(translated(vae, _read(stored), config), strict=False, assign=True)
        let_go(vae, OTHER_PARTS[direction])
        return _ready(vae, source, dtype)


def prepared(module: torch.nn.Module, stored: Stored, source: Source, dtype: torch.dtype) -> torch.nn.Module:
    """Return a module from `skeleton` with the tensors of its names, ready as `load_vae` returns a VAE."""
    with torch.no_grad():
        module.load_state_dict(_read(stored), strict=False, assign=True)
    return _ready(module, source, dtype)


def _ready(module: torch.nn.Module, source: Source, dtype: torch.dtype) -> torch.nn.Module:
    _check(module, source)
    _convert(module, dtype, source)
    return module.eval().requires_grad_(False)


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Turn the errors of reading weights into ModelUnavailable. A lack of memory stays what it is."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except UnreadableWeights as error:
        raise source.failure(str(error)) from error
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        lines = [line.strip() for line in str(error).strip().splitlines()]  # torch names the tensor in the second line
        reason = " ".join(lines[:2])[:300] or type(error).__name__
        advice = "let this user read them" if isinstance(error, PermissionError) else "download the model again"
        raise source.failure(f"the weights do not load ({reason}); {advice}") from error


def check_weights(source: Source) -> tuple[Direction, ...]:
    """Return the directions that the weights on this machine serve, from their headers and the config.

    Raises ModelUnavailable unless the index, the files and the config agree. What a decoder of another package needs is
    not known, so for it only the files themselves are checked.
    """
    files = source.files(is_local_only=True)
    found = configuration_of(source, is_local_only=True)
    try:
        stored = read_stored(files.weights, files.index)
        if source.entry.custom_decoder:
            return (Direction.DECODE,)
        config = whole_config(found.class_name, found.values)
        return directions_in(
            skeleton(found.class_name, found.values, found.origin),
            stored,
            config,
            found.origin,
            may_have_more=found.is_of_the_author,
        )
    except (UnreadableWeights, OSError) as error:
        raise source.failure(str(error)) from None


def _read(stored: Stored) -> Tensors:
    """Return the tensors of the files, which stay mapped to them: only what is used is read from the disk.

    Tensors in fp8, which torch can hardly compute with, become float32.
    """
    tensors: Tensors = {}
    with ExitStack() as open_files:
        files = {path: open_files.enter_context(safe_open(path, "pt")) for path in _paths(stored)}
        for name, (path, key, _) in stored.tensors.items():
            tensor = files[path].get_tensor(key)
            tensors[name] = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
    return tensors


def _paths(stored: Stored) -> set[Path]:
    return {path for path, _, _ in stored.tensors.values()}


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


def _check(vae: torch.nn.Module, source: Source) -> None:
    """Raise ModelUnavailable unless all tensors of this direction have finite values."""
    bad = [name for name, tensor in _tensors(vae) if not tensor.is_meta and not torch.isfinite(tensor).all()]
    if bad:
        raise source.failure(f"the weights are NaN or infinite in {some(bad)}; download or save the model again")


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
            f"the weights overflow {short} in {some(overflowing)}; set dtype: bfloat16 or float32 in models.yaml"
        )


def _pinned(vae: torch.nn.Module) -> frozenset[str]:
    """Return the names of the tensors that stay in float32, as with diffusers' `torch_dtype`.

    Some classes name modules that half precision would damage. Their buffers stay in float32 too.
    """
    modules = frozenset(getattr(vae, "_keep_in_fp32_modules", None) or ())
    parameters = (name for name, _ in vae.named_parameters() if modules.intersection(name.split(".")))
    return frozenset([*parameters, *(name for name, _ in vae.named_buffers() if modules)])
