"""diffusers' own `remote_encode`, unmodified, against `vae.encode` of the same weights."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image
from diffusers.utils.remote_utils import remote_encode
from diffusers.video_processor import VideoProcessor
from PIL import ExifTags, Image

from server.inputs import read_file, read_header
from server.outputs.video import render_mp4
from server.values import RawTensor, RenderOptions
from tests.conftest import Serve
from tests.inputs.mp4 import H264, source, write
from tests.vaes import LocalVae
from tests.web.test_errors import assert_refused
from tests.web.test_remote_decode import decode_quietly

Vaes = dict[str, LocalVae]
IMAGE_MODELS = ["sd", "sdxl", "sd3", "flux"]


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Noise over a gradient: nothing that a wrong axis or a wrong resampling leaves alike."""
    noise = np.random.default_rng(0).integers(0, 96, (height, width, 3))
    gradient = np.linspace([0, 40, 159], [159, 0, 60], width)[None]
    return Image.fromarray((noise + gradient).astype(np.uint8)).convert(mode)


def mode_of(vae: LocalVae, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        mode: torch.Tensor = vae.module.encode(pixels.float()).latent_dist.mode()
    return mode


def preprocessed(image: Image.Image, factor: int = 8) -> torch.Tensor:
    processed: torch.Tensor = VaeImageProcessor(vae_scale_factor=factor).preprocess(image)
    return processed.contiguous()


def encode(address: str, pixels: torch.Tensor, **factors: float) -> torch.Tensor:
    """The client frees what `contiguous` copied before it reads it: only contiguous tensors arrive as they are."""
    latents: torch.Tensor = remote_encode(address, pixels.contiguous(), **factors)
    return latents


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", IMAGE_MODELS)
@pytest.mark.parametrize("size", [(64, 96), (70, 111)])
def test_a_picture_encodes_as_locally(url: str, vaes: Vaes, name: str, size: tuple[int, int]) -> None:
    """Sizes off the grid too: diffusers' image processor resamples them to the next lower multiple."""
    image = picture(*size)
    found = remote_encode(f"{url}{name}/encode", image)
    close(found, mode_of(vaes[name], preprocessed(image)))


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_sent_factors_scale_the_latents(url: str, vaes: Vaes, name: str) -> None:
    image = picture(64, 64)
    found = remote_encode(f"{url}{name}/encode", image, scaling_factor=0.7, shift_factor=0.2)
    close(found, (mode_of(vaes[name], preprocessed(image)) - 0.2) * 0.7)
    alone = remote_encode(f"{url}{name}/encode", image, scaling_factor=0.7)
    close(alone, mode_of(vaes[name], preprocessed(image)) * 0.7)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_the_models_own_statistics_scale_what_a_decode_unscales(url: str, vaes: Vaes, name: str) -> None:
    """Encoding with do_scaling and decoding with do_scaling is the VAE's own round trip."""
    image, body = picture(64, 96), io.BytesIO()
    image.save(body, "PNG")
    answer = requests.post(f"{url}{name}/encode", body.getvalue(), params={"do_scaling": True}, timeout=300)
    latents = torch.frombuffer(bytearray(answer.content), dtype=torch.float32)
    latents = latents.reshape(json.loads(answer.headers["shape"]))
    sample = decode_quietly(url + name, latents, output_type="pt", return_type="pt")
    close(sample, vaes[name].decode(mode_of(vaes[name], preprocessed(image))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_float_tensor_is_in_minus_one_to_one(url: str, vaes: Vaes, dtype: torch.dtype) -> None:
    pixels = preprocessed(picture(64, 48)).to(dtype)
    close(encode(url + "encode", pixels), mode_of(vaes["sd"], pixels))
    close(encode(url + "encode", pixels[0]), mode_of(vaes["sd"], pixels))


def test_a_uint8_tensor_is_a_picture(url: str, vaes: Vaes) -> None:
    image = picture(64, 48)
    expected = mode_of(vaes["sd"], preprocessed(image))
    last = torch.from_numpy(np.array(image))[None]  # [1, H, W, 3]
    for pixels in (last.permute(0, 3, 1, 2), last, last[0], last[0].permute(2, 0, 1)):
        close(encode(url + "encode", pixels), expected)


def test_a_batch_and_a_tensor_off_the_grid(url: str, vaes: Vaes) -> None:
    pixels = torch.rand(3, 3, 37, 50, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = mode_of(vaes["sd"], VaeImageProcessor(vae_scale_factor=8).resize(pixels, 32, 48))
    close(encode(url + "encode", pixels), expected)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize(
    "content_type", [None, "right", "application/octet-stream", "application/x-www-form-urlencoded"]
)
def test_the_bytes_say_what_they_are(url: str, vaes: Vaes, kind: str, content_type: str | None) -> None:
    file = io.BytesIO()
    picture(64, 64).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    headers = {} if content_type is None else {"Content-Type": content_type.replace("right", f"image/{kind.lower()}")}
    answer = requests.post(url + "encode", file.getvalue(), headers=headers, timeout=300)
    expected = mode_of(vaes["sd"], preprocessed(Image.open(file).convert("RGB")))
    close(torch.frombuffer(bytearray(answer.content), dtype=torch.float32).reshape(expected.shape), expected)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "1", "LA"])
def test_every_usual_mode_becomes_rgb(url: str, vaes: Vaes, mode: str) -> None:
    file = io.BytesIO()
    picture(64, 64, mode).save(file, "JPEG" if mode == "CMYK" else "PNG")
    answer = requests.post(url + "encode", file.getvalue(), timeout=300)
    expected = mode_of(vaes["sd"], preprocessed(Image.open(file).convert("RGB")))
    close(torch.frombuffer(bytearray(answer.content), dtype=torch.float32).reshape(expected.shape), expected)


def test_json_with_base64_goes_both_ways(url: str, vaes: Vaes) -> None:
    image, file = picture(64, 64), io.BytesIO()
    image.save(file, "PNG")
    expected = mode_of(vaes["sd"], preprocessed(image))
    pixels = preprocessed(image)
    bodies: list[dict[str, Any]] = [
        {"inputs": base64.b64encode(file.getvalue()).decode()},
        {
            "inputs": base64.b64encode(pixels.numpy().tobytes()).decode(),
            "parameters": {"shape": list(pixels.shape), "dtype": "float32"},
        },
    ]
    for body in bodies:
        answer = requests.post(url + "sd/encode", json=body, headers={"Accept": "application/json"}, timeout=300).json()
        found = np.frombuffer(base64.b64decode(answer["inputs"]), answer["parameters"]["dtype"])
        close(torch.tensor(found).reshape(answer["parameters"]["shape"]), expected)


def test_a_sample_of_the_posterior_is_diffusers_own_with_that_seed(url: str, vaes: Vaes) -> None:
    pixels = preprocessed(picture(64, 64))
    with torch.no_grad():
        posterior = vaes["sd"].module.encode(pixels).latent_dist
    params: dict[str, Any] = {"shape": [1, 3, 64, 64], "dtype": "float32", "sample": True}
    for seed in (0, 7):
        answer = requests.post(url + "encode", pixels.numpy().tobytes(), params=params | {"seed": seed}, timeout=300)
        expected = posterior.sample(torch.Generator().manual_seed(seed))
        close(torch.frombuffer(bytearray(answer.content), dtype=torch.float32).reshape(expected.shape), expected)
    unseeded = requests.post(url + "encode", pixels.numpy().tobytes(), params=params, timeout=300)
    assert_refused(unseeded, 400, "bad_request", "needs a seed")


def clip(frames: int = 9, height: int = 32, width: int = 48) -> np.ndarray:
    moving = [np.roll(np.asarray(picture(height, width)), 3 * frame, axis=1) for frame in range(frames)]
    return np.stack(moving)  # [F, H, W, 3]


def test_a_clip_encodes_from_tensors_of_every_layout(url: str, vaes: Vaes) -> None:
    frames = clip()
    video = VideoProcessor(vae_scale_factor=8).preprocess_video([Image.fromarray(frame) for frame in frames])
    expected = mode_of(vaes["hunyuan"], video)
    assert expected.shape == (1, 16, 3, 4, 6)
    pixels = torch.from_numpy(frames)  # [F, H, W, 3]
    for sent in (pixels, pixels.permute(0, 3, 1, 2), pixels.permute(3, 0, 1, 2), pixels[None], video):
        close(encode(url + "hunyuan/encode", sent), expected)
    close(encode(url + "hunyuan/encode", video.transpose(1, 2)), expected)


def test_a_picture_is_a_clip_of_one_frame(url: str, vaes: Vaes) -> None:
    image = picture(32, 48)
    found = remote_encode(url + "hunyuan/encode", image)
    close(found, mode_of(vaes["hunyuan"], preprocessed(image)[:, :, None]))


def test_a_clip_encodes_from_an_mp4(url: str, vaes: Vaes) -> None:
    import imageio_ffmpeg

    frames = clip(9, 36, 50)
    raw = RawTensor(frames.shape, "uint8", memoryview(frames.tobytes()))
    mp4 = bytes(render_mp4(raw, RenderOptions(fps=24, quality=9, media_type="video/mp4")).body)
    answer = requests.post(url + "hunyuan/encode", mp4, timeout=300)
    found = torch.frombuffer(bytearray(answer.content), dtype=torch.float32)
    exactly = ["-vf", "scale=flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"]
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-i",
        "-",
        *exactly,
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    import subprocess

    decoded = subprocess.run(command, input=mp4, capture_output=True, check=True).stdout
    seen = np.frombuffer(decoded, np.uint8).reshape(9, 36, 50, 3)
    processor = VideoProcessor(vae_scale_factor=8)
    video = processor.preprocess_video([Image.fromarray(frame) for frame in seen], height=32, width=48)
    close(found.reshape(1, 16, 3, 4, 6), mode_of(vaes["hunyuan"], video))


def test_a_clips_colours_are_read_as_they_were_written() -> None:
    """On average; swscale's usual conversion darkens by about a level."""
    ramp = np.linspace([0, 40, 250], [250, 120, 10], 128)[None] + np.linspace(0, 5, 128)[:, None, None]
    frames = np.broadcast_to(ramp.round().astype(np.uint8), (3, 128, 128, 3))
    raw = RawTensor(frames.shape, "uint8", memoryview(frames.tobytes()))
    mp4 = bytes(render_mp4(raw, RenderOptions(fps=10, quality=10, media_type="video/mp4")).body)
    seen = read_file(mp4, read_header(mp4, "video/mp4", 9), "RGB")
    error = np.frombuffer(seen.data, np.uint8).reshape(-1, 3).astype(float).mean(0) - frames.reshape(-1, 3).mean(0)
    assert np.abs(error).max() < 0.4, error


def test_files_are_encoded_upright_unless_the_client_says_otherwise(url: str, vaes: Vaes, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = tmp_path / "photo.jpg"
    picture(32, 64).save(path, exif=exif, quality=95)
    with Image.open(path) as stored:
        stored.load()
    for rotate, image in ((None, load_image(str(path))), ("True", load_image(str(path))), ("False", stored)):
        answer = requests.post(url + "sd/encode", path.read_bytes(), params={"rotate": rotate}, timeout=300)
        expected = mode_of(vaes["sd"], preprocessed(image.convert("RGB")))
        assert json.loads(answer.headers["shape"]) == list(expected.shape)
        close(torch.frombuffer(bytearray(answer.content), dtype=torch.float32).reshape(expected.shape), expected)
    body = {"inputs": base64.b64encode(path.read_bytes()).decode(), "parameters": {"rotate": False}}
    assert requests.post(url + "sd/encode", json=body, timeout=300).headers["shape"] == "[1, 4, 4, 8]"
    refused = requests.post(url + "sd/encode", path.read_bytes(), params={"rotate": "left"}, timeout=300)
    assert_refused(refused, 400, "bad_request", "rotate must be True or False")


def test_a_turned_mp4_is_encoded_upright_unless_the_client_says_otherwise(url: str, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.mp4", *source(0.2, size="64x32"), *H264)
    turned = write(tmp_path / "turned.mp4", "-display_rotation", "90", "-i", whole, "-c", "copy").read_bytes()
    for rotate, shape in (("True", "[1, 16, 2, 8, 4]"), ("False", "[1, 16, 2, 4, 8]")):
        answer = requests.post(url + "hunyuan/encode", turned, params={"rotate": rotate}, timeout=300)
        assert answer.headers["shape"] == shape, answer.text[:200]


def test_of_a_cut_mp4_what_a_player_shows_is_encoded(url: str, tmp_path: Path) -> None:
    """The model takes 17 frames; the file has 25."""
    whole = write(tmp_path / "whole.mp4", *source(1, size="64x32"), *H264, "-bf", "0")
    cut = write(tmp_path / "cut.mp4", "-ss", "0.8", "-t", "0.2", "-i", whole, "-c", "copy").read_bytes()
    answer = requests.post(url + "hunyuan/encode", cut, timeout=300)
    assert answer.headers["shape"] == "[1, 16, 2, 4, 8]", answer.text[:200]
    refused = requests.post(url + "hunyuan/encode", whole.read_bytes(), timeout=300)
    assert_refused(refused, 413, "too_large", "25 frames, but 'hunyuan' takes at most 17")


def test_half_precision_answers_in_its_own_dtype(url: str, vaes: Vaes) -> None:
    found = remote_encode(url + "sd-bf16/encode", picture(64, 64))
    expected = mode_of(vaes["sd"], preprocessed(picture(64, 64)))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


def test_what_is_seen_of_an_encode(serve: Serve, vaes: Vaes) -> None:
    address = serve({"sd": {"repo": str(vaes["sd"].folder), "dtype": "float32"}})
    file = io.BytesIO()
    picture(64, 64).save(file, "PNG")
    answer = requests.post(address + "encode", file.getvalue(), timeout=300)
    assert [part.split(";")[0] for part in answer.headers["Server-Timing"].split(", ")] == ["queue", "encode", "render"]
    listed = requests.get(address + "models", timeout=300).json()["models"][0]
    assert (listed["decoder"], listed["state"]) == (None, "loaded"), "only the encoder's weights are there"
    metrics = requests.get(address + "metrics", timeout=300).text
    assert 'vae_encode_seconds_count{model="sd"} 1.0' in metrics
    assert 'vae_input_pixels_total{model="sd"} 4096.0' in metrics
