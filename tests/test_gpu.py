"""The server's device path on a CUDA device; `make test-gpu` runs these, other machines skip them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
import yaml
from diffusers.utils.remote_utils import remote_decode

from handler import EndpointHandler
from server.config import load_settings
from server.contract import Parameters
from server.engine.coders.stock import StockDecoder, StockEncoder
from server.engine.models import LoadedModels
from server.errors import TooLargeForDevice
from server.families import FAMILIES, family_of_class
from server.values import Geometry, Layout, Request, Result
from tests.conftest import Serve, write_models_yaml
from tests.load import process
from tests.pipelines import vaes as builders
from tests.requests import decode_job
from tests.vaes import LocalVae
from tests.waiting import PATIENCE_S, until

DEVICE = os.environ.get("VAE_TEST_DEVICE", "cuda")  # cpu: a test of these tests
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]
Vaes = dict[str, LocalVae]


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "hunyuan"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.15), ("float16", 0.02)])
def test_a_gpu_decodes_what_a_cpu_does(serve: Serve, vaes: Vaes, name: str, dtype: str, tolerance: float) -> None:
    if (name, dtype) == ("sdxl", "float16"):
        tolerance = 1e-4  # it must upcast
    address = serve({name: {"repo": str(vaes[name].folder), "dtype": dtype, "device": DEVICE, "preload": True}})
    latents = vaes[name].latents(*([3, 8, 12] if name == "hunyuan" else [8, 12]))
    sample = remote_decode(address, latents, scaling_factor=0.7, output_type="pt", return_type="pt")
    expected = vaes[name].decode(latents / 0.7)
    torch.testing.assert_close(sample.float(), expected, atol=tolerance, rtol=tolerance)
    pixels = remote_decode(
        address, latents, scaling_factor=0.7, output_type="pt", return_type="pt", partial_postprocess=True
    )
    unit = (sample.float() / 2 + 0.5).clamp(0, 1).mul(255).round()
    unit = unit[0].movedim(0, -1) if name == "hunyuan" else unit.movedim(1, -1)
    assert np.abs(pixels.numpy().astype(int) - unit.numpy()).max() <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_decode_that_does_not_fit_is_refused_and_the_next_one_goes_on(vaes: Vaes, tmp_path: Path) -> None:
    models = {"sd": {"repo": str(vaes["sd"].folder), "device": "cuda", "decoder": "diffusers"}}
    engine = LoadedModels(load_settings(config=write_models_yaml(tmp_path / "models.yaml", models, "sd")))

    def request(side: int) -> Request:
        shape = (1, 4, side, side)
        geometry: Geometry = FAMILIES["kl"].decode_geometry(engine.describe("sd").latents, shape, Parameters([]))
        return Request(decode_job("sd", geometry), memoryview(bytes(16 * side * side)))

    engine.run([request(16)])
    torch.cuda.set_per_process_memory_fraction(0.02)
    try:
        assert isinstance(engine.run([request(2048)])[0], TooLargeForDevice)
        assert engine.run([request(16)])[0].body.shape == (1, 128, 128, 3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


FAMILIES_HERE: dict[str, Callable[[], Any]] = {
    "kl": builders.kl16,
    "flux2": builders.flux2,
    "wan": builders.wan,
    "wan-2.2": builders.wan_22,
    "qwen-image": builders.qwen_image,
    "hunyuan-video": builders.hunyuan_video,
    "hunyuan-video-1.5": builders.hunyuan_video_15,
    "ltx": builders.ltx,
    "ltx2": builders.ltx2,
    "cogvideox": builders.cogvideox,
    "mochi": builders.mochi,
    "easy-animate": builders.magvit,
}
SIZES = [(3, 4, 4), (3, 18, 20)]  # latent frames, rows and columns; the second one is above 128 pixels
FLOAT32 = {"dtype": "float32"}


class Local:
    """The VAE that a server serves, on the CPU, run by diffusers."""

    def __init__(self, name: str, folder: Path) -> None:
        self.vae = FAMILIES_HERE[name]()
        self.vae.save_pretrained(folder)
        family = family_of_class(type(self.vae).__name__)
        assert family is not None
        self.family, self.spec = family, family.describe(self.vae.config)

    def latents(self, frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
        size = (frames, height, width) if self.spec.kind == "video" else (height, width)
        return torch.randn(1, self.spec.channels, *size, generator=torch.Generator().manual_seed(seed))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return StockDecoder(self.vae, self.family).decode(latents, Layout.SAMPLE).tensor.detach()

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        parameters = StockEncoder(self.vae, self.family).encode(pixels).tensor.detach()
        return parameters.chunk(2, 1)[0]


@pytest.fixture(scope="module")
def locals_(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Local]:
    folder = tmp_path_factory.mktemp("families")
    return {name: Local(name, folder / name) for name in FAMILIES_HERE}


@pytest.fixture(scope="module")
def everything(locals_: dict[str, Local], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server process with every family in float32, and some entries with other settings."""
    folder = tmp_path_factory.getbasetemp() / "families0"
    models: dict[str, Any] = {name: {"repo": str(folder / name), **FLOAT32} for name in locals_}
    models |= {f"{name}-small": {**models[name], "memory_budget_mb": 1} for name in ("kl", "wan")}
    config = tmp_path_factory.mktemp("config") / "models.yaml"
    config.write_text(yaml.safe_dump({"models": models}))
    with process(config, "--device", DEVICE) as (url, _):
        yield url


def ask(url: str, tensor: torch.Tensor, accept: str = "tensor/binary", **query: Any) -> requests.Response:
    sent = {"shape": list(tensor.shape), "dtype": "float32", "output_type": "pt", **query}
    headers = {"Content-Type": "tensor/binary", "Accept": accept}
    answer = requests.post(url, tensor.numpy().tobytes(), params=sent, headers=headers, timeout=PATIENCE_S)
    assert answer.ok, answer.text
    return answer


def tensor_of(answer: requests.Response) -> torch.Tensor:
    shape = [int(size) for size in answer.headers["shape"].strip("[]").split(",")]
    return torch.frombuffer(bytearray(answer.content), dtype=torch.float32).reshape(shape)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", FAMILIES_HERE)
def test_every_family_decodes_over_http_as_diffusers_on_a_cpu(
    everything: str, locals_: dict[str, Local], name: str, size: tuple[int, int, int]
) -> None:
    latents = locals_[name].latents(*size)
    expected = locals_[name].decode(latents)
    got = tensor_of(ask(everything + name, latents))
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", FAMILIES_HERE)
def test_every_family_encodes_over_http_as_diffusers_on_a_cpu(
    everything: str, locals_: dict[str, Local], name: str, size: tuple[int, int, int]
) -> None:
    pixels = locals_[name].decode(locals_[name].latents(*size)).clamp(-1, 1)
    expected = locals_[name].encode(pixels)
    got = tensor_of(ask(f"{everything}{name}/encode", pixels))
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["kl", "wan"])
def test_a_small_memory_budget_gives_the_same_pixels(everything: str, locals_: dict[str, Local], name: str) -> None:
    latents = locals_[name].latents(*SIZES[1])
    got, expected = (tensor_of(ask(everything + each, latents)) for each in (f"{name}-small", name))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_video_is_streamed_while_it_is_decoded(everything: str, locals_: dict[str, Local]) -> None:
    latents = locals_["wan"].latents(3, 18, 20)
    answer = ask(everything + "wan", latents, "video/mp4", output_type="mp4", stream=True)
    assert answer.content.count(b"moof") == 9
    whole = ask(everything + "wan", latents, "video/mp4", output_type="mp4")
    assert whole.content[4:8] == b"ftyp"


def test_requests_for_two_models_at_once_are_those_of_each_alone(everything: str, locals_: dict[str, Local]) -> None:
    """Some of them run in one batch."""
    asked = [(name, locals_[name].latents(1, 8, 8, seed)) for seed in range(6) for name in ("kl", "wan")]

    def one(pair: tuple[str, torch.Tensor]) -> torch.Tensor:
        return tensor_of(ask(everything + pair[0], pair[1]))

    with ThreadPoolExecutor(12) as clients:
        together = list(clients.map(one, asked))
    for pair, got in zip(asked, together, strict=True):
        torch.testing.assert_close(got, one(pair), atol=1e-4, rtol=1e-4)


def test_requests_that_wait_for_a_gpu_are_decoded_in_one_batch(everything: str, locals_: dict[str, Local]) -> None:
    latents = [locals_["kl"].latents(1, 24, 24, seed) for seed in range(16)]
    expected = [locals_["kl"].decode(each) for each in latents]

    def counted() -> tuple[float, float]:
        """How many requests ran alone, and how many ran at all."""
        metrics = requests.get(everything + "metrics", timeout=PATIENCE_S).text
        found = [re.search(rf"^vae_batch_size_{which} (.+)$", metrics, re.M) for which in ('bucket{le="1.0"}', "count")]
        alone, all_ = (float(each[1]) if each else 0.0 for each in found)
        return alone, all_

    alone_before, all_before = counted()

    def a_batch_was_formed() -> bool:
        with ThreadPoolExecutor(len(latents)) as clients:
            made = list(clients.map(lambda each: tensor_of(ask(everything + "kl", each)), latents))
        for got, each in zip(made, expected, strict=True):
            torch.testing.assert_close(got, each, atol=1e-3, rtol=1e-3)
        alone, all_ = counted()
        return alone - alone_before < all_ - all_before

    until(a_batch_was_formed)


def test_what_overflows_float16_is_decoded_again_in_float32(tmp_path: Path) -> None:
    vae = builders.kl16()
    vae.post_quant_conv = torch.nn.Conv2d(16, 16, 1)
    vae.register_to_config(use_post_quant_conv=True, force_upcast=False)
    torch.nn.init.constant_(vae.post_quant_conv.weight, 3e4)  # float16 ends at 65,504
    vae.save_pretrained(tmp_path / "kl")
    models = {"kl": {"repo": str(tmp_path / "kl"), "device": DEVICE, "dtype": "float16"}}
    engine = LoadedModels(load_settings(config=write_models_yaml(tmp_path / "models.yaml", models, "kl")))
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    geometry: Geometry = FAMILIES["kl"].decode_geometry(engine.describe("kl").latents, latents.shape, Parameters([]))
    request = Request(decode_job("kl", geometry), memoryview(latents.numpy().tobytes()))
    for _ in range(3):  # at first without a CUDA graph, then recorded, then replayed
        result = engine.run([request])[0]
        assert isinstance(result, Result), result
        assert result.is_upcast
        family = family_of_class("AutoencoderKL")
        assert family is not None
        expected = StockDecoder(vae, family).decode(latents, Layout.PIXELS).tensor
        got = torch.frombuffer(bytearray(result.body.data), dtype=torch.uint8).reshape(expected.shape)
        assert (got.int() - expected.int()).abs().max() <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_an_exact_coder_with_little_memory_takes_its_measures_one_after_the_other(tmp_path: Path) -> None:
    """It plans for the memory of the device, of which this process then gets only a part."""
    side = 256  # latent pixels
    vae = builders.kl16()
    vae.save_pretrained(tmp_path / "kl")
    models = {"kl": {"repo": str(tmp_path / "kl"), "device": "cuda", **FLOAT32}}
    engine = LoadedModels(load_settings(config=write_models_yaml(tmp_path / "models.yaml", models, "kl")))
    latents = torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(0))
    geometry: Geometry = FAMILIES["kl"].decode_geometry(engine.describe("kl").latents, latents.shape, Parameters([]))
    request = Request(decode_job("kl", geometry), memoryview(latents.numpy().tobytes()))
    coder: Any = engine.load("kl").coder
    expected = engine.run([request])[0]
    assert isinstance(expected, Result), expected
    assert not expected.oom_steps
    ample, least = (coder.peak_bytes(1, side, side, budget) for budget in (1 << 60, 1))
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_allocated() + least + (ample - least) // 2
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        got = engine.run([request])[0]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert isinstance(got, Result), got
    assert got.oom_steps
    pixels = [np.frombuffer(each.body.data, np.uint8).astype(int) for each in (got, expected)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_a_server_starts_where_an_import_makes_cuda_unusable_in_forked_processes(
    locals_: dict[str, Local], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers asks torch for a CUDA device while it is imported. Usually torch then asks NVML; here it asks CUDA."""
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "0")
    config = tmp_path / "models.yaml"
    locals_["kl"].vae.save_pretrained(tmp_path / "kl")
    config.write_text(yaml.safe_dump({"models": {"kl": {"repo": str(tmp_path / "kl"), **FLOAT32}}}))
    latents = locals_["kl"].latents(1, 8, 8)
    with process(config, "--device", DEVICE) as (url, _):
        got = tensor_of(ask(url, latents))
    torch.testing.assert_close(got, locals_["kl"].decode(latents), atol=1e-3, rtol=1e-3)


def test_the_handler_of_endpoints_decodes(vaes: Vaes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAE_SERVER_DTYPE", "float32")
    monkeypatch.setenv("VAE_SERVER_DEVICE", DEVICE)
    latents = vaes["sd"].latents(8, 12)
    image = EndpointHandler(str(vaes["sd"].folder))({"inputs": latents, "parameters": {"scaling_factor": 0.7}})
    expected = (vaes["sd"].decode(latents / 0.7)[0] / 2 + 0.5).clamp(0, 1).mul(255).round().permute(1, 2, 0)
    assert np.abs(np.asarray(image).astype(int) - expected.numpy()).max() <= 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device at most")
def test_every_device_takes_requests(locals_: dict[str, Local], tmp_path: Path) -> None:
    config = tmp_path / "models.yaml"
    locals_["kl"].vae.save_pretrained(tmp_path / "kl")
    config.write_text(yaml.safe_dump({"models": {"kl": {"repo": str(tmp_path / "kl"), "preload": True, **FLOAT32}}}))
    with process(config, "--device", "cuda") as (url, _):
        (listed,) = requests.get(url + "models", timeout=PATIENCE_S).json()["models"]
        assert len(listed["device"].split(", ")) == torch.cuda.device_count()
        latents = [locals_["kl"].latents(1, 32, 32, seed) for seed in range(16)]
        with ThreadPoolExecutor(16) as clients:
            made = list(clients.map(lambda each: tensor_of(ask(url, each)), latents))
        for each, got in zip(latents, made, strict=True):
            torch.testing.assert_close(got, locals_["kl"].decode(each), atol=1e-3, rtol=1e-3)
