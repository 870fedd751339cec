"""handler.py as the Inference Endpoints toolkit calls it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from handler import EndpointHandler
from server.errors import BadRequest, ConfigError, Impossible, ServerError, WrongLength
from tests.engine.weights import original_names
from tests.vaes import LocalVae

Vaes = dict[str, LocalVae]


@pytest.fixture(scope="module")
def handlers(vaes: Vaes) -> Iterator[dict[str, EndpointHandler]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VAE_SERVER_DTYPE", "float32")
        yield {name: EndpointHandler(str(vaes[name].folder)) for name in ("sd", "hunyuan")}


@pytest.mark.parametrize("spelling", ["base64", "bytes", "tensor"])
def test_a_picture_is_a_pil_image(handlers: dict[str, EndpointHandler], vaes: Vaes, spelling: str) -> None:
    latents = vaes["sd"].latents(8, 12)
    raw = latents.numpy().tobytes()
    inputs = {"base64": base64.b64encode(raw).decode(), "bytes": raw, "tensor": latents}[spelling]
    parameters: dict[str, Any] = {"scaling_factor": 0.7}
    if spelling != "tensor":
        parameters |= {"shape": [1, 4, 8, 12], "dtype": "float32"}
    image = handlers["sd"]({"inputs": inputs, "parameters": parameters})
    assert isinstance(image, Image.Image)
    expected = (vaes["sd"].decode(latents / 0.7)[0] / 2 + 0.5).clamp(0, 1).mul(255).round().permute(1, 2, 0)
    assert np.abs(np.asarray(image).astype(int) - expected.numpy()).max() <= 1


def test_a_tensor_is_json(handlers: dict[str, EndpointHandler], vaes: Vaes) -> None:
    latents = vaes["sd"].latents(8, 12)
    answer = handlers["sd"]({"inputs": latents, "parameters": {"output_type": "pt", "do_scaling": True}})
    answer = json.loads(json.dumps(answer))
    sample = np.frombuffer(base64.b64decode(answer["inputs"]), answer["parameters"]["dtype"])
    expected = vaes["sd"].decode(latents / 0.18215).numpy()
    assert np.abs(sample.reshape(answer["parameters"]["shape"]) - expected).max() <= 1e-4


def test_a_video_is_json(handlers: dict[str, EndpointHandler], vaes: Vaes) -> None:
    answer = handlers["hunyuan"]({"inputs": vaes["hunyuan"].latents(2, 4, 4), "parameters": {"output_type": "mp4"}})
    answer = json.loads(json.dumps(answer))
    assert answer["parameters"] == {"content_type": "video/mp4"}
    assert base64.b64decode(answer["inputs"])[4:8] == b"ftyp"


def test_a_mistake_raises_the_same_sentence(handlers: dict[str, EndpointHandler]) -> None:
    handler = handlers["sd"]
    with pytest.raises(WrongLength, match="needs 1024 bytes, but the body has 3"):
        handler({"inputs": b"abc", "parameters": {"shape": [1, 4, 8, 8], "dtype": "float32"}})
    with pytest.raises(BadRequest, match="'inputs' must be latents or a file"):
        handler({"parameters": {}})
    with pytest.raises(ServerError, match="no such model; known: model"):
        handler({"inputs": torch.zeros(1, 4, 8, 8), "parameters": {"model": "x"}})
    with pytest.raises(BadRequest, match=r"the dtype of 'inputs' is torch\.float64"):
        handler({"inputs": torch.zeros(1, 4, 8, 8).double()})
    with pytest.raises(BadRequest, match="'parameters' must be an object"):
        handler({"inputs": torch.zeros(1, 4, 8, 8), "parameters": [1]})


def test_the_folder_holds_one_file_of_original_names(
    vaes: Vaes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAE_SERVER_DTYPE", "float32")
    monkeypatch.setenv("VAE_SERVER_VAE_CONFIG", str(vaes["sd"].folder))
    state = original_names.ldm(vaes["sd"].module.state_dict())
    latents = vaes["sd"].latents(8, 8)
    for name, others in (("decoder", "encoder."), ("encoder", "decoder.")):
        folder = tmp_path / name
        folder.mkdir()
        kept = {key: value.contiguous() for key, value in state.items() if not key.startswith(others)}
        save_file(kept, folder / "vae-ft-mse.safetensors")
    answer = EndpointHandler(str(tmp_path / "decoder"))({"inputs": latents, "parameters": {"output_type": "pt"}})
    sample = np.frombuffer(base64.b64decode(str(answer["inputs"])), np.float32).reshape(1, 3, 64, 64)
    assert np.abs(sample - vaes["sd"].decode(latents).numpy()).max() <= 1e-4
    with pytest.raises(Impossible, match="are only an encoder"):
        EndpointHandler(str(tmp_path / "encoder"))({"inputs": latents})


def test_the_folder_holds_a_vae_or_a_models_yaml(vaes: Vaes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models.yaml").write_text(f"models: {{own: {{repo: '{vaes['flux'].folder}'}}}}")
    assert EndpointHandler(str(tmp_path)).direct.settings.default == "own"
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "vae").symlink_to(vaes["sd"].folder)
    assert EndpointHandler(str(tmp_path / "pipeline")).direct.models.describe("model").latents.channels == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ConfigError,
        match=r"empty contains no config\.json of a diffusers VAE, no vae/config\.json, no safetensors file and no",
    ):
        EndpointHandler(str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    assert EndpointHandler().direct.settings.default == "own", "without a path: models.yaml of the working folder"
