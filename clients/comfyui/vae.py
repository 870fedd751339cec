"""The `VAE` that ComfyUI's own nodes accept, and what happens to the latents of a decode that failed."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from . import host
from .latents import Model, decode, encode
from .remote import RemoteError


def decode_or_keep(model: Model, samples: torch.Tensor) -> torch.Tensor:
    """Decode with a progress bar. Raises RemoteError, after the latents were saved; else as `latents.decode`."""
    try:
        return decode(model, samples, host.Bar().show)
    except RemoteError as error:
        fail(error, samples)


def fail(error: RemoteError, samples: torch.Tensor) -> NoReturn:
    """Save the latents and raise the error with the place of the file."""
    try:
        path = host.save_latents(samples)
        saved = (
            f"The latents are saved in {path}; to decode them later, move the file to ComfyUI's input folder and use "
            "Load Latent."
        )
    except (OSError, RuntimeError) as problem:
        saved = f"The latents could not be saved: {problem}"
    raise RemoteError(f"{error} {saved}", error.status, error.code) from error


class RemoteVAE:
    """A VAE whose decodes and encodes the server computes.

    It has the methods and attributes of ComfyUI's `VAE` that nodes use. Tiles have no effect, because the server
    computes whole images within its memory.
    """

    def __init__(self, model: Model) -> None:
        """Make the VAE of a model."""
        self.model = model
        # One number for videos too, where ComfyUI has a tuple, so that VAE Encode (for Inpainting) can use it.
        self.downscale_ratio = self.upscale_ratio = model.ratio
        self.latent_channels = model.channels
        self.latent_dim = {"image": 2, "video": 3, "audio": 1}[model.kind] if not model.has_frame_axis else 3
        # From latents to frames and pixels; a few nodes for LTX-Video read it.
        is_video = self.latent_dim == 3 and model.kind == "video"
        formula = (model.time_ratio, model.ratio, model.ratio) if is_video else None
        self.downscale_index_formula = self.upscale_index_formula = formula
        self.output_channels = int(model.entry["latents"]["image_channels"])
        self.device = self.output_device = torch.device("cpu")
        if model.kind == "audio":
            self.audio_sample_rate = self.audio_sample_rate_output = model.entry["latents"]["sampling_rate"]

    def __getattr__(self, name: str) -> Any:
        """Raise AttributeError for a part of a VAE that only a local one has."""
        raise AttributeError(f"a remote VAE has no {name!r}; use a local VAE with this node")

    def throw_exception_if_invalid(self) -> None:
        """Do nothing: the server was asked for the model when this was made."""

    def decode(self, samples_in: torch.Tensor, vae_options: Any = None) -> torch.Tensor:
        """Decode latents. Parameters and result as in `latents.decode`. vae_options: without effect."""
        return decode_or_keep(self.model, samples_in)

    def decode_tiled(self, samples: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Decode latents, without tiles."""
        return decode_or_keep(self.model, samples)

    def encode(self, pixel_samples: torch.Tensor, not_video: bool | None = None) -> torch.Tensor:
        """Encode pixels. Result as in `latents.encode`. not_video: its `are_images`."""
        return encode(self.model, pixel_samples, host.Bar().show, bool(not_video))

    def encode_tiled(
        self, pixel_samples: torch.Tensor, *_: Any, not_video: bool | None = None, **__: Any
    ) -> torch.Tensor:
        """Encode pixels, without tiles."""
        return self.encode(pixel_samples, not_video)

    def spacial_compression_decode(self) -> int:
        """Return how many pixels a latent pixel covers."""
        return self.model.ratio

    def spacial_compression_encode(self) -> int:
        """Return how many pixels a latent pixel covers."""
        return self.model.ratio

    def temporal_compression_decode(self) -> int | None:
        """Return how many frames a latent frame covers; None for images."""
        return self.model.time_ratio if self.model.kind == "video" else None

    def get_sd(self) -> NoReturn:
        """Raise RemoteError: the weights are on the server."""
        raise RemoteError("a remote VAE has no weights that can be saved")
