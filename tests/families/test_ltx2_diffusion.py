"""The diffusion decoder of LTX-2.5 behind a server: its noise, its steps, and what it cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
import torch

from server.config import load_settings
from tests.conftest import running, write_models_yaml
from tests.pipelines import vaes
from tests.pipelines.sample import noise, quiet

pytestmark = pytest.mark.usefixtures("one_core")

LATENTS = noise(1, 16, 2, 3, 4)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("ltx2-diffusion")
    vaes.ltx2_diffusion().save_pretrained(folder / "decoder")
    entry = {"repo": str(folder / "decoder"), "dtype": "float32", "warmup": [[96, 128]], "limits": {"max_batch": 2}}
    config = write_models_yaml(folder / "models.yaml", {"ltx": entry}, "ltx")
    with running(load_settings(config=config)) as url:
        yield url


def ask(address: str, latents: torch.Tensor = LATENTS, path: str = "", **parameters: Any) -> requests.Response:
    sent = {"shape": list(latents.shape), "dtype": "float32", "output_type": "pt", **parameters}
    return requests.post(address + path, latents.numpy().tobytes(), params=sent, timeout=300)


def sample(answer: requests.Response) -> torch.Tensor:
    assert answer.ok, answer.text
    return torch.frombuffer(bytearray(answer.content), dtype=torch.float32)


def test_the_same_request_gives_the_same_bytes_also_beside_others(address: str) -> None:
    first = ask(address).content
    seeded = ask(address, seed=2**64 - 1).content
    assert ask(address, seed=0).content == first, "0 is the default seed"
    assert seeded != first
    with ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(lambda seed: ask(address, seed=seed).content, [0, 2**64 - 1] * 3))
    assert answers == [first, seeded] * 3


@pytest.mark.parametrize("parameters", [{"seed": 5}, {"seed": 7, "decode_steps": 3}], ids=str)
def test_seed_and_steps_are_those_of_diffusers(address: str, parameters: dict[str, int]) -> None:
    decoder = vaes.ltx2_diffusion()
    generator = torch.Generator().manual_seed(parameters["seed"])
    with torch.no_grad(), quiet():
        expected = decoder.decode(LATENTS, generator, parameters.get("decode_steps")).sample
    torch.testing.assert_close(sample(ask(address, **parameters)), expected.flatten(), atol=1e-4, rtol=0)


def test_each_video_of_a_batch_gets_the_noise_of_the_seed(address: str) -> None:
    both = sample(ask(address, torch.cat([LATENTS, -LATENTS]), seed=3)).chunk(2)
    alone = [sample(ask(address, latents, seed=3)) for latents in (LATENTS, -LATENTS)]
    assert all(torch.equal(*pair) for pair in zip(both, alone, strict=True))


def test_a_video_smaller_than_an_attention_window_is_refused(address: str) -> None:
    answer = ask(address, LATENTS[:, :, :1])
    assert answer.status_code == 422, answer.text
    assert "takes at least 2 latent frames of 3x3" in answer.json()["error"]


@pytest.mark.parametrize("path", ["", "encode"])
def test_it_does_not_encode(address: str, path: str) -> None:
    answer = ask(address, torch.zeros(1, 3, 9, 96, 128), path)
    assert answer.status_code == 422, answer.text
    assert "is a decoder without an encoder" in answer.json()["error"]
