"""Rename the tensors of diffusers' VAEs as the files of their authors, or of ComfyUI, name them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch

Tensors = dict[str, torch.Tensor]
Names = Mapping[str, str]

LDM_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
WAN_LAYERS = {
    ".norm1.": ".residual.0.",
    ".conv1.": ".residual.2.",
    ".norm2.": ".residual.3.",
    ".conv2.": ".residual.6.",
    ".conv_shortcut.": ".shortcut.",
}
WAN_PARTS = {
    r"^quant_conv\.": "conv1.",
    r"^post_quant_conv\.": "conv2.",
    r"(coder)\.conv_in\.": r"\1.conv1.",
    r"(coder)\.norm_out\.": r"\1.head.0.",
    r"(coder)\.conv_out\.": r"\1.head.2.",
    r"mid_block\.resnets\.0": "middle.0",
    r"mid_block\.attentions\.0": "middle.1",
    r"mid_block\.resnets\.1": "middle.2",
}


def ldm(state: Tensors, levels: int = 4, axes: int = 2) -> Tensors:
    """Stable Diffusion's names; with three axes, those that ComfyUI gives HunyuanVideo."""
    renamed = {}
    for key, value in state.items():
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
        name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(
            r"up_blocks\.(\d)\.(resnets\.(\d)|upsamplers\.0)",
            lambda found: f"up.{levels - 1 - int(found[1])}." + (f"block.{found[3]}" if found[3] else "upsample"),
            name,
        )
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if ".attentions.0." in name:
            part, rest = name.split(".mid_block.attentions.0.")
            layer, kind = rest.rsplit(".", 1)
            name = f"{part}.mid.attn_1.{LDM_ATTENTION[layer]}.{kind}"
            value = value.reshape(*value.shape, *[1] * axes) if value.ndim == 2 else value
        renamed[name] = value
    return renamed


def flux2(state: Tensors) -> Tensors:
    """FLUX.2's file has the 1x1 convolutions inside the encoder and the decoder."""
    moved = {"quant_conv.": "encoder.quant_conv.", "post_quant_conv.": "decoder.post_quant_conv."}
    return {started(name, moved): value for name, value in ldm(state).items()}


def started(name: str, beginnings: Names) -> str:
    found = next((start for start in beginnings if name.startswith(start)), None)
    return beginnings[found] + name.removeprefix(found) if found else name


def wan(state: Tensors) -> Tensors:
    """Wan 2.1, and Qwen-Image: four layers a block, numbered through."""

    def layers(name: str) -> str:
        name = re.sub(r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)", _numbered, name)
        name = re.sub(r"decoder\.up_blocks\.(\d+)\.upsamplers\.(0)", lambda found: _numbered(found, 3), name)
        return name.replace("encoder.down_blocks.", "encoder.downsamples.")

    return {_wan_name(key, layers): value for key, value in state.items()}


def _numbered(found: re.Match[str], layer: int | None = None) -> str:
    return f"decoder.upsamples.{4 * int(found[1]) + (int(found[2]) if layer is None else layer)}"


def wan_22(state: Tensors, layers_per_block: int = 1) -> Tensors:
    """Wan 2.2: blocks within blocks; the sampler is the last layer of a block."""

    def layers(name: str) -> str:
        down, up = layers_per_block, layers_per_block + 1
        name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"downsamples.\1.downsamples.\2", name)
        name = re.sub(r"down_blocks\.(\d)\.downsampler\.", rf"downsamples.\1.downsamples.{down}.", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", r"upsamples.\1.upsamples.\2", name)
        return re.sub(r"up_blocks\.(\d)\.upsampler\.", rf"upsamples.\1.upsamples.{up}.", name)

    return {_wan_name(key, layers): value for key, value in state.items()}


def _wan_name(name: str, layers: Callable[[str], str]) -> str:
    name = layers(name)
    for old, new in WAN_LAYERS.items():
        name = name.replace(old, new)
    for pattern, new in WAN_PARTS.items():
        name = re.sub(pattern, new, name)
    return name


def hunyuan_video_15(state: Tensors) -> Tensors:
    """HunyuanVideo 1.5: the names of Stable Diffusion, and the decoder's levels counted as diffusers does."""
    renamed = {}
    for key, value in state.items():
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
        name = re.sub(r"(down|up)_blocks\.(\d)\.resnets\.(\d)", r"\1.\2.block.\3", name)
        name = re.sub(r"(down|up)_blocks\.(\d)\.(down|up)samplers\.0", r"\1.\2.\3sample", name)
        renamed[re.sub(r"mid_block\.attentions\.0\.(?:to_)?", "mid.attn_1.", name)] = value
    return renamed


def hunyuan_image(state: Tensors, layers_per_block: int = 1) -> Tensors:
    """HunyuanImage 2.1: levels instead of blocks that are numbered through, and kernels with a third axis."""
    renamed = {}
    for key, value in state.items():
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
        name = re.sub(r"mid_block\.attentions\.0\.(?:to_)?", "mid.attn_1.", name).replace(
            "attn_1.proj.", "attn_1.proj_out."
        )
        for part, blocks in (("down", layers_per_block), ("up", layers_per_block + 1)):
            if found := re.search(rf"{part}_blocks\.(\d+)\.", name):
                level, at = divmod(int(found[1]), blocks + 1)
                inner = f"{part}sample." if at == blocks else f"block.{at}."
                name = name.replace(found[0], f"{part}.{level}.{inner}").replace("conv_shortcut", "nin_shortcut")
        renamed[name] = value.unsqueeze(2) if value.ndim == 4 else value
    return renamed


LTX_UP = {
    "decoder.mid_block.": "decoder.up_blocks.0.",
    "decoder.up_blocks.0.": "decoder.up_blocks.1.",
    "decoder.up_blocks.1.upsamplers.0.": "decoder.up_blocks.2.",
    "decoder.up_blocks.1.": "decoder.up_blocks.3.",
    "decoder.up_blocks.2.upsamplers.0.": "decoder.up_blocks.5.",
    "decoder.up_blocks.2.": "decoder.up_blocks.6.",
    "decoder.up_blocks.3.upsamplers.0.": "decoder.up_blocks.8.",
    "decoder.up_blocks.3.": "decoder.up_blocks.9.",
}
LTX_DOWN = {
    "encoder.down_blocks.0.downsamplers.0.": "encoder.down_blocks.1.",
    "encoder.down_blocks.0.conv_out.": "encoder.down_blocks.2.",
    "encoder.down_blocks.1.downsamplers.0.": "encoder.down_blocks.4.",
    "encoder.down_blocks.1.conv_out.": "encoder.down_blocks.5.",
    "encoder.down_blocks.1.": "encoder.down_blocks.3.",
    "encoder.down_blocks.2.downsamplers.0.": "encoder.down_blocks.7.",
    "encoder.down_blocks.2.": "encoder.down_blocks.6.",
    "encoder.down_blocks.3.": "encoder.down_blocks.8.",
    "encoder.mid_block.": "encoder.down_blocks.9.",
}
LTX2 = {
    "encoder.down_blocks.0.downsamplers.0.": "encoder.down_blocks.1.",
    "encoder.down_blocks.1.downsamplers.0.": "encoder.down_blocks.3.",
    "encoder.down_blocks.1.": "encoder.down_blocks.2.",
    "encoder.down_blocks.2.downsamplers.0.": "encoder.down_blocks.5.",
    "encoder.down_blocks.2.": "encoder.down_blocks.4.",
    "encoder.down_blocks.3.downsamplers.0.": "encoder.down_blocks.7.",
    "encoder.down_blocks.3.": "encoder.down_blocks.6.",
    "encoder.mid_block.": "encoder.down_blocks.8.",
    "decoder.mid_block.": "decoder.up_blocks.0.",
    "decoder.up_blocks.0.upsamplers.0.": "decoder.up_blocks.1.",
    "decoder.up_blocks.0.": "decoder.up_blocks.2.",
    "decoder.up_blocks.1.upsamplers.0.": "decoder.up_blocks.3.",
    "decoder.up_blocks.1.": "decoder.up_blocks.4.",
    "decoder.up_blocks.2.upsamplers.0.": "decoder.up_blocks.5.",
    "decoder.up_blocks.2.": "decoder.up_blocks.6.",
}
LTX_STATISTICS = {
    "latents_mean": "per_channel_statistics.mean-of-means",
    "latents_std": "per_channel_statistics.std-of-means",
}


def ltx(state: Tensors) -> Tensors:
    """LTX-Video 0.9.0."""
    names = LTX_UP | LTX_DOWN | LTX_STATISTICS
    renamed = {started(key, names).replace("resnets", "res_blocks"): value for key, value in state.items()}
    return {
        name.replace("conv_shortcut.conv", "conv_shortcut").replace(".norm3.", ".norm3.norm."): value
        for name, value in renamed.items()
    }


LTX_095 = LTX2 | {
    "decoder.up_blocks.3.upsamplers.0.": "decoder.up_blocks.7.",
    "decoder.up_blocks.3.": "decoder.up_blocks.8.",
    "decoder.time_embedder.": "decoder.last_time_embedder.",
    "decoder.scale_shift_table": "decoder.last_scale_shift_table",
}


def ltx_095(state: Tensors) -> Tensors:
    """LTX-Video 0.9.5 and later."""
    names = LTX_095 | LTX_STATISTICS
    return {started(key, names).replace("resnets", "res_blocks"): value for key, value in state.items()}


def dc(state: Tensors) -> Tensors:
    """DC-AE: the attention's three projections are one, and its layers are nested."""
    renamed: Tensors = {}
    for key, value in state.items():
        name = re.sub(r"(down|up)_blocks\.(\d+)\.(\d+)\.", r"stages.\2.op_list.\3.", key)
        if name.endswith(("attn.to_k.weight", "attn.to_v.weight")):
            continue
        if name.endswith("attn.to_q.weight"):
            parts = [state[key.replace("to_q", each)] for each in ("to_q", "to_k", "to_v")]
            name, value = name.replace("attn.to_q", "attn.qkv.conv"), torch.cat(parts)[:, :, None, None]
        if name.endswith("attn.to_out.weight"):
            name, value = name.replace("attn.to_out", "attn.proj.conv"), value[:, :, None, None]
        for new, old in DC_LAYERS.items():
            name = re.sub(new, old, name)
        renamed[name] = value
    return renamed


DC_LAYERS = {
    r"coder\.conv_in\.": "coder.project_in.conv.",
    r"encoder\.conv_out\.": "encoder.project_out.0.conv.",
    r"decoder\.norm_out\.": "decoder.project_out.0.",
    r"decoder\.conv_out\.": "decoder.project_out.2.conv.",
    r"attn\.to_qkv_multiscale\.0\.proj_in": "attn.aggreg.0.0",
    r"attn\.to_qkv_multiscale\.0\.proj_out": "attn.aggreg.0.1",
    r"attn\.norm_out": "attn.proj.norm",
    r"\.attn\.": ".context_module.main.",
    r"(op_list\.\d+)\.conv_out\.conv_depth\.": r"\1.local_module.main.depth_conv.conv.",
    r"(op_list\.\d+)\.conv_out\.conv_inverted\.": r"\1.local_module.main.inverted_conv.conv.",
    r"(op_list\.\d+)\.conv_out\.conv_point\.": r"\1.local_module.main.point_conv.conv.",
    r"(op_list\.\d+)\.conv_out\.norm\.": r"\1.local_module.main.point_conv.norm.",
    r"(op_list\.\d+)\.norm\.": r"\1.main.conv2.norm.",
    r"(op_list\.\d+)\.(conv1|conv2)\.(weight|bias)": r"\1.main.\2.conv.\3",
    r"(op_list\.\d+)\.conv\.(weight|bias)": r"\1.main.conv.conv.\2",
}


def ltx2(state: Tensors) -> Tensors:
    names = LTX2 | LTX_STATISTICS
    return {started(key, names).replace("resnets", "res_blocks"): value for key, value in state.items()}


def taesd_decoder(state: Tensors) -> Tensors:
    """The file taesd_decoder: its first layer is a clamp, and AutoencoderTiny has none."""
    layers = {key.removeprefix("decoder.layers."): value for key, value in state.items() if key.startswith("decoder.")}
    return {re.sub(r"^\d+", lambda found: str(int(found[0]) + 1), name): value for name, value in layers.items()}


def taesd_encoder(state: Tensors) -> Tensors:
    return {key.removeprefix("encoder.layers."): value for key, value in state.items() if key.startswith("encoder.")}
