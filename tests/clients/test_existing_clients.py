"""What clients send that exist and know nothing of this server, in our own words: each gets what it can use.

diffusers' own client of today is in tests/web/test_remote_decode.py, its first version in test_first_client.py, axios in
test_axios.py.
"""

from __future__ import annotations

import io
import json
import urllib.parse
import urllib.request
from typing import Any

import numpy as np
import pytest
import requests
import torch
from numpy.typing import NDArray
from PIL import Image

from server.families import FAMILIES
from server.values import Scaling
from tests.vaes import LocalVae

HALF_LEVEL = 1 / 255


def unit_of(sample: torch.Tensor) -> torch.Tensor:
    """What both packages of ComfyUI nodes make of the answer: images `[N, H, W, 3]` in [0, 1]."""
    unit = (sample.float() / 2 + 0.5).clamp(0, 1)
    return unit[0].permute(1, 2, 3, 0) if unit.ndim == 5 else unit.permute(0, 2, 3, 1)


def node_of_kijai(endpoint: str, latents: torch.Tensor) -> torch.Tensor:
    """HFRemoteVAEDecode: no factor, no `do_scaling`, a width without a height, which for a video is no width at all."""
    return node_answer(endpoint, latents, width=latents.shape[3] * 8)


def node_of_visionatrix(endpoint: str, latents: torch.Tensor) -> torch.Tensor:
    """RemoteVAEDecode: a height and a width too, from the wrong axes for a video."""
    return node_answer(endpoint, latents, height=latents.shape[2] * 8, width=latents.shape[3] * 8)


def node_answer(endpoint: str, latents: torch.Tensor, **size: int) -> torch.Tensor:
    query: dict[str, Any] = {"do_scaling": False, "output_type": "pt", "partial_postprocess": False}
    query |= {"shape": list(latents.shape), "dtype": "float32", **size}
    headers = {"Content-Type": "tensor/binary", "Accept": "tensor/binary"}
    answer = requests.post(endpoint, params=query, data=latents.numpy().tobytes(), headers=headers, timeout=300)
    assert answer.ok, answer.json()
    dtype = {"float16": torch.float16, "float32": torch.float32}[answer.headers["dtype"]]
    shape = json.loads(answer.headers["shape"])
    return unit_of(torch.frombuffer(bytearray(answer.content), dtype=dtype).reshape(shape))


@pytest.mark.parametrize("node", [node_of_kijai, node_of_visionatrix])
@pytest.mark.parametrize("name", ["sd", "sdxl", "flux", "hunyuan"])
def test_comfyuis_nodes_get_the_pixels_of_a_local_decode(
    url: str, vaes: dict[str, LocalVae], name: str, node: Any
) -> None:
    latents = vaes[name].latents(*((3, 4, 6) if name == "hunyuan" else (4, 6)))
    found = node(f"{url}{name}/", latents)
    assert (found - unit_of(vaes[name].decode(latents))).abs().max() <= HALF_LEVEL


def test_a_batch_of_images_of_a_node(url: str, vaes: dict[str, LocalVae]) -> None:
    latents = vaes["sd"].latents(4, 6, batch=2)
    found = node_of_kijai(f"{url}sd", latents)
    assert (found - unit_of(vaes["sd"].decode(latents))).abs().max() <= HALF_LEVEL


@pytest.mark.parametrize("form", ["png", "jpg", "raw"])
@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
def test_sdnext_as_it_is(url: str, vaes: dict[str, LocalVae], name: str, form: str) -> None:
    """With one of its addresses replaced. It sends FLUX.1's latents without their batch axis, and VAE's factors, if any."""
    latents = vaes[name].latents(4, 6)
    config = vaes[name].module.config
    sent = latents[0] if name == "flux" else latents
    query: dict[str, Any] = {"input_tensor_type": "binary", "shape": list(sent.shape), "dtype": "float32"}
    query |= {
        "png": {"image_format": "png", "output_type": "pil"},
        "jpg": {"image_format": "jpg", "output_type": "pil"},
        "raw": {"partial_postprocess": False, "output_type": "pt", "output_tensor_type": "binary"},
    }[form]
    accept = {"png": "image/png", "jpg": "image/jpeg", "raw": "tensor/binary"}[form]
    if name == "flux":
        query |= {"width": 48, "height": 32}
    query |= {"scaling_factor": config.scaling_factor, "shift_factor": config.get("shift_factor")}
    answer = requests.post(
        f"{url}{name}",
        params=query,
        data=sent.numpy().tobytes(),
        headers={"Content-Type": "tensor/binary", "Accept": accept},
        timeout=300,
    )
    assert answer.ok, answer.text
    factors = Scaling(config.scaling_factor, config.get("shift_factor"))
    family = FAMILIES["kl"]
    expected = unit_of(vaes[name].decode(family.unscale(latents, family.describe(config), factors)))[0]
    if form == "raw":
        dtype = {"float16": torch.float16, "float32": torch.float32}[answer.headers["dtype"]]
        sample = torch.frombuffer(bytearray(answer.content), dtype=dtype)
        found = unit_of(sample.reshape(json.loads(answer.headers["shape"])))[0].numpy()
    else:
        found = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB"), np.float32) / 255
    error = np.abs(found - expected.numpy())
    assert error.max() <= HALF_LEVEL if form != "jpg" else error.mean() < 0.2


def test_a_program_with_numpy_only(url: str, vaes: dict[str, LocalVae]) -> None:
    """urllib and numpy, which has no bfloat16: the answer must have a dtype that numpy knows."""
    latents: NDArray[np.float16] = vaes["sd"].latents(4, 6).numpy().astype(np.float16)
    query = {"shape": list(latents.shape), "dtype": "float16", "output_type": "pt"}
    request = urllib.request.Request(
        f"{url}sd?{urllib.parse.urlencode(query, doseq=True)}",
        latents.tobytes(),
        {"Content-Type": "application/octet-stream"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        shape = json.loads(answer.headers["shape"])
        sample = np.frombuffer(answer.read(), answer.headers["dtype"]).reshape(shape)
    expected = vaes["sd"].decode(torch.from_numpy(latents.astype(np.float32)))
    assert np.abs(sample.astype(np.float32) - expected.numpy()).max() < 0.02
