"""What each image-to-image pipeline holds after encoding a picture: scaled, before noise and packing.

Pixels are [B, C, H, W] in [-1, 1]. Pipelines marked as sampling want a VAE that is `certain`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    ChromaImg2ImgPipeline,
    Cosmos2VideoToWorldPipeline,
    Flux2Pipeline,
    FluxKontextPipeline,
    HunyuanImageRefinerPipeline,
    Kandinsky5I2IPipeline,
    QwenImage21Pipeline,
    QwenImageEditPipeline,
    SanaSprintImg2ImgPipeline,
    SCMScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    ZImageImg2ImgPipeline,
)

from tests.pipelines.cosmos import Unguarded
from tests.pipelines.encoding import CPU, ONE_PICTURE, START, bare, generator, silent, silent_flow, size
from tests.pipelines.qwen_image_21 import Processor

Encode = Callable[[Any, torch.Tensor], torch.Tensor]


def stable_diffusion(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Samples."""
    parts = {"scheduler": silent(), "requires_safety_checker": False}
    pipe = bare(StableDiffusionImg2ImgPipeline, vae, **parts)
    return pipe.prepare_latents(pixels, START, **ONE_PICTURE, **CPU, generator=generator())


def stable_diffusion_xl(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Samples."""
    pipe = bare(StableDiffusionXLImg2ImgPipeline, vae, add_watermarker=False)
    options = {"generator": generator(), "add_noise": False}
    return pipe.prepare_latents(pixels, None, **ONE_PICTURE, **CPU, **options)


def stable_diffusion_3(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Samples."""
    pipe = bare(StableDiffusion3Img2ImgPipeline, vae, scheduler=silent_flow())
    return pipe.prepare_latents(pixels, START, **ONE_PICTURE, **CPU, generator=generator())


def z_image(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Samples."""
    pipe = bare(ZImageImg2ImgPipeline, vae, scheduler=silent_flow())
    shape = {"batch_size": 1, "num_channels_latents": 16, **size(pixels)}
    return pipe.prepare_latents(pixels, START, **shape, **CPU, generator=generator())


def flux(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    return _encoded(bare(FluxKontextPipeline, vae), pixels)


def chroma(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Samples."""
    return _encoded(bare(ChromaImg2ImgPipeline, vae), pixels)


def qwen_image(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[B, C, 1, h, w]."""
    return _encoded(bare(QwenImageEditPipeline, vae), pixels[:, :, None])


def qwen_image_21(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[B, C, 1, h, w] of pixels with an alpha channel."""
    return _encoded(bare(QwenImage21Pipeline, vae, processor=Processor()), pixels[:, :, None])


def flux2(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[B, 4C, h/2, w/2]: in patches, for which the statistics are."""
    return _encoded(bare(Flux2Pipeline, vae), pixels)


def sana(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Sana-Sprint multiplies by its scheduler's `sigma_data`, 1 here so that these are Sana's."""
    pipe = bare(SanaSprintImg2ImgPipeline, vae, scheduler=SCMScheduler(sigma_data=1.0))
    shape = {"batch_size": 1, "num_channels_latents": 32, **size(pixels)}
    return pipe.prepare_latents(pixels, torch.tensor(0.0), **shape, **CPU, generator=generator())


def cosmos2(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Samples. [B, C, 1, h, w], a clip's pipeline given one frame."""
    pipe = bare(Cosmos2VideoToWorldPipeline, vae, scheduler=silent_flow(), safety_checker=Unguarded())
    shape = {"batch_size": 1, "num_channels_latents": 16, **size(pixels), "num_frames": 1}
    return pipe.prepare_latents(pixels[:, :, None], **shape, **CPU, generator=generator())[1]


def kandinsky(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Samples. [B, 1, h, w, C]; the pipeline puts the noise in front and a mask behind."""
    pipe = bare(Kandinsky5I2IPipeline, vae)
    shape = {"batch_size": 1, "num_channels_latents": 16, **size(pixels)}
    return pipe.prepare_latents((pixels + 1) / 2, **shape, **CPU, generator=generator())[..., 16:32]


def kvae(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """No pipeline takes it."""
    return vae.encode(pixels).latent_dist.mode()


def refiner(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Samples. [B, 2C, 1, h, w]."""
    return _encoded(bare(HunyuanImageRefinerPipeline, vae), pixels[:, :, None])


def _encoded(pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
    return pipe._encode_vae_image(pixels, generator())


ENCODERS: dict[str, Encode] = {
    "stable-diffusion": stable_diffusion,
    "stable-diffusion-taesd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sdxl-playground": stable_diffusion_xl,
    "sdxl-taesd": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "z-image": z_image,
    "flux": flux,
    "flux-taef1": flux,
    "chroma": chroma,
    "qwen-image": qwen_image,
    "qwen-image-2.1": qwen_image_21,
    "flux2": flux2,
    "sana": sana,
    "cosmos2": cosmos2,
    "kandinsky5-image": kandinsky,
    "kvae": kvae,
    "hunyuan-image-refiner": refiner,
}
PICTURE_TO_LATENTS = {name: torch.no_grad()(encode) for name, encode in ENCODERS.items()}
