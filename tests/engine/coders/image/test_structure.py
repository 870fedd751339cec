"""A decoder that is not known part for part is declined with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from server.engine.coders.image.decoder import ExactKLDecoder
from tests.engine.coders.image.networks import CONFIGS, build


@pytest.mark.parametrize("config", CONFIGS)
def test_every_plain_decoder_is_supported(config: str) -> None:
    assert ExactKLDecoder.unsupported_reason(build(config)) is None


def test_another_class_is_not_supported() -> None:
    tiny = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                           num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    assert ExactKLDecoder.unsupported_reason(tiny) == "AutoencoderTiny is not one of AutoencoderKL, AutoencoderKLFlux2."


def test_a_subclass_is_not_supported() -> None:
    class Mine(AutoencoderKL):
        pass

    vae = build("sd")
    vae.__class__ = Mine
    assert ExactKLDecoder.unsupported_reason(vae) == "Mine is not one of AutoencoderKL, AutoencoderKLFlux2."


def attention(vae: Any) -> Any:
    return vae.decoder.mid_block.attentions[0]


def set_of(path: str, value: object) -> Callable[[Any], None]:
    def change(vae: Any) -> None:
        *parents, name = path.split(".")
        target = vae
        for parent in parents:
            target = target[int(parent)] if parent.isdigit() else getattr(target, parent)
        setattr(target, name, value)

    return change


CHANGES: dict[str, Callable[[Any], None]] = {
    "reflected padding": set_of("decoder.conv_in.padding_mode", "reflect"),
    "a dilated convolution": set_of("decoder.up_blocks.0.resnets.0.conv1.dilation", (2, 2)),
    "grouped channels": set_of("decoder.conv_out.groups", 2),
    "a 5x5 convolution": set_of("decoder.conv_out", nn.Conv2d(32, 3, 5, padding=2)),
    "another activation": set_of("decoder.mid_block.resnets.0.nonlinearity", nn.GELU()),
    "another output activation": set_of("decoder.conv_act", nn.ReLU()),
    "another norm": set_of("decoder.conv_norm_out", nn.BatchNorm2d(32)),
    "a scaled output": set_of("decoder.up_blocks.1.resnets.0.output_scale_factor", 2.0),
    "a time embedding": set_of("decoder.up_blocks.1.resnets.0.time_emb_proj", nn.Linear(4, 4)),
    "two heads": set_of("decoder.mid_block.attentions.0.heads", 2),
    "no residual": set_of("decoder.mid_block.attentions.0.residual_connection", False),
    "a query norm": set_of("decoder.mid_block.attentions.0.norm_q", nn.LayerNorm(64)),
    "an unknown processor": lambda vae: setattr(attention(vae), "processor", object()),
    "an upsample without convolution": set_of("decoder.up_blocks.0.upsamplers.0.use_conv", False),
    "an unknown part": lambda vae: vae.decoder.add_module("refiner", nn.Identity()),
    "an unknown block": lambda vae: vae.decoder.up_blocks.append(nn.Identity()),
    "two dtypes": lambda vae: vae.decoder.conv_out.to(torch.float16),
    "float64": lambda vae: vae.to(torch.float64),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_unknown_part_gives_a_reason(change: str) -> None:
    vae = build("sd")
    CHANGES[change](vae)
    reason = ExactKLDecoder.unsupported_reason(vae)
    assert reason is not None
    assert reason.endswith(".")
