"""Memory that the client freed is told from latents: what a real allocator leaves, and latents of every honest kind."""

from __future__ import annotations

import platform
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests
import torch
from diffusers.utils import remote_utils
from hypothesis import given
from hypothesis import strategies as st

from server.engine.freed_memory import looks_freed
from server.engine.tensors import DTYPES, to_host
from server.values import RawTensor
from tests.vaes import LocalVae
from tests.web.test_remote_decode import decode_quietly

ADDRESS = bytes.fromhex("2084242a11560000")  # of a heap; as float16 -0.00006, 0.05, 97, 0
MAIN_ARENA = bytes.fromhex("e07c8b4f127f0000")
DTYPE_NAMES = ("float16", "bfloat16", "float32")


def raw(values: torch.Tensor) -> RawTensor:
    return to_host(values.contiguous())


def is_found(values: torch.Tensor) -> bool:
    return looks_freed(raw(values), values.float())


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_bytes(values: torch.Tensor, first: bytes) -> torch.Tensor:
    """The tensor with other bytes at its start."""
    data = bytearray(bytes(raw(values).data))
    data[: len(first)] = first
    return torch.frombuffer(data, dtype=values.dtype).reshape(values.shape)


def masked(share: float, scale: float) -> torch.Tensor:
    return (noise(1, 4, 64, 64, seed=1) > torch.tensor(1 - share).erfinv() * 2**0.5) * scale


HONEST: dict[str, Callable[[], torch.Tensor]] = {
    "unit noise": lambda: noise(1, 4, 64, 64),
    "packed": lambda: noise(1, 1024, 64),
    "a clip": lambda: noise(1, 16, 5, 32, 32),
    "a large scale": lambda: noise(1, 4, 64, 64) * 6e3,
    "the largest scale": lambda: noise(1, 4, 64, 64) * 1.5e4,
    "a small scale": lambda: noise(1, 4, 64, 64) * 1e-4,
    "zeros": lambda: torch.zeros(1, 4, 64, 64),
    "a constant": lambda: torch.full((1, 4, 64, 64), 100.0),
    "a large constant": lambda: torch.full((1, 4, 64, 64), 6e4),
    "one value among zeros": lambda: torch.zeros(1, 4, 64, 64).index_put((torch.tensor(0),) * 4, torch.tensor(6e4)),
    "sparse": lambda: masked(0.01, 1.0),
    "sparse and large": lambda: masked(0.01, 6e4),
    "half zeros, large": lambda: masked(0.5, 6e4),
    "zeros but for noise": lambda: noise(1, 4, 64, 64) * masked(0.1, 50.0),
    "an outlier": lambda: noise(1, 4, 64, 64).index_put((torch.tensor(0),) * 4, torch.tensor(1000.0)),
    "a larger outlier": lambda: noise(1, 4, 64, 64).index_put((torch.tensor(0),) * 4, torch.tensor(-6000.0)),
    "heavy tails": lambda: noise(1, 4, 64, 64) / noise(1, 4, 64, 64, seed=1).abs().clamp(min=2e-3),
    "a channel of another scale": lambda: noise(1, 4, 64, 64) * torch.tensor([1e-3, 1.0, 1.0, 300.0]).reshape(1, 4, 1, 1),
    "a ramp": lambda: torch.linspace(-1e4, 1e4, 16384).reshape(1, 4, 64, 64),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("kind", HONEST)
def test_honest_latents_are_not_taken_for_freed_memory(kind: str, dtype: str) -> None:
    assert not is_found(HONEST[kind]().to(DTYPES[dtype]))


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3, 1e6, 1e12, 1e30])
def test_a_constant_factor_changes_nothing(factor: float) -> None:
    for make in HONEST.values():
        assert not is_found((make().double() * factor).clamp(-3e38, 3e38).float())


@given(st.lists(st.floats(-9984, 9984, width=16), min_size=8, max_size=16))
def test_no_values_below_ten_thousand_are_refused(values: list[float]) -> None:
    assert not is_found(torch.tensor(values))


@pytest.mark.parametrize("address", [ADDRESS, MAIN_ARENA])
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("scale", [0.18, 1.0])
def test_addresses_at_the_start_are_found(address: bytes, dtype: str, scale: float) -> None:
    damaged = with_bytes((noise(1, 4, 32, 32) * scale).to(DTYPES[dtype]), 2 * address)
    assert is_found(damaged) or not damaged.isfinite().all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("value", [32048.0 * 1e3, 1e13, -3e38])
def test_a_few_absurd_values_are_found(scale: float, value: float) -> None:
    latents = noise(1, 4, 32, 32) * scale
    latents[0, 0, 0, :3] = value
    assert is_found(latents)


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU. Its CPU copy is a fresh one, as a CUDA tensor's is."""

    @property
    def device(self) -> Any:
        return SimpleNamespace(type="cuda")

    def to(self, *arguments: Any, **options: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).clone()


def sent_by_the_client(latents: torch.Tensor) -> bytes:
    """What diffusers' client sends of latents that are on a GPU."""
    data: bytes = remote_utils.prepare_decode(latents.as_subclass(Elsewhere), scaling_factor=1.0)["data"]
    return data


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator leaves other bytes behind")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("side", [16, 32])
def test_what_the_real_client_sends_is_refused_with_the_cure(
    url: str, vaes: dict[str, LocalVae], dtype: str, side: int
) -> None:
    """Nearly always: now and then the allocator leaves the freed bytes alone, or changes some to other ordinary values."""
    latents = vaes["sd"].latents(side, side).to(DTYPES[dtype])
    params = {"shape": list(latents.shape), "dtype": dtype, "scaling_factor": 1}
    damaged = {data for _ in range(20) if (data := sent_by_the_client(latents)) != latents.numpy().tobytes()}
    if not damaged:
        pytest.skip("this diffusers sends the latents as they are")
    refused = [answer for data in damaged if not (answer := requests.post(url, data, params=params, timeout=30)).ok]
    assert len(refused) > len(damaged) / 2
    for answer in refused:
        assert answer.json()["code"] in ("freed_memory", "nonfinite_input")
        assert "latents.cpu().contiguous()" in answer.json()["error"]
    assert decode_quietly(url, latents, scaling_factor=1.0).size == (8 * side, 8 * side)


@pytest.mark.parametrize(
    ("value", "code"), [(1e30, "freed_memory"), (3e38, "freed_memory"), (np.inf, "nonfinite_input")]
)
@pytest.mark.parametrize("model", ["sd", "sdxl-half", "hunyuan"])
def test_a_few_absurd_values_are_a_400_that_says_the_cure(url: str, model: str, value: float, code: str) -> None:
    latents = noise(1, 16, 2, 8, 8) if model == "hunyuan" else noise(1, 4, 16, 16)
    latents.view(-1)[:3] = value
    params = {"shape": list(latents.shape), "dtype": "float32", "output_type": "pt"}
    refused = requests.post(url + model, latents.numpy().tobytes(), params=params, timeout=30).json()
    assert refused["code"] == code
    assert "send latents.cpu().contiguous()" in refused["error"]


def test_latents_that_are_all_nan_are_not_blamed_on_the_client(url: str) -> None:
    params = {"shape": [1, 4, 8, 8], "dtype": "float32"}
    refused = requests.post(url, np.full(256, np.nan, "float32").tobytes(), params=params, timeout=30).json()
    assert "contiguous" not in refused["error"]


@pytest.mark.parametrize(("value", "code"), [(1e30, "freed_memory"), (np.nan, "nonfinite_input")])
def test_an_image_to_encode_is_told_the_same(url: str, value: float, code: str) -> None:
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, 16, 16)).astype("float32")
    pixels[0, 0, 0, :3] = value
    params = {"shape": pixels.shape, "dtype": "float32"}
    refused = requests.post(url + "encode", pixels.tobytes(), params=params, timeout=30).json()
    assert refused["code"] == code
    assert "send image.cpu().contiguous()" in refused["error"]
