"""README's recipes: a new model is one entry in models.yaml, a new output one function and one line, a new family one file."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import requests
import torch
from diffusers import AutoencoderKLWan
from PIL import Image

from server import outputs
from server.families import FAMILIES
from server.families.hunyuan_video import HunyuanVideo
from server.families.kl import KL
from server.outputs import FORMATS, Format
from server.outputs.image import as_image
from server.values import RawTensor, Rendered, RenderOptions
from tests.conftest import Serve
from tests.vaes import LocalVae

Vaes = dict[str, LocalVae]


def post(url: str, latents: torch.Tensor, **query: object) -> requests.Response:
    accept = {"Accept": str(query.pop("accept", "*/*"))}
    query |= {"shape": list(latents.shape), "dtype": "float32"}
    return requests.post(url, params=query, data=latents.numpy().tobytes(), headers=accept, timeout=300)


def test_a_new_model_is_one_entry(serve: Serve, vaes: Vaes) -> None:
    address = serve(
        {"sd": {"repo": str(vaes["sd"].folder)}, "mine": {"repo": str(vaes["sd3"].folder), "dtype": "float32"}}
    )
    latents = vaes["sd3"].latents(8, 8)
    sample = post(address + "mine", latents, output_type="pt", do_scaling=True)
    expected = vaes["sd3"].decode(latents / 1.5305 + 0.0609).numpy()
    assert np.abs(np.frombuffer(sample.content, "float32").reshape(1, 3, 64, 64) - expected).max() <= 1e-4


def test_a_new_output_is_one_function_and_one_line(serve: Serve, vaes: Vaes) -> None:
    def render_webp(pixels: RawTensor, options: RenderOptions) -> Rendered:
        buffer = io.BytesIO()
        as_image(pixels).save(buffer, "WEBP", lossless=True)
        return Rendered(buffer.getbuffer(), options.media_type)

    FORMATS.append(Format(("webp",), ("image/webp",), outputs.IMAGE, outputs.PIL, render_webp))
    try:
        address = serve({"sd": {"repo": str(vaes["sd"].folder)}})
        latents = vaes["sd"].latents(8, 8)
        for query in ({"image_format": "webp"}, {"accept": "image/webp"}):
            answer = post(address, latents, **query)
            assert answer.headers["content-type"] == "image/webp"
            assert Image.open(io.BytesIO(answer.content)).format == "WEBP"
        assert "image/webp" in requests.get(address + "models", timeout=300).json()["models"][0]["outputs"]
    finally:
        FORMATS.pop()


class Wan(HunyuanVideo):
    """As a file in families/ would add Wan 2.1: 5-D latents, its own config keys and statistics per channel."""

    name = "wan"
    class_names = ("AutoencoderKLWan",)
    channels_key = "z_dim"
    config_defaults: ClassVar = {"z_dim": 16, "scale_factor_spatial": 8, "scale_factor_temporal": 4}

    def scale_factors(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return config["scale_factor_spatial"], config["scale_factor_temporal"]


def test_a_family_of_another_class_touches_nothing_else(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real AutoencoderKLWan, decoded by diffusers, with latents unscaled as `WanPipeline.__call__` does."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    vae.save_pretrained(tmp_path / "wan")
    monkeypatch.setitem(FAMILIES, "wan", Wan())
    address = serve({"wan": {"repo": str(tmp_path / "wan"), "dtype": "float32"}})
    latents = torch.randn(1, 16, 2, 4, 6)
    answer = post(address, latents, output_type="pt", do_scaling=True)
    mean, std = (
        torch.tensor(values).view(1, 16, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    with torch.no_grad():
        expected = vae.decode(latents * std + mean, return_dict=False)[0].numpy()
    assert expected.shape == (1, 3, 5, 32, 48)
    assert np.abs(np.frombuffer(answer.content, "float32").reshape(expected.shape) - expected).max() <= 1e-4
    assert post(address, latents, output_type="mp4").content[4:8] == b"ftyp"


def test_a_new_family_is_one_class(serve: Serve, vaes: Vaes, monkeypatch: pytest.MonkeyPatch) -> None:
    class UpsideDown(KL):
        name = "upside_down"

        def unpack(self, latents: torch.Tensor, geometry: object) -> torch.Tensor:
            return latents.flip(-2)

    monkeypatch.setitem(FAMILIES, "upside_down", UpsideDown())
    address = serve({"odd": {"repo": str(vaes["sd"].folder), "family": "upside_down", "dtype": "float32"}})
    latents = vaes["sd"].latents(8, 8)
    sample = np.frombuffer(post(address, latents, output_type="pt").content, "float32").reshape(1, 3, 64, 64)
    assert np.abs(sample - vaes["sd"].decode(latents.flip(-2)).numpy()).max() <= 1e-4
