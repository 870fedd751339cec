"""diffusers' own client, unmodified, for every cell of the contract's tables, against a local decode of the same weights."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.remote_utils import remote_decode
from diffusers.video_processor import VideoProcessor
from PIL import Image

from tests.conftest import Serve
from tests.vaes import LocalVae

Vaes = dict[str, LocalVae]
IMAGE_MODELS = ["sd", "sdxl", "sd3", "flux"]
SENT_FACTORS = {"scaling_factor": 0.7, "shift_factor": 0.2}


def pixels_of(sample: torch.Tensor) -> np.ndarray:
    """[1, C, H, W] -> [H, W, C], as diffusers' image processor makes them."""
    image: Image.Image = VaeImageProcessor().postprocess(sample, output_type="pil")[0]
    return np.asarray(image).astype(int)


def model_unscaled(vae: LocalVae, latents: torch.Tensor) -> torch.Tensor:
    """As each model's own pipeline unscales."""
    config = vae.module.config
    if vae.name == "sdxl":
        mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (config.latents_mean, config.latents_std))
        return latents * std / config.scaling_factor + mean
    if vae.name in ("sd3", "flux"):
        return latents / config.scaling_factor + config.shift_factor
    return latents / config.scaling_factor


@pytest.mark.parametrize("name", IMAGE_MODELS)
@pytest.mark.parametrize("given", [SENT_FACTORS, {"scaling_factor": 0.7}, {"do_scaling": False}, {}])
def test_the_raw_sample_equals_a_local_decode_for_every_kind_of_scaling(
    url: str, vaes: Vaes, name: str, given: dict[str, Any]
) -> None:
    vae, latents = vaes[name], vaes[name].latents(9, 6)
    sample = decode_quietly(url + name, latents, **given, output_type="pt", return_type="pt")
    if "scaling_factor" in given:
        unscaled = latents / 0.7 + given.get("shift_factor", 0)
    else:
        unscaled = latents if given else model_unscaled(vae, latents)
    assert sample.dtype == torch.float32
    torch.testing.assert_close(sample, vae.decode(unscaled), atol=1e-4, rtol=0)


def decode_quietly(*args: Any, **kwargs: Any) -> Any:
    """The client warns that do_scaling is deprecated; that is its business."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return remote_decode(*args, **kwargs)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_a_png_is_within_one_level_of_the_local_picture(url: str, vaes: Vaes, name: str) -> None:
    latents = vaes[name].latents(8, 12)
    image = remote_decode(url + name, latents, **SENT_FACTORS, image_format="png")
    expected = pixels_of(vaes[name].decode(latents / 0.7 + 0.2))
    assert image.format == "png"
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1


def test_a_jpeg_is_the_default_and_shows_the_same_picture(url: str, vaes: Vaes) -> None:
    latents = vaes["sd"].latents(8, 12)
    image = remote_decode(url, latents, **SENT_FACTORS)
    expected = pixels_of(vaes["sd"].decode(latents / 0.7 + 0.2))
    assert image.format == "jpeg"
    local = io.BytesIO()
    Image.fromarray(expected.astype("uint8")).save(local, "JPEG", quality=75)
    difference = np.asarray(image).astype(int) - np.asarray(Image.open(local)).astype(int)
    assert np.abs(difference).mean() < 0.5


def test_partial_postprocess_sends_uint8_pixels(url: str, vaes: Vaes) -> None:
    latents = vaes["sd"].latents(8, 12, batch=3)
    pixels = remote_decode(url, latents, **SENT_FACTORS, output_type="pt", return_type="pt", partial_postprocess=True)
    assert pixels.shape == (3, 64, 96, 3)
    for n in range(3):
        expected = pixels_of(vaes["sd"].decode(latents[n : n + 1] / 0.7 + 0.2))
        assert np.abs(pixels[n].numpy().astype(int) - expected).max() <= 1


def test_partial_postprocess_returns_pictures(url: str, vaes: Vaes) -> None:
    images = remote_decode(
        url, vaes["sd"].latents(8, 12, batch=2), output_type="pt", partial_postprocess=True, **SENT_FACTORS
    )
    assert [image.size for image in images] == [(96, 64), (96, 64)]


def test_the_raw_sample_goes_through_the_clients_processor(url: str, vaes: Vaes) -> None:
    latents = vaes["sd"].latents(8, 12)
    image = remote_decode(url, latents, processor=VaeImageProcessor(), output_type="pt", **SENT_FACTORS)
    expected = pixels_of(vaes["sd"].decode(latents / 0.7 + 0.2))
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1


def test_pil_with_a_processor_is_floats_from_0_to_1(url: str, vaes: Vaes) -> None:
    latents = vaes["sd"].latents(8, 12, batch=2)
    unit = remote_decode(url, latents, processor=VaeImageProcessor(), return_type="pt", **SENT_FACTORS)
    expected = (vaes["sd"].decode(latents / 0.7 + 0.2) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(unit, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_packed_latents_decode_as_unpacked_ones(url: str, vaes: Vaes, name: str) -> None:
    latents = vaes[name].latents(12, 8, batch=2)
    packed = FluxPipeline._pack_latents(latents, 2, vaes[name].channels, 12, 8)
    assert packed.shape == (2, 24, 4 * vaes[name].channels)
    sample = remote_decode(url + name, packed, **SENT_FACTORS, height=96, width=64, output_type="pt", return_type="pt")
    torch.testing.assert_close(sample, vaes[name].decode(latents / 0.7 + 0.2), atol=1e-4, rtol=0)


def test_a_single_latent_without_its_batch_axis_decodes(url: str, vaes: Vaes) -> None:
    """SD.Next drops the axis and sends height and width; 16x64x64 could be packed by its last axis alone."""
    latents = vaes["flux"].latents(64, 64)
    sample = remote_decode(
        url + "flux", latents[0], **SENT_FACTORS, height=512, width=512, output_type="pt", return_type="pt"
    )
    torch.testing.assert_close(sample, vaes["flux"].decode(latents / 0.7 + 0.2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_latents_are_read_as_what_they_are(url: str, vaes: Vaes, dtype: torch.dtype) -> None:
    latents = vaes["sd"].latents(8, 8).to(dtype)
    sample = remote_decode(url, latents, **SENT_FACTORS, output_type="pt", return_type="pt")
    torch.testing.assert_close(sample, vaes["sd"].decode(latents.float() / 0.7 + 0.2), atol=1e-4, rtol=0)


def test_a_bfloat16_model_answers_in_float16(url: str, vaes: Vaes) -> None:
    """Which NumPy has, and which holds a sample's bfloat16 values exactly."""
    latents = vaes["sd"].latents(8, 8)
    sample = remote_decode(url + "sd-bf16", latents, **SENT_FACTORS, output_type="pt", return_type="pt")
    unit = remote_decode(url + "sd-bf16", latents, **SENT_FACTORS, processor=VaeImageProcessor(), return_type="pt")
    assert (sample.dtype, unit.dtype) == (torch.float16, torch.float16)
    torch.testing.assert_close(sample.float(), vaes["sd"].decode(latents / 0.7 + 0.2), atol=0.1, rtol=0.1)
    exact = remote_decode(
        url + "sd-bf16?output_dtype=bfloat16", latents, **SENT_FACTORS, output_type="pt", return_type="pt"
    )
    assert exact.dtype == torch.bfloat16
    assert ((exact == sample.to(torch.bfloat16)) | (exact.abs() < 2**-14)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("model", ["sd", "sd-bf16"])
@pytest.mark.parametrize("output_type", ["pt", "pil"])
def test_output_dtype_chooses_the_dtype_of_a_float_answer(
    url: str, vaes: Vaes, output_type: str, model: str, dtype: torch.dtype
) -> None:
    name = str(dtype).removeprefix("torch.")
    given: dict[str, Any] = {
        **SENT_FACTORS,
        "output_type": output_type,
        "return_type": "pt",
        "processor": VaeImageProcessor(),
    }
    latents = vaes["sd"].latents(8, 8)
    answer = remote_decode(f"{url}{model}?output_dtype={name}", latents, **given)
    assert answer.dtype == dtype
    usual = remote_decode(url + model, latents, **given)
    torch.testing.assert_close(answer.float(), usual.float(), atol=1e-2, rtol=1e-2)


def test_output_dtype_leaves_pixels_alone_and_is_checked(url: str, vaes: Vaes) -> None:
    latents, given = vaes["sd"].latents(8, 8), {**SENT_FACTORS, "output_type": "pt", "return_type": "pt"}
    pixels = remote_decode(url + "?output_dtype=float16", latents, **given, partial_postprocess=True)
    assert pixels.dtype == torch.uint8
    with pytest.raises(RuntimeError, match="output_dtype of the answer must be one of float16, bfloat16, float32"):
        remote_decode(url + "?output_dtype=uint8", latents, **given)


def test_a_model_that_must_upcast_runs_in_float32(url: str, vaes: Vaes) -> None:
    latents = vaes["sdxl"].latents(8, 8)
    sample = remote_decode(url + "sdxl-half", latents, **SENT_FACTORS, output_type="pt", return_type="pt")
    torch.testing.assert_close(sample, vaes["sdxl"].decode(latents / 0.7 + 0.2), atol=1e-4, rtol=0)


def test_a_batch_equals_its_latents_one_by_one(url: str, vaes: Vaes) -> None:
    latents = vaes["sd"].latents(8, 12, batch=4)
    together = remote_decode(url, latents, **SENT_FACTORS, output_type="pt", return_type="pt")
    for n in range(4):
        alone = remote_decode(url, latents[n : n + 1], **SENT_FACTORS, output_type="pt", return_type="pt")
        torch.testing.assert_close(together[n : n + 1], alone, atol=1e-4, rtol=0)


def test_a_video_s_raw_sample_equals_a_local_decode(url: str, vaes: Vaes) -> None:
    latents = vaes["hunyuan"].latents(3, 4, 6)
    sample = remote_decode(url + "hunyuan", latents, scaling_factor=0.476986, output_type="pt", return_type="pt")
    assert sample.shape == (1, 3, 9, 32, 48)
    torch.testing.assert_close(sample, vaes["hunyuan"].decode(latents / 0.476986), atol=1e-4, rtol=0)


def test_a_video_with_a_processor_is_frames(url: str, vaes: Vaes) -> None:
    latents = vaes["hunyuan"].latents(3, 4, 6)
    expected = VideoProcessor().postprocess_video(vaes["hunyuan"].decode(latents / 0.5), output_type="np")[0]
    frames = remote_decode(url + "hunyuan", latents, processor=VideoProcessor(), scaling_factor=0.5)
    assert len(frames) == 9
    for frame, local in zip(frames, expected, strict=True):
        assert np.abs(np.asarray(frame).astype(int) - np.round(local * 255).astype(int)).max() <= 1
    raw = remote_decode(url + "hunyuan", latents, processor=VideoProcessor(), output_type="pt", scaling_factor=0.5)
    assert len(raw) == 9
    uint8 = remote_decode(
        url + "hunyuan", latents, output_type="pt", return_type="pt", partial_postprocess=True, scaling_factor=0.5
    )
    assert uint8.shape == (9, 32, 48, 3)
    assert np.abs(uint8[4].numpy().astype(int) - np.round(expected[4] * 255).astype(int)).max() <= 1


def test_a_video_is_an_mp4_whatever_height_and_width_say(url: str, vaes: Vaes) -> None:
    """One ComfyUI node computes height and width from the frame axis."""
    video = remote_decode(
        url + "hunyuan",
        vaes["hunyuan"].latents(3, 4, 6),
        output_type="mp4",
        return_type="mp4",
        scaling_factor=0.5,
        height=24,
        width=32,
    )
    assert video[4:8] == b"ftyp"


def test_the_client_raises_the_servers_sentence(url: str, vaes: Vaes) -> None:
    with pytest.raises(RuntimeError, match="the latents have 4 channels, but this model's have 16"):
        remote_decode(url + "flux", vaes["sd"].latents(8, 8), **SENT_FACTORS)


@pytest.mark.slow
def test_a_full_size_vae_equals_a_local_decode(serve: Serve, tmp_path: Path) -> None:
    """FLUX.1's own config: 512 channels in 32 groups and one attention head of 512 meet paths that small ones do not."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(
        **blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, scaling_factor=0.3611,
        shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip
    vae.save_pretrained(tmp_path / "full")
    local = LocalVae("full", tmp_path / "full", vae)
    address = serve({"full": {"repo": str(tmp_path / "full"), "family": "flux", "dtype": "float32"}})
    latents = local.latents(10, 14)
    packed = FluxPipeline._pack_latents(latents, 1, 16, 10, 14)
    sample = decode_quietly(address, packed, height=80, width=112, output_type="pt", return_type="pt")
    torch.testing.assert_close(sample, local.decode(latents / 0.3611 + 0.1159), atol=1e-4, rtol=0)
