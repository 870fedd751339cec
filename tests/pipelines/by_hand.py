"""What each pipeline does between its latents and its pixels, in as few lines as it takes: the server's specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.pipelines.sample import Sample

Decode = Callable[[Sample], torch.Tensor]
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # means and deviations


def pixels(sample: Sample) -> torch.Tensor:
    """The sample's pixels, made of its latents and its VAE alone."""
    with torch.no_grad():
        decoded = BY_HAND[sample.name](sample)  # [B, C, H, W] or [B, C, F, H, W], in [-1, 1]
    unit = (decoded / 2 + 0.5).clamp(0, 1)
    if sample.are_floored:
        unit = (255 * unit).floor() / 255
    return unit.transpose(1, 2) if unit.ndim == 5 else unit


def scaled(sample: Sample) -> torch.Tensor:
    """Stable Diffusion and most others."""
    return decode(sample.vae, sample.latents / sample.vae.config.scaling_factor)


def shifted(sample: Sample) -> torch.Tensor:
    """SD3."""
    return decode(sample.vae, shift(sample.vae, sample.latents))


def spread(sample: Sample) -> torch.Tensor:
    """SDXL with means and deviations, Mochi."""
    mean, std = statistics(sample.vae, sample.latents.ndim)
    return decode(sample.vae, sample.latents * std / sample.vae.config.scaling_factor + mean)


def flux(sample: Sample) -> torch.Tensor:
    """FLUX.1, Chroma."""
    return decode(sample.vae, shift(sample.vae, unpack(sample, 8)))


def qwen_image(sample: Sample) -> torch.Tensor:
    latents = unpack(sample, 8)[:, :, None]  # [B, C, h, w] -> [B, C, 1, h, w]
    mean, std = statistics(sample.vae, 5)
    return decode(sample.vae, latents * std + mean)[:, :, 0]


def qwen_image_21(sample: Sample) -> torch.Tensor:
    rows, columns = sample.height // 16, sample.width // 16
    latents = sample.latents.mT.unflatten(2, (1, rows, columns))  # [B, h w, C] -> [B, C, 1, h, w]
    mean, std = statistics(sample.vae, 5)
    return decode(sample.vae, latents * std + mean)[:, :, 0]


def flux2(sample: Sample) -> torch.Tensor:
    norm = sample.vae.bn
    std = (norm.running_var + sample.vae.config.batch_norm_eps).sqrt()
    tokens = sample.latents * std + norm.running_mean  # [B, S, 4C]
    return decode(sample.vae, unpack(sample, 8, tokens))


def ernie_image(sample: Sample) -> torch.Tensor:
    """The batch norm's eps is the pipeline's own."""
    norm = sample.vae.bn
    mean, std = norm.running_mean.view(1, -1, 1, 1), (norm.running_var + 1e-5).sqrt().view(1, -1, 1, 1)
    patches = sample.latents * std + mean  # [B, 4C, h/2, w/2]
    return decode(sample.vae, torch.nn.functional.pixel_shuffle(patches, 2))


def ideogram4(sample: Sample) -> torch.Tensor:
    """In a token, the row and the column of the patch come before the channel."""
    rows, columns = sample.height // 16, sample.width // 16
    if sample.is_packed:
        tokens = sample.latents.unflatten(1, (rows, columns))  # [B, h/2, w/2, 4C]
    else:
        patches = sample.latents.unflatten(3, (columns, 2)).unflatten(2, (rows, 2))  # [B, C, h/2, 2, w/2, 2]
        tokens = patches.permute(0, 2, 4, 3, 5, 1).flatten(3)
    norm = sample.vae.bn
    tokens = tokens * (norm.running_var + sample.vae.config.batch_norm_eps).sqrt() + norm.running_mean
    patches = tokens.unflatten(3, (2, 2, -1))  # [B, h/2, w/2, 2, 2, C]
    return decode(sample.vae, patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3))


def fibo2(sample: Sample) -> torch.Tensor:
    """FLUX.2's statistics, of latents without patches."""
    norm = sample.vae.bn
    patches = torch.nn.functional.pixel_unshuffle(sample.latents, 2)  # [B, 4C, h/2, w/2]
    std = (norm.running_var + sample.vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    return decode(sample.vae, torch.nn.functional.pixel_shuffle(patches * std + norm.running_mean.view(1, -1, 1, 1), 2))


def anima(sample: Sample) -> torch.Tensor:
    mean, std = statistics(sample.vae, 5)
    return decode(sample.vae, sample.latents * std + mean)[:, :, 0]


def layered(sample: Sample) -> torch.Tensor:
    """Every frame but the first is a picture of its own."""
    latents = sample.latents
    if sample.is_packed:
        frames = latents.unflatten(1, (4, -1)).flatten(0, 1)  # [B F, S, 4C]
        latents = unpack(sample, 8, frames).transpose(0, 1)[None]  # [1, C, F, h, w]
    mean, std = statistics(sample.vae, 5)
    pictures = (latents * std + mean)[0, :, 1:].transpose(0, 1)[:, :, None]  # [layers, C, 1, h, w]
    return decode(sample.vae, pictures)[:, :, 0]


def glm_image(sample: Sample) -> torch.Tensor:
    """Its VAE has a scaling factor, which is not used."""
    mean, std = statistics(sample.vae, 4)
    return decode(sample.vae, sample.latents * std + mean)


def refiner(sample: Sample) -> torch.Tensor:
    """Only the second half of the channels is decoded."""
    return decode(sample.vae, sample.latents[:, 32:] / sample.vae.config.scaling_factor)[:, :, 0]


def fibo(sample: Sample) -> torch.Tensor:
    """Wan 2.2's VAE. A token is one latent pixel."""
    latents = sample.latents.mT.unflatten(2, (1, sample.height // 16, sample.width // 16))  # [B, C, 1, h, w]
    mean, std = statistics(sample.vae, 5)
    return decode(sample.vae, latents * std + mean)[:, :, 0]


def scaled_ltx2(sample: Sample) -> torch.Tensor:
    """SANA-Video and SANA-WM."""
    vae = sample.vae
    mean, std = (values.view(1, -1, 1, 1, 1) for values in (vae.latents_mean, vae.latents_std))
    return decode(vae, sample.latents / vae.config.scaling_factor * std + mean)


def wan(sample: Sample) -> torch.Tensor:
    """Wan, Sana-Video and others."""
    mean, std = statistics(sample.vae, 5)
    return decode(sample.vae, sample.latents * std + mean)


def ltx(sample: Sample) -> torch.Tensor:
    """The model that takes a timestep takes the pipeline's default of 0, by which no noise is added."""
    vae = sample.vae
    frames = (sample.num_frames - 1) // 8 + 1
    sizes = (frames, sample.height // 32, sample.width // 32)
    latents = sample.latents.mT.unflatten(2, sizes)  # [B, F h w, C] -> [B, C, F, h, w]
    mean, std = (values.view(1, -1, 1, 1, 1) for values in (vae.latents_mean, vae.latents_std))
    timestep = torch.zeros(1) if vae.config.timestep_conditioning else None
    return decode(vae, latents * std / vae.config.scaling_factor + mean, timestep)


def ltx2(sample: Sample) -> torch.Tensor:
    """The pipeline has unpacked and unscaled already."""
    return decode(sample.vae, sample.latents)


def cogvideox(sample: Sample) -> torch.Tensor:
    """Frames come before channels. CogVideoX 1.5 puts frames in front that are none of the clip."""
    frames = (sample.num_frames - 1) // 4 + 1
    latents = sample.latents[:, -frames:].transpose(1, 2)  # [B, F, C, h, w] -> [B, C, F, h, w]
    return decode(sample.vae, latents / sample.vae.config.scaling_factor)


def allegro(sample: Sample) -> torch.Tensor:
    """The VAE gives frames before channels."""
    decoded = scaled(sample).transpose(1, 2)  # [B, F, C, H, W] -> [B, C, F, H, W]
    return decoded[:, :, : sample.num_frames, : sample.height, : sample.width]


def cosmos(sample: Sample) -> torch.Tensor:
    """A mean and a deviation for each channel of each latent frame; the scheduler's `sigma_data` is 0.5."""
    config = sample.vae.config
    channels, frames = sample.latents.shape[1:3]
    mean, std = (
        torch.tensor(values).view(1, channels, -1, 1, 1)[:, :, :frames]
        for values in (config.latents_mean, config.latents_std)
    )
    return decode(sample.vae, sample.latents * std / 0.5 + mean)


def cosmos2(sample: Sample) -> torch.Tensor:
    """A clip of one frame without its axis; the scheduler's `sigma_data` is 1."""
    mean, std = statistics(sample.vae, 5)
    return decode(sample.vae, sample.latents[:, :, None] * std + mean)[:, :, 0]


def kandinsky(sample: Sample) -> torch.Tensor:
    """Channels come last; a picture's latents have an axis of one frame, and its VAE's shift is not used."""
    latents = sample.latents.movedim(-1, 1)  # [B, F, h, w, C] -> [B, C, F, h, w]
    latents = latents if sample.pixels.ndim == 5 else latents[:, :, 0]
    return decode(sample.vae, latents / sample.vae.config.scaling_factor)


def stable_video(sample: Sample) -> torch.Tensor:
    """Frames come before channels, and the decoder wants them on the batch axis, with their number."""
    latents = sample.latents.flatten(0, 1) / sample.vae.config.scaling_factor  # [B, F, C, h, w] -> [B F, C, h, w]
    frames = sample.vae.decode(latents, num_frames=sample.num_frames).sample
    return frames.unflatten(0, (-1, sample.num_frames)).transpose(1, 2)  # [B F, C, H, W] -> [B, C, F, H, W]


def minimax_h3(sample: Sample) -> torch.Tensor:
    """The VAE gives pixels normalised as ImageNet's; here they become [-1, 1]."""
    mean, std = statistics(sample.vae, 5)
    normalised = decode(sample.vae, sample.latents * std + mean)
    pixel_mean, pixel_std = (torch.tensor(values).view(1, 3, 1, 1, 1) for values in IMAGENET)
    return 2 * (normalised * pixel_std + pixel_mean) - 1


def ltx2_diffusion(sample: Sample) -> torch.Tensor:
    """Noise of seed 0. Only packed latents are scaled."""
    vae, latents = sample.vae, sample.latents
    if sample.is_packed:
        sizes = ((sample.num_frames - 1) // 8 + 1, sample.height // 32, sample.width // 32)
        latents = latents.mT.unflatten(2, sizes)  # [B, F h w, C] -> [B, C, F, h, w]
        latents = latents * vae.latents_std.view(1, -1, 1, 1, 1) + vae.latents_mean.view(1, -1, 1, 1, 1)
    return decode(vae, latents, torch.Generator().manual_seed(0))


def unscaled(sample: Sample) -> torch.Tensor:
    """KVAE."""
    return decode(sample.vae, sample.latents)


def unpack(sample: Sample, scale: int, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Patches of 2x2: [B, (h/2)(w/2), 4C] -> [B, C, h, w]."""
    rows, columns = sample.height // scale // 2, sample.width // scale // 2
    tokens = sample.latents if tokens is None else tokens
    patches = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (rows, columns))  # [B, h/2, w/2, C, 2, 2]
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def shift(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return latents / vae.config.scaling_factor + vae.config.shift_factor


def statistics(vae: Any, ndim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The configuration's means and deviations, [1, C, 1, 1(, 1)]."""
    shape = (1, -1, *[1] * (ndim - 2))
    return torch.tensor(vae.config.latents_mean).view(shape), torch.tensor(vae.config.latents_std).view(shape)


def decode(vae: Any, latents: torch.Tensor, *others: Any) -> torch.Tensor:
    decoded: torch.Tensor = vae.decode(latents, *others, return_dict=False)[0]
    return decoded


BY_HAND: dict[str, Decode] = {
    "stable-diffusion": scaled,
    "stable-diffusion-taesd": scaled,
    "sdxl": scaled,
    "sdxl-playground": spread,
    "sdxl-taesd": scaled,
    "sd3": shifted,
    "flux": flux,
    "flux-taef1": flux,
    "chroma": flux,
    "lumina2": shifted,
    "aura-flow": scaled,
    "pixart-alpha": scaled,
    "pixart-sigma": scaled,
    "z-image": shifted,
    "hidream": shifted,
    "cogview3": scaled,
    "cogview4": scaled,
    "qwen-image": qwen_image,
    "qwen-image-2.1": qwen_image_21,
    "flux2": flux2,
    "flux2-small-decoder": flux2,
    "sana": scaled,
    "sana-video": wan,
    "wan": wan,
    "wan-one-frame": wan,
    "wan-2.2-5b": wan,
    "hunyuan-video": scaled,
    "hunyuan-video-1.5": scaled,
    "hunyuan-image": scaled,
    "hunyuan-dit": scaled,
    "ltx": ltx,
    "ltx-timestep": ltx,
    "ltx2": ltx2,
    "ltx2.3": ltx2,
    "cogvideox": cogvideox,
    "cogvideox-even": cogvideox,
    "cogvideox-1.5": cogvideox,
    "mochi": spread,
    "easy-animate": scaled,
    "allegro": allegro,
    "cosmos": cosmos,
    "cosmos2": cosmos2,
    "kandinsky5-video": kandinsky,
    "kandinsky5-image": kandinsky,
    "stable-video": stable_video,
    "minimax-h3": minimax_h3,
    "minimax-h3-tiles": minimax_h3,
    "ltx2-diffusion": ltx2_diffusion,
    "ltx2-diffusion-unpacked": ltx2_diffusion,
    "flux3": flux2,
    "ernie-image": ernie_image,
    "ideogram4": ideogram4,
    "ideogram4-unpatched": ideogram4,
    "fibo2": fibo2,
    "krea2": qwen_image,
    "anima": anima,
    "qwen-image-layered": layered,
    "qwen-image-layered-unpacked": layered,
    "glm-image": glm_image,
    "hunyuan-image-refiner": refiner,
    "fibo": fibo,
    "ovis-image": flux,
    "longcat-image": flux,
    "bria": flux,
    "prx": shifted,
    "chrono-edit": wan,
    "motif-video": wan,
    "anyflow": wan,
    "skyreels-v2": wan,
    "lucy-edit": wan,
    "cosmos-2.5": wan,
    "cosmos-3": wan,
    "helios": wan,
    "sana-video-ltx2": scaled_ltx2,
    "sana-wm": scaled_ltx2,
    "kvae": unscaled,
    "kvae-video": unscaled,
}
