"""On a CPU, images and videos that run together get the bytes that each would have got alone: every family, both ways."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.coders.build import build_coder
from server.families import FAMILIES, Family, family_of_class, plain_family
from server.model_info import Direction, LatentSpec
from server.values import Layout
from tests.engine.coders.video.test_tiny_video import made as preview_vae
from tests.pipelines import vaes
from tests.pipelines.sounds import SOUNDS, Sound, oobleck


def with_vocoder(sound: Sound) -> Any:
    vae, vocoder = sound.parts.values()
    vae.add_module("vocoder", vocoder)
    return vae


VAES: dict[str, Callable[[], Any]] = {
    "kl": vaes.kl,
    "kl16": vaes.kl16,
    "tiny": vaes.tiny,
    "flux2": vaes.flux2,
    "qwen-image": vaes.qwen_image,
    "qwen-image-2.1": vaes.qwen_image_21,
    "hunyuan-image": vaes.hunyuan_image,
    "dc": vaes.dc,
    "wan": vaes.wan,
    "wan-2.2-5b": vaes.wan_22,
    "ltx": vaes.ltx,
    "ltx-timestep": lambda: vaes.ltx(timestep_conditioning=True),
    "ltx2": vaes.ltx2,
    "cogvideox": vaes.cogvideox,
    "mochi": vaes.mochi,
    "hunyuan-video": vaes.hunyuan_video,
    "hunyuan-video-1.5": vaes.hunyuan_video_15,
    "cosmos": vaes.cosmos,
    "stable-video": vaes.temporal,
    "easy-animate": vaes.magvit,
    "allegro": vaes.allegro,
    "hunyuan-image-refiner": vaes.hunyuan_image_refiner,
    "kvae": vaes.kvae,
    "kvae-video": vaes.kvae_video,
    "minimax-h3": vaes.minimax_h3,
    "taehv": lambda: preview_vae("taew2_1"),
    "taeltx": lambda: preview_vae("taeltx_2"),
    "taecvx": lambda: preview_vae("taecvx"),
    "taeh3": lambda: preview_vae("taeh3"),
    "oobleck": oobleck,
    "ltx2-audio": lambda: with_vocoder(SOUNDS["ltx2-audio"]()),
    "minimax-h3-audio": lambda: next(iter(SOUNDS["minimax-h3-audio"]().parts.values())),
    "of-no-family": vaes.asymmetric,
}
FEW = (2, 3)
LATENT_SIZES = {
    **dict.fromkeys(("hunyuan-image", "dc", "ltx", "ltx-timestep", "ltx2"), FEW),
    "allegro": (16, 16),  # its tile
    **dict.fromkeys(("oobleck", "minimax-h3-audio"), (7,)),
    "ltx2-audio": (7, 2),
}
LATENT_FRAMES = {"allegro": 6}
FRAMES = {"allegro": 24}
ARGUMENTS = {"ltx-timestep": {"timestep": 0.05}, "stable-video": {"decode_chunk_size": 2}}
DECODED_ONLY = {"oobleck", "ltx2-audio", "minimax-h3-audio"}
CASES = [
    pytest.param(name, choice, together, id=f"{name}-{choice}-{together}")
    for name in VAES
    for choice in ("auto", "diffusers")
    for together in (2, 3)
]


@cache
def made(name: str) -> tuple[Any, Family, LatentSpec]:
    vae = VAES[name]().eval().requires_grad_(False)
    family = family_of_class(type(vae).__name__) or plain_family(vae.config)
    config = dict(vae.config) | ({"vocoder": vae.vocoder.config} if name == "ltx2-audio" else {})
    return vae, family, family.refine(family.describe(config), vae)


def random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_alike(together: Tensor, alone: list[Tensor]) -> None:
    assert len({tuple(one.flatten()[:8].tolist()) for one in alone}) == len(alone), "the inputs are different"
    assert torch.equal(together, torch.cat(alone))


@torch.inference_mode()
@pytest.mark.parametrize(("name", "choice", "together"), CASES)
def test_decodes_that_run_together(name: str, choice: str, together: int) -> None:
    vae, family, spec = made(name)
    decoder, _ = build_coder(copy.deepcopy(vae), family, Direction.DECODE, choice, "none")
    frames = (LATENT_FRAMES.get(name, 3),) if spec.kind == "video" else ()
    latents = random((together, spec.channels, *frames, *LATENT_SIZES.get(name, (5, 4))))

    def decode(latents: Tensor) -> Tensor:
        return decoder.decode(latents, Layout.SAMPLE, **ARGUMENTS.get(name, {})).tensor

    assert_alike(decode(latents), [decode(one) for one in latents.split(1)])


@torch.inference_mode()
@pytest.mark.parametrize(("name", "choice", "together"), [case for case in CASES if case.values[0] not in DECODED_ONLY])
def test_encodes_that_run_together(name: str, choice: str, together: int) -> None:
    vae, family, spec = made(name)
    encoder, _ = build_coder(copy.deepcopy(vae), family, Direction.ENCODE, choice, "none")
    frames = (FRAMES.get(name, 9),) if spec.kind == "video" else ()
    height, width = (side * spec.vae_scale_factor for side in LATENT_SIZES.get(name, (5, 4)))
    pixels = random((together, spec.image_channels, *frames, height, width)).clamp(-1, 1)
    assert_alike(encoder.encode(pixels).tensor, [encoder.encode(one).tensor for one in pixels.split(1)])


def test_every_class_is_here() -> None:
    """Every class of a family whose requests may run together."""
    classes = {name for family in FAMILIES.values() if family.takes_batches for name in family.class_names}
    assert {type(made(name)[0]).__name__ for name in VAES} >= classes
