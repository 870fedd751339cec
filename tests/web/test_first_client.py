"""The first published `remote_decode`, from its description: base64 in JSON both ways, `do_scaling`, `tensor/base64`."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
import requests
import torch

from tests.vaes import LocalVae


def first_remote_decode(endpoint: str, tensor: torch.Tensor, **given: Any) -> requests.Response:
    output_type = given.get("output_type", "pil")
    parameters = {"do_scaling": True, "partial_postprocess": False, **given, "output_type": output_type}
    parameters |= {"shape": list(tensor.shape), "dtype": str(tensor.dtype).split(".")[-1]}
    accept = {"pil": "image/jpeg", "pt": "tensor/base64", "mp4": "text/plain"}[output_type]
    return requests.post(
        endpoint,
        params=parameters,
        json={"inputs": base64.b64encode(tensor.numpy().tobytes()).decode("utf-8")},
        headers={"Content-Type": "tensor/base64", "Accept": accept},
        timeout=300,
    )


@pytest.mark.parametrize("do_scaling", [True, False])
def test_base64_both_ways_equals_the_local_decode(url: str, vaes: dict[str, LocalVae], do_scaling: bool) -> None:
    latents = vaes["flux"].latents(8, 8)
    response = first_remote_decode(url + "flux", latents, output_type="pt", do_scaling=do_scaling)
    assert response.headers["content-type"] == "tensor/base64"
    content = response.json()
    sample = np.frombuffer(base64.b64decode(content["inputs"]), content["parameters"]["dtype"])
    unscaled = latents / 0.3611 + 0.1159 if do_scaling else latents
    expected = vaes["flux"].decode(unscaled).numpy()
    assert np.abs(sample.reshape(content["parameters"]["shape"]) - expected).max() <= 1e-4


def test_a_picture_and_a_video(url: str, vaes: dict[str, LocalVae]) -> None:
    picture = first_remote_decode(url, vaes["sd"].latents(8, 8))
    assert (picture.headers["content-type"], picture.content[:2]) == ("image/jpeg", b"\xff\xd8")
    video = first_remote_decode(url + "hunyuan", vaes["hunyuan"].latents(2, 4, 4), output_type="mp4")
    assert (video.headers["content-type"], video.content[4:8]) == ("text/plain", b"ftyp")


def test_parameters_may_come_in_the_body(url: str, vaes: dict[str, LocalVae]) -> None:
    latents = vaes["sd"].latents(8, 8)
    body = {
        "inputs": base64.b64encode(latents.numpy().tobytes()).decode(),
        "parameters": {
            "shape": [1, 4, 8, 8],
            "dtype": "float32",
            "output_type": "pt",
            "scaling_factor": 0.5,
            "model": "sd",
        },
    }
    accept = {"Accept": "application/json"}
    answers = []
    for query in ({}, {"scaling_factor": "0.25"}):
        content = requests.post(url + "predict", params=query, json=body, headers=accept, timeout=300).json()
        assert content["parameters"] == {"shape": [1, 3, 64, 64], "dtype": "float32"}
        answers.append(np.frombuffer(base64.b64decode(content["inputs"]), "float32").reshape(1, 3, 64, 64))
    for answer, factor in zip(answers, (0.5, 0.25), strict=True):
        assert np.abs(answer - vaes["sd"].decode(latents / factor).numpy()).max() <= 1e-4
