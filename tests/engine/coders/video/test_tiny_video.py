"""The TAEHV family, compared with its published architecture: all frames at once, layer by layer, from the tensors' names."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from server.config import ModelEntry
from server.engine.coders.interface import Stopped
from server.engine.coders.video.tiny_decoder import TinyVideoDecoder
from server.engine.coders.video.tiny_layers import TAEHV
from server.engine.weights.agreement import vae_class
from server.engine.weights.config_json import read_info
from server.engine.weights.hub import Source
from server.engine.weights.loading import check_weights
from server.errors import ModelUnavailable
from server.families.named import named_config
from server.model_info import Direction
from server.values import Layout
from tests.conftest import Serve

State = dict[str, Tensor]
BASE_GROW = (7, 13, 19)  # the numbers of the layers that make several frames of one
SUPER_GROW = (7, 14, 21)
POOL = (2, 7, 12)
NAMES = ("taew2_1", "taew2_2", "taehv1_5", "taeltx_2", "taecvx", "taeh3", "taem1", "taew2_2_super")
# The shapes of some tensors of the published files.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "taew2_1": {
        "encoder.0.weight": (64, 3, 3, 3),
        "encoder.2.conv.weight": (64, 128, 1, 1),
        "encoder.12.conv.weight": (64, 64, 1, 1),
        "encoder.17.weight": (16, 64, 3, 3),
        "decoder.1.weight": (256, 16, 3, 3),
        "decoder.3.conv.0.weight": (256, 512, 3, 3),
        "decoder.7.conv.weight": (256, 256, 1, 1),
        "decoder.8.weight": (128, 256, 3, 3),
        "decoder.13.conv.weight": (256, 128, 1, 1),
        "decoder.19.conv.weight": (128, 64, 1, 1),
        "decoder.22.weight": (3, 64, 3, 3),
    },
    "taew2_2": {"decoder.1.weight": (256, 48, 3, 3), "decoder.22.bias": (12,), "encoder.0.weight": (64, 12, 3, 3)},
    "taehv1_5": {"decoder.1.weight": (256, 32, 3, 3), "decoder.22.bias": (12,)},
    "taeltx_2": {"decoder.7.conv.weight": (512, 256, 1, 1), "decoder.22.bias": (48,), "encoder.17.bias": (128,)},
    "taeh3": {"decoder.1.weight": (256, 24, 3, 3), "encoder.12.conv.weight": (64, 64, 1, 1)},
    "taem1": {"encoder.2.conv.weight": (64, 192, 1, 1), "decoder.19.conv.weight": (192, 64, 1, 1)},
    "taew2_2_super": {
        "decoder.0.weight": (512, 48, 1, 1),
        "decoder.1.conv.0.weight": (1024, 1, 7, 7),
        "decoder.1.conv.1.weight": (2048, 1024, 1, 1),
        "decoder.4.weight": (1024, 512, 3, 3),
        "decoder.7.conv.weight": (256, 256, 1, 1),
        "decoder.14.conv.weight": (256, 128, 1, 1),
        "decoder.22.weight": (12, 64, 3, 3),
    },
}


def made(name: str) -> TAEHV:
    """The network of a published file in its real size, with seeded weights."""
    named = named_config(name)
    assert named is not None
    torch.manual_seed(3)
    vae: TAEHV = vae_class(named.config["_class_name"]).from_config(dict(named.config)).eval()
    vae.load_state_dict({key: 1.7 * value for key, value in vae.state_dict().items()})  # so that frames differ
    vae.decoder[22].bias.data += 0.5  # and few pixels are black
    return vae


def layer(state: State, name: str, x: Tensor, **arguments: Any) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=weight.shape[-1] // 2, **arguments)


def before(x: Tensor) -> Tensor:
    """The frame before each frame, black before the first."""
    return torch.cat([torch.zeros_like(x[:1]), x[:-1]])


def block(state: State, name: str, x: Tensor) -> Tensor:
    both = torch.cat([x, before(x)], 1)
    inner = layer(state, f"{name}.conv.2", F.relu(layer(state, f"{name}.conv.0", both)))
    return F.relu(layer(state, f"{name}.conv.4", F.relu(inner)) + x)


def super_block(state: State, name: str, x: Tensor) -> Tensor:
    mixed = layer(state, f"{name}.conv.0", torch.cat([x, before(x)], 1), groups=2 * x.shape[1])
    return layer(state, f"{name}.conv.3", F.relu(layer(state, f"{name}.conv.1", mixed))) + x


def grown(state: State, name: str, x: Tensor) -> Tensor:
    return layer(state, f"{name}.conv", x).reshape(-1, *x.shape[1:])


def raw_frames(state: State, x: Tensor, patch: int) -> Tensor:  # [F, C, h, w]
    """All frames that a decoder makes of one video, in [0, 1]."""
    if "decoder.0.weight" in state:
        x = layer(state, "decoder.0", x)
        for at in SUPER_GROW:
            for number in range(at - 6, at - 3):
                x = super_block(state, f"decoder.{number}", x)
            x = F.pixel_shuffle(F.relu(layer(state, f"decoder.{at - 3}", x)), 2)
            x = grown(state, f"decoder.{at}", x)
        x = layer(state, "decoder.22", x)
    else:
        x = F.relu(layer(state, "decoder.1", 3 * torch.tanh(x / 3)))
        for at in BASE_GROW:
            for number in range(at - 4, at - 1):
                x = block(state, f"decoder.{number}", x)
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = layer(state, f"decoder.{at + 1}", grown(state, f"decoder.{at}", x))
        x = layer(state, "decoder.22", F.relu(x))
    return F.pixel_shuffle(x, patch).clamp(0, 1)


def reference(name: str, state: State, latents: Tensor, patch: int) -> Tensor:  # [B, C, f, h, w] -> [B, 3, F, H, W]
    videos = []
    for video in latents.transpose(1, 2):
        frames = raw_frames(state, video, patch)
        ratio = len(frames) // len(video)
        if name == "taeh3":  # of each 20 frames, the first 3 are dropped
            frames = torch.cat([clip[3:] for clip in torch.split(frames, 20)])
        elif not (name == "taecvx" and len(video) % 2 == 0):
            frames = frames[ratio - 1 :]
        videos.append(2 * frames - 1)
    return torch.stack(videos).transpose(1, 2)


def encoded(name: str, state: State, pixels: Tensor, patch: int) -> Tensor:  # [B, 3, F, H, W] -> [B, C, f, h, w]
    def encode(x: Tensor) -> Tensor:  # [F, 3, H, W] in [0, 1]
        x = F.relu(layer(state, "encoder.0", F.pixel_unshuffle(x, patch)))
        for at in POOL:
            stride = state[f"encoder.{at}.conv.weight"].shape[1] // 64
            x = layer(state, f"encoder.{at}.conv", x.reshape(-1, stride * 64, *x.shape[2:]))
            x = layer(state, f"encoder.{at + 1}", x, stride=2)
            for number in range(at + 2, at + 5):
                x = block(state, f"encoder.{number}", x)
        return layer(state, "encoder.17", x)

    videos = []
    for video in (pixels / 2 + 0.5).transpose(1, 2):
        stride = prod(state[f"encoder.{at}.conv.weight"].shape[1] // 64 for at in POOL)
        multiple = 17 if name == "taeh3" else stride
        filled = torch.cat([video, video[-1:].repeat(-len(video) % multiple, 1, 1, 1)])
        if name == "taeh3":
            black = torch.zeros_like(video[:3])
            clips = [encode(torch.cat([black, clip])) for clip in torch.split(filled, 17)]
            videos.append(torch.cat(clips)[:-3])
        else:
            videos.append(encode(filled))
    return torch.stack(videos).transpose(1, 2)


def latents_of(vae: TAEHV, frames: int, batch: int = 1) -> Tensor:
    """Latents, some of which the soft limit of the base decoders changes a lot."""
    shape = (batch, vae.config.latent_channels, frames, 2, 3)
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(frames))


@pytest.mark.parametrize("name", SHAPES)
def test_the_tensors_have_the_published_names_and_shapes(name: str) -> None:
    state = {key: tuple(value.shape) for key, value in made(name).state_dict().items()}
    assert {key: state.get(key) for key in SHAPES[name]} == SHAPES[name]
    assert all(key.startswith(("encoder.", "decoder.")) for key in state)


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize("name", NAMES)
def test_a_decode_is_that_of_the_published_architecture(name: str) -> None:
    vae = made(name)
    decoder = TinyVideoDecoder(vae)
    for frames in (7, 12) if name == "taeh3" else (1, 2, 3):
        latents = latents_of(vae, frames)
        expected = reference(name, vae.state_dict(), latents, vae.config.patch_size)
        assert expected.std() > 0.1
        sample = decoder.decode(latents, Layout.SAMPLE).tensor
        assert sample.shape == expected.shape
        assert (sample - expected).abs().max() <= 1e-4
        assert torch.equal(vae.decode(latents)[0], sample)
        pixels = decoder.decode(latents, Layout.PIXELS).tensor
        unit = (expected / 2 + 0.5).transpose(1, 2).flatten(0, 1).permute(0, 2, 3, 1)
        assert (pixels.float() - 255 * unit).abs().max() <= 0.51


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize("name", NAMES)
def test_an_encode_is_that_of_the_published_architecture(name: str) -> None:
    vae = made(name)
    side = 8 * vae.config.patch_size
    for frames in (22,) if name == "taeh3" else (1, 7):
        pixels = 2 * torch.rand(1, 3, frames, 2 * side, side, generator=torch.Generator().manual_seed(1)) - 1
        with torch.no_grad():
            latents = vae.encode(pixels)[0]
        expected = encoded(name, vae.state_dict(), pixels, vae.config.patch_size)
        assert latents.shape == expected.shape
        assert (latents - expected).abs().max() <= 1e-4


@pytest.mark.usefixtures("one_core")
def test_frames_are_given_away_in_order_while_the_memory_stays_the_same() -> None:
    """What is held besides the answer does not grow with the video: one frame for each block."""
    vae = made("taew2_1")
    given: list[Tensor] = []
    alive: list[int] = []

    class Counted(torch.nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            alive.append(x.shape[0])
            return super().forward(x)

    vae.decoder[21] = Counted()
    latents = latents_of(vae, 4, batch=2)
    whole = TinyVideoDecoder(vae).decode(latents, Layout.PIXELS, emit=lambda frames, _: given.append(frames.clone()))
    assert [len(frames) for frames in given] == [1] * 26
    assert torch.equal(torch.cat(given), whole.tensor)
    assert set(alive) == {1}, "a layer sees one frame"
    for video in range(2):
        alone = TinyVideoDecoder(vae).decode(latents[video : video + 1], Layout.PIXELS).tensor
        assert torch.equal(alone, whole.tensor[13 * video : 13 * video + 13])


def test_a_decode_stops_between_its_layers() -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise Stopped

    with pytest.raises(Stopped):
        TinyVideoDecoder(made("taew2_1")).decode(torch.zeros(1, 16, 2, 2, 2), Layout.PIXELS, check=check)


def test_a_value_that_is_not_finite_is_noticed() -> None:
    vae = made("taew2_1")
    vae.decoder[22].bias.data[0] = torch.nan
    assert not TinyVideoDecoder(vae).decode(torch.zeros(1, 16, 1, 2, 2), Layout.PIXELS).finite


def saved(folder: Path, name: str, parts: tuple[str, ...] = ("encoder.", "decoder."), file: str = "") -> Path:
    """A file as it is published: float16, and nothing else than tensors."""
    state = {key: value.half() for key, value in made(name).state_dict().items() if key.startswith(parts)}
    path = folder / (file or f"{name}.safetensors")
    save_file(state, path)
    return path


def source(path: Path, **keys: Any) -> Source:
    entry = ModelEntry(repo=str(path), **keys)
    return Source("m", entry, entry.local_path(Path("/")), entry.config_path(Path("/")))


DECIDED = {
    "taehv1_5": (32, 16, 4),
    "taehv1_5_super": (32, 16, 4),
    "taew2_2": (48, 16, 4),
    "taew2_2_super": (48, 16, 4),
    "taeh3": (24, 16, 4),
    "taeltx2_3": (128, 32, 8),
    "taem1": (12, 8, 6),
}


@pytest.mark.parametrize("name", DECIDED)
def test_the_tensors_of_a_file_decide_what_it_is(name: str, tmp_path: Path) -> None:
    found = source(saved(tmp_path, name))
    info = read_info(found)
    spec = info.latents
    assert (spec.channels, spec.vae_scale_factor, spec.temporal_compression_ratio) == DECIDED[name]
    assert spec.is_preview
    assert spec.kind == "video"
    assert check_weights(found) == tuple(Direction)


def test_a_decoder_by_itself_is_served_for_its_direction(tmp_path: Path) -> None:
    assert check_weights(source(saved(tmp_path, "taew2_2", ("decoder.",)))) == (Direction.DECODE,)


def test_a_file_that_may_be_of_two_models_needs_a_name(tmp_path: Path) -> None:
    """CogVideoX's file has the shapes of HunyuanVideo's and Wan 2.1's, and other numbers of frames."""
    path = saved(tmp_path, "taecvx")
    with pytest.raises(ModelUnavailable) as caught:
        read_info(source(path))
    assert "may be the VAE of taew2_1 or taecvx: " in caught.value.detail
    assert {name: read_info(source(path, config=name)).class_name for name in ("taehv", "taecvx")} == {
        "taehv": "TAEHV",
        "taecvx": "TAECVX",
    }


@pytest.mark.usefixtures("one_core")
def test_files_in_one_folder_are_served_by_their_names(tmp_path: Path, serve: Serve) -> None:
    """Through a real server: decode, a packed decode, encode, and the kind `preview`."""
    for name in ("taew2_1", "taeltx_2", "taeh3"):
        saved(tmp_path, name)
    models = {
        name: {"repo": str(tmp_path), "file": f"{name}.safetensors", "config": name, "dtype": "float32"}
        for name in ("taew2_1", "taeltx_2", "taeh3")
    }
    address = serve(models)
    listed = requests.get(address + "models", params={"kind": "preview"}, timeout=300).json()["models"]
    assert {each["name"]: each["file"] for each in listed} == {name: f"{name}.safetensors" for name in models}
    for name, frames in (("taew2_1", 2), ("taeltx_2", 2), ("taeh3", 7)):
        vae = made(name).half().float()
        latents = latents_of(vae, frames)
        expected = reference(name, vae.state_dict(), latents, vae.config.patch_size).numpy()
        answer = decode(address + name, latents)
        assert np.abs(answer.reshape(expected.shape) - expected).max() <= 1e-4
        if name == "taeltx_2":
            packed = latents.flatten(2).transpose(1, 2).contiguous()  # [B, F h w, C]
            answer = decode(address + name, packed, height=2 * 32, width=3 * 32)
            assert np.abs(answer.reshape(expected.shape) - expected).max() <= 1e-4
    vae = made("taew2_1").half().float()
    pixels = 2 * torch.rand(1, 3, 5, 16, 24, generator=torch.Generator().manual_seed(1)) - 1
    query: dict[str, Any] = {"shape": [1, 3, 5, 16, 24], "dtype": "float32"}
    answer = requests.post(address + "taew2_1/encode", params=query, data=pixels.numpy().tobytes(), timeout=300)
    assert answer.status_code == 200, answer.text
    expected = encoded("taew2_1", vae.state_dict(), pixels, 1).numpy()
    assert np.abs(np.frombuffer(answer.content, "float32").reshape(expected.shape) - expected).max() <= 1e-4
    refused = requests.post(
        address + "taeh3", params={"shape": [1, 24, 5, 2, 2], "dtype": "float32"}, data=bytes(4 * 480), timeout=300
    )
    assert refused.status_code == 400
    assert "this model takes 5 n + 2 latent frames" in refused.text


def decode(url: str, latents: Tensor, **query: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    query |= {"shape": list(latents.shape), "dtype": "float32", "output_type": "pt"}
    answer = requests.post(url, params=query, data=latents.numpy().tobytes(), timeout=300)
    assert answer.status_code == 200, answer.text
    return np.frombuffer(answer.content, "float32")
