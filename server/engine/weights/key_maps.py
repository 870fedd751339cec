"""Translate the tensor names of original and ComfyUI checkpoints to those of the diffusers classes.

Where diffusers has a converter, it is used. The others are written here, each after diffusers' conversion script.
All work on tensors of the device `meta` too, so that a header can be translated without reading the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_autoencoder_dc_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
    convert_ltx2_vae_to_diffusers,
    convert_ltx_vae_checkpoint_to_diffusers,
    convert_wan_vae_to_diffusers,
)

Tensors = dict[str, torch.Tensor]
Config = Mapping[str, Any]


def to_diffusers(class_name: str, tensors: Tensors, config: Config) -> Tensors:
    """Return the tensors under the names of a diffusers class, in its shapes.

    tensors: by their names without a checkpoint's prefix. config: the config.json, completed by the class's defaults.
    Raises KeyError, ValueError, IndexError or RuntimeError if they are the tensors of another architecture.
    """
    convert = CONVERTERS.get(class_name)
    return convert(dict(tensors), config) if convert else tensors


def _ldm(tensors: Tensors, config: Config) -> Tensors:
    return dict(convert_ldm_vae_checkpoint(tensors, config))


def _flux2(tensors: Tensors, config: Config) -> Tensors:
    """FLUX.2: the names of Stable Diffusion, except that the 1x1 convolutions are in the encoder and the decoder."""
    renamed = {_after(name, "encoder.quant_conv.", "decoder.post_quant_conv."): each for name, each in tensors.items()}
    statistics = {name: each for name, each in renamed.items() if name.startswith("bn.")}
    return _ldm(renamed, config) | statistics


def _after(name: str, *starts: str) -> str:
    """Return the name without the first segment, if it has one of these beginnings."""
    return name.split(".", 1)[1] if name.startswith(starts) else name


def _wan(tensors: Tensors, config: Config) -> Tensors:
    if config.get("is_residual"):
        return {_wan_22_name(name): each for name, each in tensors.items()}
    return dict(convert_wan_vae_to_diffusers(tensors))


_WAN_LAYERS = {
    ".residual.0.": ".norm1.",
    ".residual.2.": ".conv1.",
    ".residual.3.": ".norm2.",
    ".residual.6.": ".conv2.",
    ".shortcut.": ".conv_shortcut.",
}
_WAN_PARTS = {
    r"^conv1\.": "quant_conv.",
    r"^conv2\.": "post_quant_conv.",
    r"^(encoder|decoder)\.conv1\.": r"\1.conv_in.",
    r"^(encoder|decoder)\.head\.0\.": r"\1.norm_out.",
    r"^(encoder|decoder)\.head\.2\.": r"\1.conv_out.",
    r"^(encoder|decoder)\.middle\.0\.": r"\1.mid_block.resnets.0.",
    r"^(encoder|decoder)\.middle\.1\.": r"\1.mid_block.attentions.0.",
    r"^(encoder|decoder)\.middle\.2\.": r"\1.mid_block.resnets.1.",
    r"^encoder\.downsamples\.(\d+)\.": r"encoder.down_blocks.\1.",
    r"^decoder\.upsamples\.(\d+)\.": r"decoder.up_blocks.\1.",
    r"\.(up|down)samples\.\d+\.(resample|time_conv)\.": r".\1sampler.\2.",
    r"\.(up|down)samples\.(\d+)\.": r".resnets.\2.",
}


def _wan_22_name(name: str) -> str:
    """The name of a tensor of Wan 2.2 in diffusers, whose own converter knows Wan 2.1 only."""
    for pattern, replacement in _WAN_PARTS.items():
        name = re.sub(pattern, replacement, name)
    for layer, renamed in _WAN_LAYERS.items():
        name = name.replace(layer, renamed)
    return name


def _ltx(tensors: Tensors, config: Config) -> Tensors:
    """LTX-Video. diffusers' converter expects the prefix of a whole checkpoint, and reads the version off the encoder.

    A decoder by itself gets the encoder's tensor that the converter looks at, without memory, and loses it again.
    """
    versioned = "vae.encoder.conv_out.conv.weight"
    whole = {f"vae.{name}": each for name, each in tensors.items()}
    missing = versioned not in whole
    if missing:
        whole[versioned] = torch.empty(0, config["block_out_channels"][-1], device="meta")
    converted = dict(convert_ltx_vae_checkpoint_to_diffusers(whole))
    if missing:
        del converted["encoder.conv_out.conv.weight"]
    return _with_statistics(tensors, converted)


def _ltx2(tensors: Tensors, config: Config) -> Tensors:
    return _with_statistics(tensors, dict(convert_ltx2_vae_to_diffusers(dict(tensors))))


def _with_statistics(tensors: Tensors, converted: Tensors) -> Tensors:
    """Return the tensors with the statistics of the latents, which diffusers' converters of LTX partly drop."""
    names = {
        "per_channel_statistics.mean-of-means": "latents_mean",
        "per_channel_statistics.std-of-means": "latents_std",
    }
    return converted | {new: tensors[old] for old, new in names.items() if old in tensors}


def _dc(tensors: Tensors, config: Config) -> Tensors:
    """DC-AE. diffusers' converter reads the version off the encoder, so a decoder by itself gets a stand-in for it."""
    versioned = "encoder.project_in.conv.bias"
    if config["encoder_layers_per_block"][0] and versioned not in tensors:
        converted = dict(convert_autoencoder_dc_checkpoint_to_diffusers(tensors | {versioned: torch.empty(0)}))
        del converted["encoder.conv_in.bias"]
        return converted
    return dict(convert_autoencoder_dc_checkpoint_to_diffusers(tensors))


_ATTENTION = re.compile(r"(.*)\.mid\.attn_1\.(norm|q|k|v|proj_out)\.(.*)")
_MIDDLE = re.compile(r"(.*)\.mid\.block_(\d)\.(.*)")
_BLOCK = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(block\.(\d+)|downsample|upsample)\.(.*)")


def _hunyuan_video(tensors: Tensors, config: Config) -> Tensors:
    """HunyuanVideo in the names that ComfyUI gives it, those of Stable Diffusion; the original has diffusers' own."""
    last = len(config["block_out_channels"]) - 1
    names = {"norm": "group_norm", "proj_out": "to_out.0"}
    converted = _named_as_ldm(tensors, names, lambda side, level: level if side == "encoder.down" else last - level)
    return {
        name.replace(".nin_shortcut.", ".conv_shortcut.").replace(".norm_out.", ".conv_norm_out."): (
            each.reshape(each.shape[:2]) if ".attentions." in name and each.ndim > 2 else each
        )
        for name, each in converted.items()
    }


def _hunyuan_video_15(tensors: Tensors, config: Config) -> Tensors:
    return _named_as_ldm(tensors, {}, lambda _, level: level)


def _hunyuan_image(tensors: Tensors, config: Config) -> Tensors:
    """HunyuanImage 2.1: blocks and samplers are numbered through. Its 1x1 kernels are stored with a third axis."""
    layers = config["layers_per_block"]
    converted = {}
    for name, each in tensors.items():
        if match := _BLOCK.fullmatch(name):
            side, level, _, number, rest = match.groups()
            blocks = layers + (side == "decoder.up")
            at = int(level) * (blocks + 1) + (int(number) if number else blocks)
            name = f"{side}_blocks.{at}.{rest.replace('nin_shortcut', 'conv_shortcut')}"
        converted[name] = each.squeeze(2) if each.ndim == 5 and each.shape[2] == 1 else each
    return _named_as_ldm(converted, {"proj_out": "proj"}, lambda _, level: level)


def _named_as_ldm(tensors: Tensors, attention: Mapping[str, str], block_of: Callable[[str, int], int]) -> Tensors:
    """Rename the blocks, samplers and middle layers of a checkpoint in the style of Stable Diffusion.

    attention: the names of an attention's layers, where they are not q, k, v, or unchanged.
    block_of: returns the block of a level. Its arguments are `encoder.down` or `decoder.up`, and the level.
    """
    names = {"q": "to_q", "k": "to_k", "v": "to_v", **attention}
    converted = {}
    for name, each in tensors.items():
        new = name
        if match := _ATTENTION.fullmatch(name):
            part, layer, rest = match.groups()
            new = f"{part}.mid_block.attentions.0.{names.get(layer, layer)}.{rest}"
        elif match := _MIDDLE.fullmatch(name):
            part, number, rest = match.groups()
            new = f"{part}.mid_block.resnets.{int(number) - 1}.{rest}"
        elif match := _BLOCK.fullmatch(name):
            part, level, what, number, rest = match.groups()
            inner = f"resnets.{number}" if number else f"{what}rs.0"
            new = f"{part}_blocks.{block_of(part, int(level))}.{inner}.{rest}"
        converted[new] = each
    return converted


CONVERTERS: dict[str, Callable[[Tensors, Config], Tensors]] = {
    "AutoencoderKL": _ldm,
    "AutoencoderKLFlux2": _flux2,
    "AutoencoderKLWan": _wan,
    "AutoencoderKLQwenImage": _wan,
    "AutoencoderKLLTXVideo": _ltx,
    "AutoencoderKLLTX2Video": _ltx2,
    "AutoencoderDC": _dc,
    "AutoencoderKLHunyuanVideo": _hunyuan_video,
    "AutoencoderKLHunyuanVideo15": _hunyuan_video_15,
    "AutoencoderKLHunyuanImage": _hunyuan_image,
}
"""The translation for each class that has checkpoints in other names than its own."""
