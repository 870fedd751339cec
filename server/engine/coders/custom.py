"""A decoder of an installed package, which `decoder: package.module:Class` in models.yaml names.

docs/operations.md says what such a class is given and what it must offer.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...families import Family
from ...families.video_base import Video
from ...model_info import LatentSpec
from ...values import Layout
from ..device_errors import is_out_of_memory, where
from .interface import Check, Coded, Emit, checking, go_on
from .layouts import postprocess

LATENTS_TRIED = 8  # rows and columns of the latents that are decoded when a decoder is loaded


class UnusableDecoder(ValueError):
    """A class that cannot be used. Its text is the end of a sentence that begins with the name of the model."""


def class_named(name: str) -> type[Any]:
    """Import a class. name: `package.module:Class`. Raises UnusableDecoder."""
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise UnusableDecoder(
                f"decoder: there is no module {error.name} in this Python; install the package that has {name}"
            ) from None
        raise UnusableDecoder(f"decoder: {module_name} needs the module {error.name}; install it too") from error
    except Exception as error:  # an import runs code of others, which may raise anything
        raise UnusableDecoder(f"decoder: {module_name} cannot be imported ({where(error)})") from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise UnusableDecoder(f"decoder: {module_name} has no class {class_name}; check the name in models.yaml")
    if not callable(getattr(found, "decode", None)):
        raise UnusableDecoder(f"decoder: {name} has no method decode(latents), which the server calls")
    return found


def build(name: str, weights: Path, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """Return an instance of a class, on the device. Parameters as docs/operations.md says. Raises UnusableDecoder."""
    found = class_named(name)
    try:
        made = found(weights, config=dict(config), dtype=dtype, device=device)
    except Exception as error:  # a constructor of others
        if is_out_of_memory(error):
            raise
        raise UnusableDecoder(f"decoder: {name} cannot be built from {weights.name} ({where(error)})") from error
    if isinstance(made, nn.Module):
        nn.Module.eval(made)
        nn.Module.requires_grad_(made, False)
    return made


class CustomDecoder:
    """Runs a class of an installed package, one latent after the other on a CPU, as a batch on a GPU.

    The work stops between the layers of a class that is a `torch.nn.Module`, and otherwise between two latents.
    """

    heeds_budget = False

    def __init__(
        self, name: str, made: Any, family: Family, spec: LatentSpec, dtype: torch.dtype, device: torch.device
    ) -> None:
        """name: `package.module:Class`. made: its instance."""
        self.name = name
        self._made = made
        self._family = family
        self._spec = spec
        self._dtype = dtype
        self._device = device

    def free_caches(self) -> None:
        """Do nothing: the server knows of no caches of this class."""

    def decode(
        self,
        latents: Tensor,
        layout: Layout,
        *,
        budget_bytes: int | None = None,
        emit: Emit | None = None,
        check: Check = go_on,
        **arguments: float,
    ) -> Coded:
        """Decode as `Decoder.decode` says. The budget has no effect. Raises UnusableDecoder for a wrong sample."""
        batch = latents.to(self._device, self._dtype)
        is_one_by_one = self._device.type == "cpu" or not self._family.takes_batches
        samples = []
        module = self._made if isinstance(self._made, nn.Module) else None
        for part in torch.split(batch, 1) if is_one_by_one else [batch]:
            check()
            with checking(module, check) if module is not None else nullcontext():
                try:
                    sample = self._made.decode(part)
                except SystemExit as error:  # code of others must not end the thread
                    raise RuntimeError(f"{self.name} tried to end the process") from error
            self._check_sample(part, sample)
            samples.append(sample)
        whole = torch.cat(samples)
        finite = torch.isfinite(whole).all()
        output = postprocess(whole, layout)
        if emit is not None:
            emit(output, finite)
        return Coded(output, finite)

    @torch.inference_mode()
    def try_out(self) -> None:
        """Decode small latents of zeros. Raises UnusableDecoder if that fails, or if the sample has another shape."""
        side = LATENTS_TRIED * self._spec.vae_scale_factor
        shape = self._family.latent_shape(self._spec, side, side)
        try:
            self.decode(torch.zeros(shape), Layout.SAMPLE)
        except UnusableDecoder:
            raise
        except Exception as error:  # code of others
            if is_out_of_memory(error):
                raise
            size = "x".join(map(str, shape))
            raise UnusableDecoder(f"decoder: {self.name} cannot decode latents {size} ({where(error)})") from error

    def refined(self) -> LatentSpec:
        """Return the spec with the statistics that some families store among the weights. Raises UnusableDecoder."""
        try:
            return self._family.refine(self._spec, self._made)
        except AttributeError as error:
            raise UnusableDecoder(
                f"decoder: {self.name} lacks {error.name}, the statistics of the latents of the family "
                f"{self._family.name}"
            ) from None

    def _check_sample(self, latents: Tensor, sample: Any) -> None:
        if not isinstance(sample, Tensor):
            raise UnusableDecoder(f"decoder: {self.name} returns a {type(sample).__name__}; it must return a tensor")
        batch, _, *frames, height, width = latents.shape
        ratio = self._spec.vae_scale_factor
        if frames and isinstance(self._family, Video):
            frames = [self._family.num_frames(self._spec, frames[0])]
        expected = (batch, self._spec.image_channels, *frames, ratio * height, ratio * width)
        if tuple(sample.shape) != expected or not sample.is_floating_point():
            shapes = ["x".join(map(str, shape)) for shape in (latents.shape, expected, sample.shape)]
            raise UnusableDecoder(
                f"decoder: {self.name} must decode latents {shapes[0]} to floats {shapes[1]}, and returns "
                f"{str(sample.dtype).removeprefix('torch.')} {shapes[2]}"
            )
