"""Every family through the server, as a user sends it, against the real pipeline's own pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from diffusers import AsymmetricAutoencoderKL
from diffusers.utils.remote_utils import remote_encode

from server.config import load_settings
from tests.conftest import Serve, running, write_models_yaml
from tests.pipelines import IMAGE_TO_LATENTS, SAMPLES, Sample
from tests.pipelines.encoding import certain, vae_input
from tests.web.test_remote_decode import decode_quietly

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_core")]

# What diffusers' client cannot say is said in the endpoint's address.
QUERIES: dict[str, dict[str, Any]] = {
    "ltx": {"num_frames": "num_frames"},  # the tokens say it too, as they must for ltx-timestep here
    "cogvideox-1.5": {"num_frames": "num_frames"},
}
# Pipelines that do not scale as their VAE's config says; their users send the factor.
FACTORS = {"kandinsky5-image": {"scaling_factor": 0.3611}}
# The family that an entry of models.yaml must name for these VAEs, whose classes have another one too.
FAMILY = {
    "ernie-image": "ernie_image",
    "ideogram4": "ideogram4",
    "ideogram4-unpatched": "ideogram4",
    "qwen-image-layered": "qwen_image_layered",
    "qwen-image-layered-unpacked": "qwen_image_layered",
    "glm-image": "glm_image",
    "fibo": "fibo",
    "sana-video-ltx2": "scaled_ltx2",
    "sana-wm": "scaled_ltx2",
}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One server with the VAE of every sample."""
    folder = tmp_path_factory.mktemp("families")
    models: dict[str, Any] = {}
    for name, make in SAMPLES.items():
        make().vae.save_pretrained(folder / name, safe_serialization=True)
        models[name] = {"repo": str(folder / name), "dtype": "float32", "family": FAMILY.get(name)}
    for name in ("ltx-timestep", "wan", "flux2"):
        models[name] |= {"warmup": [[64, 64]]}
    config = write_models_yaml(folder / "models.yaml", models, next(iter(models)))
    with running(load_settings(config=config)) as url:
        yield url


def asked(address: str, sample: Sample, **arguments: Any) -> torch.Tensor:
    """The server's answer to the pipeline's latents.

    The client sends memory as it lies, and some pipelines return transposed views: users must make them contiguous.
    """
    latents = sample.latents.contiguous()
    size = {"height": sample.height, "width": sample.width} if sample.is_packed else {}
    query = "&".join(f"{key}={getattr(sample, value)}" for key, value in QUERIES.get(sample.name, {}).items())
    url = f"{address}{sample.name}?{query}"
    answer: torch.Tensor = decode_quietly(
        url, latents, **size, **FACTORS.get(sample.name, {}), output_type="pt", return_type="pt", **arguments
    )
    return answer


@pytest.mark.parametrize("name", SAMPLES)
def test_a_pipelines_latents_become_its_pixels(address: str, name: str) -> None:
    sample = SAMPLES[name]()
    answer = asked(address, sample)  # [B, C, H, W] or [B, C, F, H, W]
    unit = (answer / 2 + 0.5).clamp(0, 1)
    if sample.are_floored:
        unit = (255 * unit).floor() / 255
    if unit.ndim == 5:
        unit = unit.transpose(1, 2)  # [B, F, C, H, W]
    expected = sample.pixels if sample.pixels.ndim == unit.ndim else sample.pixels[:, None]
    torch.testing.assert_close(unit, expected, atol=1 / 255 if sample.are_floored else 1e-4, rtol=0)


@pytest.mark.parametrize("name", SAMPLES)
def test_its_uint8_pixels_are_within_one_level(address: str, name: str) -> None:
    sample = SAMPLES[name]()
    answer = asked(address, sample, partial_postprocess=True)  # [B or F, H, W, C]
    expected = (255 * sample.pixels).round().flatten(0, -4).permute(0, 2, 3, 1)
    assert answer.dtype == torch.uint8
    assert (answer.float() - expected).abs().max() <= 1


# Where the server keeps the VAE's axes and a pipeline has others, or none for frames.
TO_OURS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "kandinsky5-video": lambda latents: latents.movedim(-1, 1),  # [B, F, h, w, C]
    "kandinsky5-image": lambda latents: latents[:, 0].movedim(-1, 1),  # [B, 1, h, w, C]
    "qwen-image": lambda latents: latents[:, :, 0],
    "qwen-image-2.1": lambda latents: latents[:, :, 0],
    "stable-video": lambda latents: latents[:, :, None],  # a picture, unscaled
}
UNSCALED = {"stable-video"}


@pytest.mark.parametrize("name", IMAGE_TO_LATENTS)
def test_pixels_become_the_latents_that_an_image_to_image_pipeline_holds(address: str, name: str) -> None:
    sample = SAMPLES[name]()
    pixels = vae_input(sample)
    expected = TO_OURS.get(name, lambda latents: latents)(IMAGE_TO_LATENTS[name](certain(sample.vae), pixels))
    if pixels.ndim == 5 and 1 in expected.shape[1:3]:
        pixels = pixels[:, :, :1]  # the pipeline takes the first frame alone
    query = "" if name in UNSCALED | FACTORS.keys() else "?do_scaling=True"
    answer = remote_encode(f"{address}{name}/encode{query}", pixels.contiguous(), **FACTORS.get(name, {}))
    torch.testing.assert_close(answer, expected, atol=1e-4, rtol=0)


BATCHED = ["stable-video", "hunyuan-video-1.5", "wan", "qwen-image", "cogvideox", "ltx", "sd3", "qwen-image-layered"]


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize("path", ["", "/encode"])
def test_requests_that_run_together_get_what_each_would_have_got_alone(address: str, name: str, path: str) -> None:
    sample = SAMPLES[name]()
    query = {"decode_chunk_size": 2} if name == "stable-video" else {}
    if path:
        pixels = vae_input(sample)[:, :, :1] if sample.pixels.ndim == 5 else vae_input(sample)
        tensors = [(pixels * share).contiguous() for share in (1.0, 0.5, -0.5, 0.1)]
    else:
        tensors = [(sample.latents * share).contiguous() for share in (1.0, 0.5, -0.5, 0.1)]
    sizes = {"height": sample.height, "width": sample.width} if sample.is_packed else {}

    def ask(tensor: torch.Tensor) -> bytes:
        sent = {"shape": list(tensor.shape), "dtype": "float32", "output_type": "pt", **query, **sizes}
        answer = requests.post(f"{address}{name}{path}", tensor.numpy().tobytes(), params=sent, timeout=300)
        assert answer.ok, answer.text
        return answer.content

    alone = [np.frombuffer(ask(tensor), "float32") for tensor in tensors]
    with ThreadPoolExecutor(8) as clients:
        together = [np.frombuffer(found, "float32") for found in clients.map(ask, tensors * 4)]
    for index, found in enumerate(together):
        assert np.abs(found - alone[index % 4]).max() <= 1e-4


def test_a_class_that_no_family_knows_is_decoded_plainly_on_request(serve: Serve, tmp_path: Path) -> None:
    """With diffusers' own decode and encode and its config's statistics."""
    asymmetric = AsymmetricAutoencoderKL(
        down_block_out_channels=(8, 16), up_block_out_channels=(8, 16), norm_num_groups=4, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    asymmetric.save_pretrained(tmp_path / "vae")
    address = serve({"odd": {"repo": str(tmp_path / "vae"), "dtype": "float32", "decoder": "plain"}})
    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    sample = decode_quietly(address, latents, output_type="pt", return_type="pt")
    pixels = torch.rand(1, 3, 16, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(sample, asymmetric.decode(latents / 0.5).sample, atol=1e-4, rtol=0)
        expected = asymmetric.encode(pixels).latent_dist.mode() * 0.5
    torch.testing.assert_close(
        remote_encode(address + "encode", pixels, scaling_factor=0.5), expected, atol=1e-4, rtol=0
    )
