"""Small seeded VAEs: the real checkpoints' compression and statistics, a few channels."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLCosmos,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanImageRefiner,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLKVAE,
    AutoencoderKLKVAEVideo,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMagvit,
    AutoencoderKLMiniMaxH3,
    AutoencoderKLMochi,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    AutoencoderTiny,
    LTX2VideoDiffusionDecoderModel,
)

from tests.pipelines.sample import seeded

CHANNELS = (8, 8, 16, 16)
BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": CHANNELS,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
WAN: dict[str, Any] = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
PLAYGROUND = {"latents_mean": [-1.6574, 1.886, -1.383, 2.5155], "latents_std": [8.4927, 5.9022, 6.5498, 5.2299]}


def kl(**config: Any) -> Any:
    """The VAE of Stable Diffusion and of all that took it over: 8 times smaller, 4 channels, a scaling factor."""
    return seeded(AutoencoderKL, **BLOCKS | {"latent_channels": 4} | config)


def kl16(**config: Any) -> Any:
    """The VAE of SD3 and FLUX.1: 16 channels and a shift."""
    flux = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
    return kl(**{"latent_channels": 16} | flux | config)


def tiny(**config: Any) -> Any:
    """TAESD, or TAEF1 with 16 channels: 8 times smaller, no statistics."""
    small = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    blocks = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)}
    vae = seeded(AutoencoderTiny, **small | blocks | config)
    return brightened(vae, vae.decoder.layers[-1], gain=4, bias=0.5)


def wan(**config: Any) -> Any:
    """Wan 2.1: 8 times smaller, 4 times shorter; the class's own 16 means and deviations."""
    vae = seeded(AutoencoderKLWan, **WAN | config)
    return brightened(vae, vae.decoder.conv_out)


def wan_22() -> Any:
    """Wan 2.2 5B: 16 times smaller by patches of 2x2 pixels, 48 channels."""
    patches = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16, "is_residual": True}
    return wan(z_dim=48, decoder_base_dim=8, **patches, **statistics(48))


def qwen_image(**config: Any) -> Any:
    """Wan 2.1's architecture under another name, for a clip of one frame."""
    vae = seeded(AutoencoderKLQwenImage, **WAN | config)
    return brightened(vae, vae.decoder.conv_out)


def flux2(**config: Any) -> Any:
    """32 channels, 128 after the patches of 2x2 that the statistics are kept for, in a batch norm's buffers."""
    vae = seeded(AutoencoderKLFlux2, **BLOCKS | {"latent_channels": 32} | config)
    vae.bn.running_mean.normal_(std=0.5)
    vae.bn.running_var.uniform_(0.5, 3.0)
    return vae


def ltx(**config: Any) -> Any:
    """LTX-Video: 32 times smaller by patches of 4x4 pixels, 8 times shorter; statistics in buffers."""
    channels = {"block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4, "latent_channels": 16}
    layers = {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5}
    vae = seeded(AutoencoderKLLTXVideo, **channels | layers | config)
    vae.latents_mean.normal_(std=0.5)
    vae.latents_std.uniform_(0.5, 3.0)
    return vae


def cogvideox(**config: Any) -> Any:
    """8 times smaller, 4 times shorter, a scaling factor."""
    small = {"block_out_channels": (8,) * 4, "latent_channels": 16, "layers_per_block": 1, "norm_num_groups": 2}
    return seeded(AutoencoderKLCogVideoX, **small | config)


def mochi(**config: Any) -> Any:
    """8 times smaller, 6 times shorter; the class's own 12 means and deviations. Its norms want 32 channels a block."""
    channels = {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4}
    return seeded(AutoencoderKLMochi, **channels | {"layers_per_block": (1,) * 5} | config)


def hunyuan_video() -> Any:
    """8 times smaller, 4 times shorter, a scaling factor."""
    return seeded(AutoencoderKLHunyuanVideo, block_out_channels=CHANNELS, layers_per_block=1, norm_num_groups=4)


def hunyuan_video_15() -> Any:
    """16 times smaller, 4 times shorter, a scaling factor."""
    vae = seeded(AutoencoderKLHunyuanVideo15, block_out_channels=(16, 16, 16, 32, 64), layers_per_block=1)
    return brightened(vae, vae.decoder.conv_out.conv)


def hunyuan_image() -> Any:
    """32 times smaller, 64 channels, a scaling factor. Its norms want 32 channels a block."""
    size = {"spatial_compression_ratio": 32, "sample_size": 384, "scaling_factor": 0.75289}
    channels = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 64,
        "block_out_channels": (32, 32, 32, 32, 64, 128),
    }
    return seeded(AutoencoderKLHunyuanImage, layers_per_block=1, **size, **channels)


def hunyuan_image_refiner() -> Any:
    """16 times smaller, 32 channels, a scaling factor."""
    channels = {"latent_channels": 32, "block_out_channels": (32, 32, 32, 64, 64)}
    vae = seeded(AutoencoderKLHunyuanImageRefiner, layers_per_block=1, **channels)
    return brightened(vae, vae.decoder.conv_out.conv)


def dc() -> Any:
    """Sana's: 32 times smaller by six levels, 32 channels, a scaling factor."""
    types = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    channels, layers = (8, 8, 8, 8, 16, 32), (1,) * 6
    encoder = {"encoder_block_types": types, "encoder_block_out_channels": channels, "encoder_layers_per_block": layers}
    decoder = {"decoder_block_types": types, "decoder_block_out_channels": channels, "decoder_layers_per_block": layers}
    return seeded(AutoencoderDC, attention_head_dim=4, **encoder, **decoder, scaling_factor=0.41407)


def cosmos() -> Any:
    """8 times smaller, 8 times shorter; the class's own statistics, one for each channel of each latent frame."""
    channels = {"encoder_block_out_channels": (8,) * 4, "decode_block_out_channels": (8,) * 4}
    return seeded(AutoencoderKLCosmos, **channels, num_layers=1, resolution=64, attention_resolutions=(8,))


def temporal() -> Any:
    """Stable Video Diffusion's: a picture's encoder, a decoder of clips, a scaling factor."""
    blocks = {"block_out_channels": (32,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4}
    return seeded(AutoencoderKLTemporalDecoder, **blocks, layers_per_block=1)


def ltx2(**config: Any) -> Any:
    """LTX-2: 32 times smaller by patches of 4x4 pixels, 8 times shorter; statistics in buffers."""
    channels = {"block_out_channels": (8, 16, 32, 32), "decoder_block_out_channels": (8, 16, 32), "latent_channels": 16}
    layers = {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 4}
    ratios = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    vae = seeded(AutoencoderKLLTX2Video, **channels | layers | ratios | config)
    vae.latents_mean.normal_(std=0.5)
    vae.latents_std.uniform_(0.5, 3.0)
    return vae


def ltx23() -> Any:
    """LTX-2.3 and 2.5: as LTX-2, with a decoder of other blocks."""
    channels = {"block_out_channels": (8, 16, 32, 32), "decoder_block_out_channels": (8, 16, 16, 32)}
    layers = {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5}
    ratios = {
        "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
        "upsample_factor": (2, 2, 1, 2),
    }
    flags = {
        "decoder_spatio_temporal_scaling": (True,) * 4,
        "decoder_inject_noise": (False,) * 5,
        "upsample_residual": (False,) * 4,
    }
    return ltx2(**channels, **layers, **ratios, **flags, decoder_spatial_padding_mode="zeros")


def qwen_image_21() -> Any:
    """16 times smaller, 64 channels, and pixels with an alpha channel; the class's own means and deviations."""
    sizes = {"base_dim": 4, "decoder_base_dim": 4, "dim_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1}
    vae = seeded(AutoencoderKLQwenImage21, **sizes)
    return brightened(vae, vae.decoder.conv_out)


def magvit(**config: Any) -> Any:
    """EasyAnimate's: 8 times smaller, 4 times shorter, a scaling factor."""
    small = {"block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 2, "spatial_group_norm": False}
    return seeded(AutoencoderKLMagvit, **small | config)


def allegro() -> Any:
    """8 times smaller, 4 times shorter, decoded in tiles alone: 24 frames of a sample's size."""
    small = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 2, "sample_size": 128}
    vae = seeded(AutoencoderKLAllegro, **small)
    vae.enable_tiling()
    return vae


def asymmetric() -> Any:
    """A class that no family knows: 2 times smaller, a scaling factor."""
    channels = {"down_block_out_channels": (8, 16), "up_block_out_channels": (8, 16), "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return seeded(AsymmetricAutoencoderKL, **channels, **blocks, scaling_factor=0.5)


def minimax_h3() -> Any:
    """16 times smaller, 4 times shorter, in clips of 17 frames; a mean and a deviation for each channel.

    The attention of its decoder and the gates beside it start at 0, where a lost layer would not show.
    """
    encoder = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    ratios = {"spatial_downsample_factors": (2, 2, 2, 2), "temporal_downsample_factors": (1, 2, 2, 1)}
    heads = {"decoder_num_attention_heads": 2, "decoder_attention_head_dim": 8, "decoder_num_register_tokens": 2}
    layers = {"decoder_num_layers": 2, "decoder_ffn_mult": 2, "latent_channels": 8}
    vae = seeded(AutoencoderKLMiniMaxH3, **encoder, **ratios, **heads, **layers, **statistics(8))
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith(("scale1", "scale2", "register_tokens")):
                parameter.normal_(std=0.5)
    with torch.no_grad():  # small latents, which the pipeline rounds to float16
        vae.quant_conv.weight.mul_(0.005)
        vae.quant_conv.bias.zero_()
    return brightened(vae, vae.decoder.proj_out)


def ltx2_diffusion() -> Any:
    """LTX-2.5's diffusion decoder: 32 times smaller, 8 times shorter; statistics in buffers."""
    stages = {"decoder_stage_channels": (64, 32, 16, 16, 16), "decoder_stage_depths": (1,) * 5}
    windows = {"decoder_stage_kernels": ((3, 3, 3),) * 4, "decoder_stage5_kernel": (3, 5, 5)}
    sizes = {"latent_channels": 16, "patch_size": 4, "decoder_head_dim": 16, "decoder_t_emb_dim": 32}
    ratios = {"decoder_upsample_channel_reductions": (2, 2, 1, 1)}
    vae = seeded(LTX2VideoDiffusionDecoderModel, **stages, **windows, **sizes, **ratios)
    vae.latents_mean.normal_(std=0.5)
    vae.latents_std.uniform_(0.5, 3.0)
    return vae


def kvae() -> Any:
    """KVAE for images: 8 times smaller, 16 channels, no statistics. Its norms want 32 channels."""
    blocks = {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "ch_mult": (1, 1, 1, 1)}
    vae = seeded(AutoencoderKLKVAE, **blocks)
    return brightened(vae, vae.decoder.conv_out)


def kvae_video() -> Any:
    """KVAE for videos: 8 times smaller, 4 times shorter, 16 channels, no statistics. Its norms want 32 channels."""
    vae = seeded(AutoencoderKLKVAEVideo, ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
    return brightened(vae, vae.decoder.conv_out.conv)


def brightened(vae: Any, last: Any, gain: float = 4, bias: float = 0) -> Any:
    """The VAE with more contrast, where seeded weights give an even grey or black."""
    with torch.no_grad():
        last.weight.mul_(gain)
        if bias:
            last.bias.add_(bias)
    return vae


def statistics(channels: int) -> dict[str, list[float]]:
    """Means and deviations, a different one for each channel."""
    steps = torch.linspace(0, 1, channels)
    return {"latents_mean": (steps - 0.4).tolist(), "latents_std": (0.5 + 2 * steps).tolist()}
