"""Real pipelines with RemoteVAE as their `vae`, against the same pipelines with the VAE itself."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from remote_vae import RemoteVAE

from tests.clients import pipes
from tests.conftest import running
from tests.pipelines import IMAGE_TO_LATENTS, SAMPLES
from tests.pipelines.encoding import vae_input
from tests.pipelines.sample import noise, quiet

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_core")]

WHOLE = [name for name in pipes.WHOLE if pipes.whole(name)]
BLOCKS = [name for name in pipes.BLOCKS if pipes.block(name)]
ENCODED = {name: SAMPLES[name]().vae for name in IMAGE_TO_LATENTS if name not in {*WHOLE, *BLOCKS}}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One server with the VAE of every pipeline."""
    vaes = {name: pipes.whole(name).vae for name in WHOLE} | {name: pipes.block(name).vae for name in BLOCKS}
    with running(pipes.with_vaes(tmp_path_factory.mktemp("remote"), vaes | ENCODED)) as url:
        yield url


FACTORS = (
    *("vae_scale_factor", "vae_scale_factor_spatial", "vae_scale_factor_temporal"),
    *("vae_spatial_compression_ratio", "vae_temporal_compression_ratio"),
    *("vae_spatial_scale_factor", "vae_temporal_scale_factor"),
)


def with_vae(pipe: Any, vae: Any) -> Any:
    """The same pipeline with another VAE."""
    other = copy(pipe)
    other.vae = vae
    return other


@pytest.mark.parametrize("name", WHOLE)
def test_a_pipeline_makes_the_same_with_the_remote_vae(address: str, name: str) -> None:
    case = pipes.whole(name)
    if name == "chrono-edit":  # the sample's image is noise outside [-1, 1], which the server refuses
        case = replace(case, inputs=case.inputs | {"image": case.inputs["image"].clamp(-1, 1)})
    remote = with_vae(case.pipe, RemoteVAE(address + name))
    assert type(remote.vae) is RemoteVAE
    pipes.assert_same(pipes.run(remote, **case.inputs), pipes.run(case.pipe, **case.inputs))


@pytest.mark.parametrize("name", WHOLE)
def test_a_pipeline_that_is_made_with_the_remote_vae_finds_the_same_factors(address: str, name: str) -> None:
    pipe = pipes.whole(name).pipe
    taken = inspect.signature(type(pipe)).parameters.keys()
    options = {key: value for key, value in pipe.config.items() if key in taken and key not in pipe.components}
    with quiet():
        made = type(pipe)(**pipe.components | options | {"vae": RemoteVAE(address + name)})
    factors = [name for name in FACTORS if hasattr(pipe, name)]
    assert factors
    assert [getattr(made, name) for name in factors] == [getattr(pipe, name) for name in factors]
    for processor in ("image_processor", "video_processor"):
        if getattr(pipe, processor, None) is not None:
            assert getattr(made, processor).config.vae_scale_factor == getattr(pipe, processor).config.vae_scale_factor


@pytest.mark.parametrize("name", BLOCKS)
def test_modular_blocks_make_the_same_with_the_remote_vae(address: str, name: str) -> None:
    case = pipes.block(name)
    found, expected = case.run(RemoteVAE(address + name)), case.run(case.vae)
    pipes.assert_same(pipes.levels(found), pipes.levels(expected))


@pytest.mark.parametrize("name", [*WHOLE, *BLOCKS])
def test_it_has_the_attributes_that_pipelines_read(address: str, name: str) -> None:
    local = (pipes.whole(name) if name in WHOLE else pipes.block(name)).vae
    remote = RemoteVAE(address + name)
    assert isinstance(remote, type(local))
    assert (remote.dtype, remote.device) == (torch.float32, torch.device("cpu"))
    for key, value in local.config.items():
        if not key.startswith("_") and key != "force_upcast":
            assert remote.config[key] == json.loads(json.dumps(value)), key  # the server sends tuples as lists
            assert getattr(remote.config, key) == remote.config[key]
    assert not remote.config.force_upcast
    ratios = ("spatial_compression_ratio", "temporal_compression_ratio")
    for key in (*ratios, "temperal_downsample", "tokens_chunk_size"):
        with quiet():
            expected = getattr(local, key, None)
        assert expected is None or getattr(remote, key) == expected, key
    for key, values in local.named_buffers():
        if key in ("latents_mean", "latents_std"):
            torch.testing.assert_close(getattr(remote, key), values)
    if hasattr(local, "bn"):
        torch.testing.assert_close(remote.bn.running_mean, local.bn.running_mean)
        torch.testing.assert_close(remote.bn.running_var, local.bn.running_var)


@pytest.mark.parametrize("name", IMAGE_TO_LATENTS)
def test_an_image_to_image_pipeline_holds_the_same_latents(address: str, name: str) -> None:
    """Most pipelines sample the posterior, with the generator of the caller."""
    sample = SAMPLES[name]()
    pixels, encode = vae_input(sample), IMAGE_TO_LATENTS[name]
    torch.manual_seed(3)  # some pipelines have no generator
    expected = encode(deepcopy(sample.vae), pixels)
    torch.manual_seed(3)
    found = encode(RemoteVAE(address + name), pixels)
    torch.testing.assert_close(found, expected, atol=1e-3 if name == "minimax-h3" else 1e-4, rtol=1e-4)


def picture(width: int, height: int) -> Image.Image:
    pixels = (noise(height, width, 3).clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((width // 4, height // 4)).resize((width, height))


def half(width: int, height: int) -> Image.Image:
    """A mask of the right half."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def clip(width: int, height: int, frames: int) -> list[Image.Image]:
    return [picture(width, height).point(lambda value, n=n: max(0, value - 8 * n)) for n in range(frames)]


# Pipelines that take an image: the sample that they share their components with, and what they are called with.
FROM_IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "StableDiffusionImg2ImgPipeline": ("stable-diffusion", {"image": picture(48, 64), "strength": 0.9}),
    "StableDiffusionInpaintPipeline": ("stable-diffusion", {"image": picture(48, 64), "mask_image": half(48, 64)}),
    "StableDiffusionXLImg2ImgPipeline": ("sdxl", {"image": picture(48, 64), "strength": 0.9}),
    "StableDiffusionXLInpaintPipeline": ("sdxl", {"image": picture(48, 64), "mask_image": half(48, 64)}),
    "StableDiffusion3Img2ImgPipeline": ("sd3", {"image": picture(48, 64), "strength": 0.9}),
    "StableDiffusion3InpaintPipeline": ("sd3", {"image": picture(48, 64), "mask_image": half(48, 64)}),
    "FluxImg2ImgPipeline": ("flux", {"image": picture(48, 64), "strength": 0.9}),
    "FluxInpaintPipeline": ("flux", {"image": picture(48, 64), "mask_image": half(48, 64)}),
    "QwenImageImg2ImgPipeline": ("qwen-image", {"image": picture(48, 64), "strength": 0.9}),
    "QwenImageInpaintPipeline": ("qwen-image", {"image": picture(48, 64), "mask_image": half(48, 64)}),
    "ZImageImg2ImgPipeline": ("z-image", {"image": picture(48, 64), "strength": 0.9}),
    "WanVideoToVideoPipeline": ("wan", {"video": clip(32, 48, 9), "strength": 0.9}),
    "CogVideoXVideoToVideoPipeline": ("cogvideox", {"video": clip(32, 48, 9), "strength": 0.9}),
    "LTXImageToVideoPipeline": ("ltx", {"image": picture(64, 96)}),
}


@pytest.mark.parametrize("kind", FROM_IMAGES)
def test_a_pipeline_that_takes_images_makes_the_same(address: str, kind: str) -> None:
    name, inputs = FROM_IMAGES[kind]
    case = pipes.whole(name)
    wanted = getattr(diffusers, kind)
    made = []
    for vae in (case.vae, RemoteVAE(address + name)):
        taken = inspect.signature(wanted).parameters
        parts = {key: part for key, part in case.pipe.components.items() if key in taken} | {"vae": vae}
        parts |= {key: False for key in ("requires_safety_checker", "add_watermarker") if key in taken}
        with quiet():
            pipe = wanted(**parts)
        pipe.set_progress_bar_config(disable=True)
        accepted = inspect.signature(pipe.__call__).parameters
        others = {key: value for key, value in case.inputs.items() if key in accepted}
        made.append(pipes.run(pipe, **others | inputs))
    pipes.assert_same(made[1], made[0])


def test_as_many_latent_frames_as_channels_are_not_mistaken_for_them(address: str) -> None:
    vae, latents = pipes.whole("cogvideox").vae, noise(1, 16, 16, 2, 2)
    with torch.no_grad():
        expected = vae.decode(latents).sample.clamp(-1, 1)
    found = RemoteVAE(address + "cogvideox", receive="float32").decode(latents).sample.clamp(-1, 1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
