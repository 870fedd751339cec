"""LTX-Video and LTX-2. Packed latents have one token for each latent pixel, `[B, F H W, C]`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import WrongChannels, WrongShape
from ..model_info import LatentSpec
from ..values import Geometry, Scaling
from .base import Sent, shape_text
from .video_base import Video

if TYPE_CHECKING:
    import torch


class LTX(Video):
    """Unscales as `LTXPipeline.__call__` does. The statistics are buffers of the VAE, stored among its weights."""

    name = "ltx"
    class_names = ("AutoencoderKLLTXVideo",)
    is_usually_packed = True
    is_scaled_in_comfyui = True  # ComfyUI's VAE unscales them; latent_formats.LTXV changes nothing
    gpu_dtype = "bfloat16"

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return the ratios of the config, or calculate them from its patches and blocks."""
        doublings = sum(config["spatio_temporal_scaling"])
        spatial = config.get("spatial_compression_ratio") or config["patch_size"] * 2**doublings
        return spatial, config.get("temporal_compression_ratio") or config["patch_size_t"] * 2**doublings

    def describe(self, config: Mapping[str, Any]) -> LatentSpec:
        """Read also whether decoding takes a timestep."""
        return replace(super().describe(config), takes_timestep=bool(config.get("timestep_conditioning")))

    def refine(self, spec: LatentSpec, vae: Any) -> LatentSpec:
        """Read the statistics of each channel from the buffers of the VAE."""
        mean, std = vae.latents_mean.float().tolist(), vae.latents_std.float().tolist()
        return replace(spec, latents_mean=tuple(mean), latents_std=tuple(std))

    def decode_geometry(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        """Accept packed latents, which need height and width, and those of `Video.decode_geometry`.

        If the VAE takes a timestep, `decode_timestep` is read too: a number in [0, 1], 0 by default.
        """
        found = self._packed(spec, shape, sent) if len(shape) == 3 else super().decode_geometry(spec, shape, sent)
        if not spec.takes_timestep:
            return found
        return replace(found, arguments=(("timestep", sent.number("decode_timestep", 0, 1) or 0.0),))

    def decode(self, vae: Any, latents: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Run diffusers' decode, with the timestep for all videos of the batch if there is one."""
        if "timestep" not in arguments:
            return super().decode(vae, latents, **arguments)
        timestep = latents.new_tensor([arguments["timestep"]] * len(latents))  # [B]
        sample: torch.Tensor = vae.decode(latents, timestep, return_dict=False)[0]
        return sample

    def unpack(self, latents: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """Return latents `[B, C, F, h, w]`."""
        if not geometry.is_packed:
            return super().unpack(latents, geometry)
        b, c, f, h, w = geometry.latent_shape
        return latents.reshape(b, f, h, w, c).permute(0, 4, 1, 2, 3)  # [B, S, C] -> [B, C, F, h, w]

    def _packed(self, spec: LatentSpec, shape: tuple[int, ...], sent: Sent) -> Geometry:
        batch, tokens, channels = shape
        if channels != spec.channels:
            raise WrongChannels(
                f"shape {shape_text(shape)} is not packed latents of this model, [B, F H W, {spec.channels}]; "
                "were they made for another model?"
            )
        size = sent.pixel_size()
        if size is None:
            raise WrongShape("packed video latents need height and width, the size of a frame in pixels; send both")
        h, w = (pixels // spec.vae_scale_factor for pixels in size)
        frames = sent.integer("num_frames")  # optional, because the tokens determine it
        f = (frames - 1) // spec.temporal_compression_ratio + 1 if frames else tokens // max(1, h * w)
        if f * h * w != tokens:
            asked = f"{frames} frames" if frames else "whole frames"
            raise WrongShape(
                f"{tokens} tokens do not fit {asked} of {size[0]}x{size[1]}: a latent frame of that size has "
                f"{h} x {w} = {h * w} tokens; check height, width and num_frames"
            )
        return replace(self.sized(spec, batch, f, h, w), is_packed=True)


class LTX2(LTX):
    """LTX-2. The latents inside the pipeline's loop are packed and scaled, those that it returns are neither.

    Decoding with `do_scaling` therefore unscales packed latents and leaves unpacked ones as they are. Encoding with
    `do_scaling` scales the latents, as `LTX2ImageToVideoPipeline` does.
    """

    name = "ltx2"
    class_names = ("AutoencoderKLLTX2Video",)
    is_usually_packed = False

    def latents_in(self, latents: torch.Tensor, spec: LatentSpec, geometry: Geometry, scaling: Scaling) -> torch.Tensor:
        """Unpack and unscale. Latents that were not packed are unscaled only with values that the client sent."""
        is_unscaled = scaling.factor is None and not geometry.is_packed
        return super().latents_in(
            latents, spec, geometry, replace(scaling, from_model=False) if is_unscaled else scaling
        )

    def comfyui_latents_in(self, latents: torch.Tensor, spec: LatentSpec, geometry: Geometry) -> torch.Tensor:
        """Unscale the latents, although they are not packed."""
        return super().latents_in(latents, spec, geometry, Scaling(from_model=True))


class ScaledLTX2(LTX2):
    """LTX-2's VAE in the pipelines of SANA-Video and SANA-WM, whose latents are never packed, and always scaled."""

    name = "scaled_ltx2"

    def latents_in(self, latents: torch.Tensor, spec: LatentSpec, geometry: Geometry, scaling: Scaling) -> torch.Tensor:
        """Unscale with the model's own statistics too."""
        return LTX.latents_in(self, latents, spec, geometry, scaling)
