"""What each image-to-video or video-to-video pipeline holds after encoding: scaled, before noise and packing.

Pixels are [B, C, F, H, W] in [-1, 1]. Pipelines marked as sampling want a VAE that is `certain`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    CogVideoXVideoToVideoPipeline,
    CosmosVideoToWorldPipeline,
    EasyAnimateControlPipeline,
    EDMEulerScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideoImageToVideoPipeline,
    Kandinsky5I2VPipeline,
    LTX2ImageToVideoPipeline,
    LTXLatentUpsamplePipeline,
    SanaWMPipeline,
    StableVideoDiffusionPipeline,
    WanImageToVideoPipeline,
    WanVideoToVideoPipeline,
)
from diffusers.modular_pipelines.minimax_h3.encoders import encode_vae_condition

from tests.pipelines import kandinsky as kandinsky5
from tests.pipelines.by_hand import IMAGENET
from tests.pipelines.cosmos import Unguarded
from tests.pipelines.encoding import CPU, START, bare, generator, silent, size

Encode = Callable[[Any, torch.Tensor], torch.Tensor]


def wan(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    pipe = bare(WanVideoToVideoPipeline, vae, scheduler=silent())
    shape = {"batch_size": 1, "num_channels_latents": vae.config.z_dim, **size(pixels)}
    return pipe.prepare_latents(pixels, **shape, **CPU, timestep=START, generator=generator())


def wan_22(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Of the first frame: the pipeline that takes clips knows of no patches."""
    pipe = bare(WanImageToVideoPipeline, vae, expand_timesteps=True)
    shape = {"batch_size": 1, "num_channels_latents": 48, **size(pixels), "num_frames": 1}
    return pipe.prepare_latents(pixels[:, :, 0], **shape, **CPU, generator=generator())[1]


def cogvideox(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Samples. [B, F, C, h, w]."""
    pipe = bare(CogVideoXVideoToVideoPipeline, vae, scheduler=silent())
    shape = {"batch_size": 1, "num_channels_latents": 16, **size(pixels)}
    return pipe.prepare_latents(pixels, **shape, **CPU, timestep=START, generator=generator())


def ltx(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Samples. The upsampling pipeline's, the only one of LTX's that encodes a clip and no more; not packed."""
    return bare(LTXLatentUpsamplePipeline, vae).prepare_latents(pixels, 1, **CPU, generator=generator())


def ltx2(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Of the first frame. Scaled, though this pipeline returns its latents unscaled; unpacked here."""
    pipe = bare(LTX2ImageToVideoPipeline, vae)
    shape = {"batch_size": 1, "num_channels_latents": 16, **size(pixels), "num_frames": 1}
    packed = pipe.prepare_latents(pixels[:, :, 0], **shape, **CPU, generator=generator())[0]
    return pipe._unpack_latents(packed, 1, pixels.shape[-2] // 32, pixels.shape[-1] // 32)


def hunyuan_video(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Of the first frame."""
    pipe = bare(HunyuanVideoImageToVideoPipeline, vae)
    shape = {"batch_size": 1, "num_channels_latents": 16, **size(pixels), "num_frames": 1}
    return pipe.prepare_latents(pixels[:, :, 0], **shape, **CPU, generator=generator())[1]


def hunyuan_video_15(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Of the first frame."""
    pipe = bare(HunyuanVideo15ImageToVideoPipeline, vae)
    picture = (pixels[:, :, 0] + 1) / 2
    return pipe._get_image_latents(vae, pipe.video_processor, picture, **size(pixels), device="cpu")


def easy_animate(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    pipe = bare(EasyAnimateControlPipeline, vae)
    shape = {"batch_size": 1, **size(pixels), "generator": None, "do_classifier_free_guidance": False}
    return pipe.prepare_control_latents(pixels, None, **shape, **CPU)[0]


def cosmos(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    pipe = bare(CosmosVideoToWorldPipeline, vae, scheduler=EDMEulerScheduler(), safety_checker=Unguarded())
    shape = {"batch_size": 1, "num_channels_latents": 16, **size(pixels), "num_frames": pixels.shape[2]}
    return pipe.prepare_latents(pixels, **shape, **CPU, generator=generator())[1]


def kandinsky(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Samples. Of the first frame, [B, 1, h, w, C]."""
    pipe = Kandinsky5I2VPipeline(**kandinsky5.parts(vae))
    shape = {"batch_size": 1, "num_channels_latents": 16, **size(pixels), "num_frames": 1}
    return pipe.prepare_latents((pixels[:, :, 0] + 1) / 2, **shape, **CPU, generator=generator())


def stable_video(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Of the first frame, [B, C, h, w]; not scaled: the U-Net was trained with the VAE's own latents beside its noise."""
    pipe = bare(StableVideoDiffusionPipeline, vae)
    return pipe._encode_vae_image(pixels[:, :, 0], "cpu", 1, False)


def minimax_h3(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Samples, and rounds the latents to float16 before it scales them."""
    of_bytes = (pixels + 1) * 127.5
    return encode_vae_condition(vae, of_bytes, *IMAGENET)


def sana_wm(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Of the first frame."""
    return bare(SanaWMPipeline, vae)._encode_first_frame(pixels[:, :, 0], **CPU)


def kvae_video(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """No pipeline takes it."""
    return vae.encode(pixels).latent_dist.mode()


ENCODERS: dict[str, Encode] = {
    "wan": wan,
    "wan-one-frame": wan,
    "wan-2.2-5b": wan_22,
    "sana-video": wan,
    "cogvideox": cogvideox,
    "ltx": ltx,
    "ltx-timestep": ltx,
    "ltx2": ltx2,
    "ltx2.3": ltx2,
    "hunyuan-video": hunyuan_video,
    "hunyuan-video-1.5": hunyuan_video_15,
    "easy-animate": easy_animate,
    "cosmos": cosmos,
    "kandinsky5-video": kandinsky,
    "stable-video": stable_video,
    "minimax-h3": minimax_h3,
    "kvae-video": kvae_video,
    "sana-wm": sana_wm,
}
CLIP_TO_LATENTS = {name: torch.no_grad()(encode) for name, encode in ENCODERS.items()}
