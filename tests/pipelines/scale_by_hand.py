"""What each pipeline does between its VAE's encoding and the latents it holds: the server's specification of encode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.pipelines.by_hand import IMAGENET, statistics

Scale = Callable[[Any, torch.Tensor], torch.Tensor]


def latents(name: str, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The scaled latents of `pixels`, of their first frame where the pipeline takes that alone."""
    with torch.no_grad():
        if name in FIRST_FRAME:
            pixels = pixels[:, :, :1]
        if name in PICTURES_OF_CLIPS:
            pixels = pixels[:, :, None]
        if name == "minimax-h3":
            mean, std = (torch.tensor(values).view(1, 3, 1, 1, 1) for values in IMAGENET)
            pixels = (pixels / 2 + 0.5 - mean) / std
        return SCALE[name](vae, mode(vae.encode(pixels[:, :, 0] if name == "stable-video" else pixels)))


def mode(encoded: Any) -> torch.Tensor:
    """The posterior's mode; of TAESD and the deep-compression autoencoder, which have none, the latents themselves."""
    for field in ("latents", "latent"):
        if field in encoded:
            plain: torch.Tensor = encoded[field]
            return plain
    most_likely: torch.Tensor = encoded.latent_dist.mode()
    return most_likely


def as_they_are(vae: Any, z: torch.Tensor) -> torch.Tensor:
    return z


def scaled(vae: Any, z: torch.Tensor) -> torch.Tensor:
    return z * vae.config.scaling_factor


def shifted(vae: Any, z: torch.Tensor) -> torch.Tensor:
    return (z - vae.config.shift_factor) * vae.config.scaling_factor


def spread(vae: Any, z: torch.Tensor) -> torch.Tensor:
    mean, std = statistics(vae, z.ndim)
    return (z - mean) * vae.config.get("scaling_factor", 1) / std


def buffered(vae: Any, z: torch.Tensor) -> torch.Tensor:
    mean, std = (values.view(1, -1, 1, 1, 1) for values in (vae.latents_mean, vae.latents_std))
    return (z - mean) * vae.config.scaling_factor / std


def twice(vae: Any, z: torch.Tensor) -> torch.Tensor:
    return scaled(vae, torch.cat([z, z], 1))


def patched(vae: Any, z: torch.Tensor) -> torch.Tensor:
    rows, columns = z.shape[2] // 2, z.shape[3] // 2
    patches = z.unflatten(3, (columns, 2)).unflatten(2, (rows, 2))  # [B, C, h, w] -> [B, C, h/2, 2, w/2, 2]
    patches = patches.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)  # -> [B, 4C, h/2, w/2]
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return (patches - vae.bn.running_mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def frames_first(vae: Any, z: torch.Tensor) -> torch.Tensor:
    return scaled(vae, z).transpose(1, 2)  # [B, C, F, h, w] -> [B, F, C, h, w]


def channels_last(vae: Any, z: torch.Tensor) -> torch.Tensor:
    z = z if z.ndim == 5 else z[:, :, None]
    return scaled(vae, z).movedim(1, -1)  # [B, C, F, h, w] -> [B, F, h, w, C]


def framewise(vae: Any, z: torch.Tensor) -> torch.Tensor:
    """Cosmos: a mean and a deviation for each latent frame; the scheduler's `sigma_data` is 0.5."""
    channels, frames = z.shape[1:3]
    means, deviations = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    mean, std = (values.view(1, channels, -1, 1, 1)[:, :, :frames] for values in (means, deviations))
    return (z - mean) * 0.5 / std


FIRST_FRAME = {
    "sana-wm",
    "wan-2.2-5b",
    "ltx2.3",
    "ltx2",
    "hunyuan-video",
    "hunyuan-video-1.5",
    "kandinsky5-video",
    "stable-video",
}
PICTURES_OF_CLIPS = {"qwen-image", "qwen-image-2.1", "cosmos2", "hunyuan-image-refiner"}
SCALE: dict[str, Scale] = {
    "stable-diffusion": scaled,
    "stable-diffusion-taesd": scaled,
    "sdxl": scaled,
    "sdxl-playground": spread,
    "sdxl-taesd": scaled,
    "sd3": shifted,
    "z-image": shifted,
    "flux": shifted,
    "flux-taef1": shifted,
    "chroma": shifted,
    "qwen-image": spread,
    "qwen-image-2.1": spread,
    "flux2": patched,
    "sana": scaled,
    "cosmos2": spread,
    "kandinsky5-image": channels_last,
    "wan": spread,
    "wan-one-frame": spread,
    "wan-2.2-5b": spread,
    "sana-video": spread,
    "cogvideox": frames_first,
    "ltx": buffered,
    "ltx-timestep": buffered,
    "ltx2": buffered,
    "ltx2.3": buffered,
    "hunyuan-video": scaled,
    "hunyuan-video-1.5": scaled,
    "easy-animate": scaled,
    "cosmos": framewise,
    "kandinsky5-video": channels_last,
    "stable-video": as_they_are,
    "minimax-h3": spread,
    "hunyuan-image-refiner": twice,
    "sana-wm": buffered,
    "kvae": as_they_are,
    "kvae-video": as_they_are,
}
