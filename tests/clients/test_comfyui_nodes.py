"""The ComfyUI nodes without ComfyUI: what they send and return, their settings, errors, retries and the cancel button.

tests/clients/comfyui runs them in the real ComfyUI.
"""

from __future__ import annotations

import json
import re
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch
from diffusers import AutoencoderOobleck
from safetensors.torch import load_file

from server.config import load_settings
from tests.clients.scripted import BROKEN, ENDLESS, SILENT, Proxy, scripted
from tests.clients.stand_in import Cancelled, ComfyUI, load
from tests.conftest import REPOSITORY, Serve, running
from tests.pipelines import vaes as small
from tests.pipelines.sample import seeded
from tests.vaes import LocalVae
from tests.waiting import PATIENCE_S, until

FOLDER = REPOSITORY / "clients" / "comfyui"
HALF_LEVEL = 0.51 / 255


@pytest.fixture
def comfy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ComfyUI:
    for name in ("VAE_SERVER_URL", "VAE_SERVER_KEY"):
        monkeypatch.delenv(name, raising=False)
    found = ComfyUI(tmp_path / "comfy")
    found.settings_file.parent.mkdir(parents=True)
    return found


@pytest.fixture
def nodes(comfy: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return dict(load(comfy, monkeypatch).NODE_CLASS_MAPPINGS)


@pytest.fixture
def remote(nodes: dict[str, Any]) -> Any:
    import clients.comfyui.remote as found

    return found


@pytest.fixture
def proxy(url: str) -> Iterator[tuple[Proxy, str]]:
    with scripted(url) as found:
        yield found


def pixels_of(sample: torch.Tensor) -> torch.Tensor:
    """`[B, C, (F,) H, W]` in [-1, 1] -> `[B, (F,) H, W, C]` in [0, 1]."""
    return (sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)


def run(node: Any, *given: Any, **named: Any) -> Any:
    """The first output of a node."""
    return node().run(*given, **named)[0]


# What is sent and returned.


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux", "hunyuan"])
def test_latents_are_decoded_as_by_the_local_vae(
    nodes: dict[str, Any], url: str, vaes: dict[str, LocalVae], name: str
) -> None:
    size = (2, 6, 8) if name == "hunyuan" else (6, 8)
    latents = vaes[name].latents(*size, batch=2)
    expected = pixels_of(vaes[name].decode(latents))
    vae = run(nodes["VAEServerLoad"], "default", url + name)
    for found in (vae.decode(latents), vae.decode_tiled(latents, tile_x=4, tile_y=4, overlap=1)):
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, expected, atol=HALF_LEVEL, rtol=0)
    images = run(nodes["VAEServerDecode"], {"samples": latents}, name, url)
    torch.testing.assert_close(images, expected.flatten(0, -4), atol=HALF_LEVEL, rtol=0)


def normalized(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the VAEs of LTX-Video have them in ComfyUI, where the scaling is a part of the VAE."""
    mean, std = (each.view(1, -1, 1, 1, 1) for each in (vae.latents_mean, vae.latents_std))
    return (latents - mean) / std


def patches(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents of FLUX.2 as ComfyUI has them: 2x2 patches, scaled by the batch norm."""
    found = torch.nn.functional.pixel_unshuffle(latents, 2)  # [B, 32, h, w] -> [B, 128, h / 2, w / 2]
    mean, std = vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return (found - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def cosmos_scaled(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents of Cosmos 1 as ComfyUI has them: by channel and frame, times the deviation of the data."""
    frames = latents.shape[2]
    mean, std = (
        torch.tensor(each).view(1, latents.shape[1], -1, 1, 1)[:, :, :frames]
        for each in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / std * 0.5


AS_IS: Callable[[Any, torch.Tensor], torch.Tensor] = lambda vae, latents: latents  # noqa: E731  # a value beside others of its kind

# The VAE, the size of its latents, and how ComfyUI has these.
FAMILIES: dict[str, tuple[Callable[[], Any], tuple[int, ...], Callable[[Any, torch.Tensor], torch.Tensor]]] = {
    "wan": (small.wan, (16, 3, 4, 6), AS_IS),
    "wan-2.2": (small.wan_22, (48, 2, 4, 4), AS_IS),
    "mochi": (small.mochi, (12, 2, 4, 4), AS_IS),
    "hunyuan-1.5": (small.hunyuan_video_15, (32, 2, 4, 4), AS_IS),
    "hunyuan-image": (small.hunyuan_image, (64, 4, 4), AS_IS),
    "cogvideox": (small.cogvideox, (16, 3, 4, 6), AS_IS),
    "ltx": (small.ltx, (16, 2, 2, 3), normalized),
    "ltx-2": (small.ltx2, (16, 2, 2, 3), normalized),
    "cosmos": (small.cosmos, (16, 2, 4, 4), cosmos_scaled),
    "flux-2": (small.flux2, (32, 4, 6), patches),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_latents_of_every_family_are_those_of_comfyui(
    nodes: dict[str, Any], serve: Serve, tmp_path: Path, name: str
) -> None:
    make, shape, in_comfyui = FAMILIES[name]
    vae = make()
    vae.save_pretrained(tmp_path / "vae")
    url = serve({name: {"repo": str(tmp_path / "vae"), "dtype": "float32"}})
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pixels_of(vae.decode(latents, return_dict=False)[0])
    loaded = run(nodes["VAEServerLoad"], name, url)
    torch.testing.assert_close(loaded.decode(in_comfyui(vae, latents)), expected, atol=2 * HALF_LEVEL, rtol=0)

    pixels = torch.rand(expected.shape[1:] if expected.ndim == 5 else expected.shape)
    pixels = (255 * pixels).round() / 255
    sent = (2 * pixels - 1).movedim(-1, 1)
    sent = sent.transpose(0, 1)[None] if expected.ndim == 5 else sent  # [F, 3, H, W] -> [1, 3, F, H, W]
    with torch.no_grad():
        encoded = vae.encode(sent)
    known = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
    found = loaded.encode(pixels)
    torch.testing.assert_close(found, in_comfyui(vae, known), atol=2e-3, rtol=1e-3)
    assert found.shape[1] == loaded.latent_channels


def test_qwen_image_has_an_axis_of_one_frame(nodes: dict[str, Any], serve: Serve, tmp_path: Path) -> None:
    vae = small.qwen_image()
    vae.save_pretrained(tmp_path / "vae")
    url = serve({"qwen": {"repo": str(tmp_path / "vae"), "dtype": "float32"}})
    loaded = run(nodes["VAEServerLoad"], "qwen", url)
    latents = torch.randn(2, 16, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pixels_of(vae.decode(latents, return_dict=False)[0])
    torch.testing.assert_close(loaded.decode(latents), expected, atol=HALF_LEVEL, rtol=0)
    assert loaded.encode(expected[:, 0]).shape == latents.shape


def test_ideogram_has_the_patches_of_flux_2_in_comfyui(nodes: dict[str, Any], serve: Serve, tmp_path: Path) -> None:
    vae = small.flux2()
    vae.save_pretrained(tmp_path / "vae")
    entry = {"repo": str(tmp_path / "vae"), "dtype": "float32", "family": "ideogram4"}
    loaded = run(nodes["VAEServerLoad"], "ideogram", serve({"ideogram": entry}))
    for buffer in (vae.bn.running_mean, vae.bn.running_var):  # [2 * 2 * C] -> [C * 2 * 2]
        buffer.copy_(buffer.clone().view(2, 2, 32).movedim(2, 0).flatten())
    latents = torch.randn(1, 32, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pixels_of(vae.decode(latents, return_dict=False)[0])
        pixels = (255 * expected).round() / 255
        known = vae.encode((2 * pixels - 1).movedim(-1, 1)).latent_dist.mode()
    torch.testing.assert_close(loaded.decode(patches(vae, latents)), expected, atol=2 * HALF_LEVEL, rtol=0)
    torch.testing.assert_close(loaded.encode(pixels), patches(vae, known), atol=2e-3, rtol=1e-3)


def test_qwen_image_2_1_has_no_axis_of_frames(nodes: dict[str, Any], serve: Serve, tmp_path: Path) -> None:
    small.qwen_image_21().save_pretrained(tmp_path / "vae")
    loaded = run(nodes["VAEServerLoad"], "qwen", serve({"qwen": {"repo": str(tmp_path / "vae"), "dtype": "float32"}}))
    latents = loaded.encode(torch.rand(2, 32, 48, 3))
    assert latents.shape == (2, loaded.latent_channels, 2, 3)
    assert loaded.latent_dim == 2
    images = loaded.decode(latents)
    assert images.shape == (2, 32, 48, 4)
    assert torch.equal(loaded.decode(latents.unsqueeze(2))[:, 0], images)


def test_latents_of_minimax_h3_are_scaled_in_comfyui(nodes: dict[str, Any], serve: Serve, tmp_path: Path) -> None:
    vae = small.minimax_h3()
    vae.save_pretrained(tmp_path / "vae")
    loaded = run(nodes["VAEServerLoad"], "h3", serve({"h3": {"repo": str(tmp_path / "vae"), "dtype": "float32"}}))
    mean, std = (torch.tensor(each).view(1, -1, 1, 1, 1) for each in (vae.config.latents_mean, vae.config.latents_std))
    latents = torch.randn(1, 8, 7, 4, 6, generator=torch.Generator().manual_seed(0))
    pixel_mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1, 1)
    pixel_std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1, 1)
    with torch.no_grad():
        expected = vae.decode(latents * std + mean).sample * pixel_std + pixel_mean
        frames = (255 * expected.clamp(0, 1)).round() / 255  # [1, 3, F, H, W]
        known = vae.encode((frames - pixel_mean) / pixel_std).latent_dist.mode()
    found = loaded.decode(latents)
    torch.testing.assert_close(found, expected.clamp(0, 1).movedim(1, -1), atol=2 * HALF_LEVEL, rtol=0)
    torch.testing.assert_close(loaded.encode(frames[0].movedim(0, -1)), (known - mean) / std, atol=5e-3, rtol=5e-3)


def test_a_batch_of_stable_video_diffusion_is_one_video(nodes: dict[str, Any], serve: Serve, tmp_path: Path) -> None:
    vae = small.temporal()
    vae.save_pretrained(tmp_path / "vae")
    url = serve({"svd": {"repo": str(tmp_path / "vae"), "dtype": "float32"}})
    latents = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pixels_of(vae.decode(latents, num_frames=3, return_dict=False)[0])
    torch.testing.assert_close(
        run(nodes["VAEServerDecode"], {"samples": latents}, "svd", url), expected, atol=HALF_LEVEL, rtol=0
    )


def test_a_decoder_that_removes_noise_gets_the_amount_that_comfyui_uses(
    nodes: dict[str, Any], serve: Serve, tmp_path: Path
) -> None:
    vae = small.ltx(timestep_conditioning=True)
    vae.save_pretrained(tmp_path / "vae")
    url = serve({"ltx": {"repo": str(tmp_path / "vae"), "dtype": "float32"}})
    latents = torch.randn(1, 16, 2, 2, 3, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    mean, std = (each.view(1, -1, 1, 1, 1) for each in (vae.latents_mean, vae.latents_std))
    with torch.no_grad():
        noisy = (0.025 * noise + 0.975 * latents) * std + mean
        expected = pixels_of(vae.decode(noisy, torch.tensor([0.05]), return_dict=False)[0])
    found = run(nodes["VAEServerLoad"], "ltx", url).decode(latents)
    torch.testing.assert_close(found, expected, atol=2 * HALF_LEVEL, rtol=0)


def test_the_video_of_latents_with_sound_is_decoded(nodes: dict[str, Any], url: str, vaes: dict[str, LocalVae]) -> None:
    video = vaes["hunyuan"].latents(2, 6, 8)
    both = SimpleNamespace(is_nested=True, unbind=lambda: [video, torch.zeros(1, 8, 5, 16)])  # as ComfyUI has them
    alone, found = (run(nodes["VAEServerDecode"], {"samples": each}, "hunyuan", url) for each in (video, both))
    assert torch.equal(found, alone)


def test_sound_has_its_samples_before_its_channels(nodes: dict[str, Any], serve: Serve, tmp_path: Path) -> None:
    sizes = {"encoder_hidden_size": 8, "decoder_channels": 8, "decoder_input_channels": 8}
    vae = seeded(AutoencoderOobleck, downsampling_ratios=[2, 4], channel_multiples=[1, 2], **sizes)
    vae.save_pretrained(tmp_path / "vae")
    url = serve({"sound": {"repo": str(tmp_path / "vae"), "dtype": "float32"}})
    latents = torch.randn(1, 8, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents).sample.movedim(1, -1)  # [B, 2, samples] -> [B, samples, 2]
    loaded = run(nodes["VAEServerLoad"], "sound", url)
    torch.testing.assert_close(loaded.decode(latents), expected, atol=1e-4, rtol=0)
    assert loaded.audio_sample_rate == vae.config.sampling_rate


def test_a_batch_larger_than_the_server_takes_is_sent_in_parts(
    nodes: dict[str, Any], comfy: ComfyUI, proxy: tuple[Proxy, str], vaes: dict[str, LocalVae]
) -> None:
    script, url = proxy
    latents = vaes["sd"].latents(6, 8, batch=6)  # the server takes 4
    images = run(nodes["VAEServerDecode"], {"samples": latents}, "sd", url)
    torch.testing.assert_close(images, pixels_of(vaes["sd"].decode(latents)), atol=HALF_LEVEL, rtol=0)
    assert len(script.posts) == 2
    (shown,) = [bar for bar in comfy.bars if bar]
    assert shown == sorted(shown)
    assert shown[-1] == 1


def test_each_video_of_a_batch_becomes_an_mp4(nodes: dict[str, Any], url: str, vaes: dict[str, LocalVae]) -> None:
    latents = vaes["hunyuan"].latents(3, 6, 8, batch=2)
    videos = run(nodes["VAEServerDecodeToVideo"], {"samples": latents}, "hunyuan", 8, 9, url)
    for video, sent in zip(videos, latents.split(1), strict=True):
        about = {
            "shape": sent.shape,
            "dtype": "float32",
            "output_type": "mp4",
            "fps": 8,
            "quality": 9,
            "stream": "True",
        }
        expected = requests.post(url + "hunyuan", sent.numpy().tobytes(), params=about, timeout=300)
        assert video.file.getvalue() == expected.content
        assert expected.headers["Content-Type"] == "video/mp4"


def test_images_are_encoded_like_locally_and_cropped_like_by_comfyui(
    nodes: dict[str, Any], url: str, vaes: dict[str, LocalVae]
) -> None:
    pixels = torch.rand(5, 53, 70, 3, generator=torch.Generator().manual_seed(0))
    for given in (pixels, (255 * pixels).round() / 255):
        cropped = given[:, 2:50, 3:67]
        with torch.no_grad():
            expected = vaes["sd"].module.encode(2 * cropped.movedim(-1, 1) - 1).latent_dist.mode()
        found = run(nodes["VAEServerEncode"], given, "sd", url)["samples"]
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


def test_an_image_from_a_file_is_sent_in_bytes(nodes: dict[str, Any]) -> None:
    from clients.comfyui.latents import _levels

    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(_levels(levels.float() / 255), levels)
    assert _levels(torch.tensor([0.5])).dtype is torch.float16


def test_the_last_frames_of_a_video_that_fill_no_latent_frame_are_left_out(nodes: dict[str, Any], url: str) -> None:
    pixels = torch.rand(7, 48, 64, 3)
    found = run(nodes["VAEServerEncode"], pixels, "hunyuan", url)["samples"]
    assert found.shape == (1, 16, 2, 6, 8)
    shorter = run(nodes["VAEServerEncode"], pixels[:5], "hunyuan", url)["samples"]
    assert torch.equal(found, shorter)
    vae = run(nodes["VAEServerLoad"], "hunyuan", url)
    images = vae.encode(pixels[:2], not_video=True)
    assert images.shape == (2, 16, 1, 6, 8)
    assert torch.equal(images[:1], vae.encode(pixels[:1]))
    assert torch.equal(vae.encode_tiled(pixels[:2], tile_x=8, not_video=True), images)


def test_the_vae_has_what_comfyuis_nodes_read(nodes: dict[str, Any], url: str) -> None:
    image, video = (run(nodes["VAEServerLoad"], name, url) for name in ("sd", "hunyuan"))
    assert (image.latent_channels, image.latent_dim, image.downscale_ratio, image.output_channels) == (4, 2, 8, 3)
    assert (video.latent_channels, video.latent_dim, video.downscale_ratio) == (16, 3, 8)
    assert (image.spacial_compression_decode(), image.temporal_compression_decode()) == (8, None)
    assert (video.spacial_compression_encode(), video.temporal_compression_decode()) == (8, 4)
    assert (image.downscale_index_formula, video.downscale_index_formula) == (None, (4, 8, 8))
    with pytest.raises(AttributeError, match="a remote VAE has no 'first_stage_model'; use a local VAE"):
        _ = image.first_stage_model


# Settings.


def test_the_input_comes_before_the_environment_and_this_before_the_file(remote: Any, tmp_path: Path) -> None:
    file = tmp_path / "remote_vae.json"

    def found(address: str = "", key: str = "", **environment: str) -> tuple[str, str | None]:
        server = remote.find_server(address, key, file, environment)
        return server.base, server.key

    assert found() == ("http://127.0.0.1:8000", None)
    file.write_text(json.dumps({"url": "http://file:1", "key": "of-file", "timeout_s": 7}))
    assert found() == ("http://file:1", "of-file")
    assert found(VAE_SERVER_URL="http://env:2", VAE_SERVER_KEY="of-env") == ("http://env:2", "of-env")
    assert found("http://env:2/", "mine", VAE_SERVER_URL="http://env:2", VAE_SERVER_KEY="of-env") == (
        "http://env:2",
        "mine",
    )
    assert remote.find_server("", "", file, {}).timeout_s == 7


def test_a_configured_key_goes_to_the_configured_server_only(remote: Any, tmp_path: Path) -> None:
    environment = {"VAE_SERVER_URL": "http://home:8000/flux", "VAE_SERVER_KEY": "secret"}

    def key(address: str) -> str | None:
        found: str | None = remote.find_server(address, "", tmp_path / "none.json", environment).key
        return found

    assert key("http://home:8000/sd") == "secret"
    assert [key(each) for each in ("http://stranger:8000", "https://home:8000", "http://home:8001")] == [None] * 3
    assert key("http://user:other@stranger:8000/flux") == "other"


def test_an_address_may_name_the_model_and_parameters(remote: Any, tmp_path: Path) -> None:
    server = remote.find_server("https://host/vae/flux?num_frames=81", "", tmp_path / "none.json", {})
    assert (server.base, server.model, server.query) == ("https://host/vae", "flux", (("num_frames", "81"),))
    chosen = remote.find_server("http://[::1]:8000/flux", "", tmp_path / "none.json", {}, model="sd")
    assert (chosen.base, chosen.model) == ("http://[::1]:8000", "sd")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("{", "cannot be read as JSON"), ("[]", "must be an object"), ('{"timeout_s": "x"}', "must be a number of sec")],
)
def test_a_wrong_settings_file_is_told(remote: Any, tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "remote_vae.json"
    file.write_text(content)
    with pytest.raises(remote.RemoteError, match=sentence):
        remote.find_server("", "", file, {})


@pytest.mark.parametrize("address", ["host:8000", "ftp://host", "http://", "http://host:99999"])
def test_an_address_that_is_none_is_told(remote: Any, tmp_path: Path, address: str) -> None:
    with pytest.raises(remote.RemoteError, match="is not the address of a server"):
        remote.find_server(address, "", tmp_path / "none.json", {})


def test_the_settings_file_is_read_and_a_change_runs_the_node_again(
    nodes: dict[str, Any], comfy: ComfyUI, url: str, vaes: dict[str, LocalVae]
) -> None:
    node = nodes["VAEServerDecode"]
    before = node.IS_CHANGED(model="sd")
    comfy.settings_file.write_text(json.dumps({"url": url + "hunyuan"}))
    assert node.IS_CHANGED(model="sd") != before
    assert run(nodes["VAEServerLoad"], "default").model.name == "hunyuan"


# The list of models.


def models_in(node: Any) -> Any:
    return node.INPUT_TYPES()["required"]["model"][0]


def menus_of(nodes: dict[str, Any]) -> set[Any]:
    """What the nodes that have a model show for it."""
    return {models_in(node) for name, node in nodes.items() if name != "VAEServerFind"}


def test_the_menus_list_the_models_of_the_server(
    comfy: ComfyUI, monkeypatch: pytest.MonkeyPatch, serve: Serve, tmp_path: Path, vaes: dict[str, LocalVae]
) -> None:
    small.tiny().save_pretrained(tmp_path / "tiny")
    entries = {name: {"repo": str(vaes[name].folder)} for name in ("sd", "hunyuan")}
    url = serve({**entries, "tiny": {"repo": str(tmp_path / "tiny")}})
    monkeypatch.setenv("VAE_SERVER_URL", url)
    nodes = load(comfy, monkeypatch).NODE_CLASS_MAPPINGS
    assert models_in(nodes["VAEServerDecode"]) == ["default", "sd", "hunyuan"]
    assert models_in(nodes["VAEServerDecodeToVideo"]) == ["default", "hunyuan"]
    assert models_in(nodes["VAEServerPreview"]) == ["default", "tiny", "sd", "hunyuan"]
    with pytest.raises(RuntimeError, match=r"tiny is a model of kind preview.* use Remote VAE Preview"):
        run(nodes["VAEServerLoad"], "tiny")


def test_a_lost_server_leaves_a_free_text(
    comfy: ComfyUI, monkeypatch: pytest.MonkeyPatch, proxy: tuple[Proxy, str], models_yaml: Path
) -> None:
    with running(load_settings(config=models_yaml)) as lost:
        pass
    monkeypatch.setenv("VAE_SERVER_URL", lost)
    nodes = load(comfy, monkeypatch).NODE_CLASS_MAPPINGS
    assert menus_of(nodes) == {"STRING"}
    assert nodes["VAEServerDecode"].VALIDATE_INPUTS(model="anything") is True


def test_a_silent_server_does_not_hold_comfyui_up(comfy: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("VAE_SERVER_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        nodes = load(comfy, monkeypatch).NODE_CLASS_MAPPINGS
        import clients.comfyui.nodes as module

        threads = threading.active_count()
        assert menus_of(nodes) == {"STRING"}
        assert threading.active_count() - threads <= 2  # one question for all of them
        monkeypatch.setattr(module.menu, "_known", [{"name": "later", "kind": "image"}])
        assert models_in(nodes["VAEServerDecode"]) == ["default", "later"]
        if module.menu._thread is not None:
            silent.close()


# Failures.


def decode(nodes: dict[str, Any], url: str, vaes: dict[str, LocalVae], model: str = "sd") -> Any:
    return run(nodes["VAEServerDecode"], {"samples": vaes["sd"].latents(6, 8)}, model, url)


@pytest.mark.parametrize("act", [(429, "0"), (503, "0"), (429, None), (502, None), BROKEN])
def test_a_failure_that_passes_is_tried_again(
    nodes: dict[str, Any], proxy: tuple[Proxy, str], vaes: dict[str, LocalVae], act: Any
) -> None:
    script, url = proxy
    script.script += [act]
    expected = pixels_of(vaes["sd"].decode(vaes["sd"].latents(6, 8)))
    torch.testing.assert_close(decode(nodes, url, vaes), expected, atol=HALF_LEVEL, rtol=0)
    assert len(script.posts) == 2


def test_a_busy_server_is_asked_again_after_the_time_that_it_says(
    nodes: dict[str, Any], proxy: tuple[Proxy, str], vaes: dict[str, LocalVae]
) -> None:
    script, url = proxy
    script.script += [(429, "1")] * 3  # more often than failures are tried again
    started = time.monotonic()
    decode(nodes, url, vaes)
    assert time.monotonic() - started >= 3
    assert len(script.posts) == 4


@pytest.mark.parametrize("act", [(500, None), (400, None), (503, "100000")])
def test_a_failure_shows_the_sentence_and_keeps_the_latents(
    nodes: dict[str, Any],
    comfy: ComfyUI,
    proxy: tuple[Proxy, str],
    url: str,
    vaes: dict[str, LocalVae],
    act: tuple[int, str | None],
) -> None:
    script, address = proxy
    script.script += [act]
    with pytest.raises(RuntimeError, match=rf"answered {act[0]}: the sentence of {act[0]}") as raised:
        decode(nodes, address, vaes)
    assert len(script.posts) == 1
    (kept,) = comfy.kept
    assert str(kept) in str(raised.value)
    content = load_file(kept)
    assert set(content) == {"latent_tensor", "latent_format_version_0"}
    assert torch.equal(content["latent_tensor"], vaes["sd"].latents(6, 8))
    answer = requests.post(url + "sd?image_format=png", kept.read_bytes(), timeout=300)
    assert answer.ok, answer.text


@pytest.mark.parametrize("node", ["VAEServerDecode", "VAEServerDecodeToVideo", "VAEServerLoad"])
def test_a_lost_server_keeps_the_latents_too(
    nodes: dict[str, Any], comfy: ComfyUI, vaes: dict[str, LocalVae], models_yaml: Path, node: str
) -> None:
    latents = vaes["sd"].latents(6, 8)
    with running(load_settings(config=models_yaml)) as lost:
        vae = run(nodes["VAEServerLoad"], "sd", lost)
    again = (
        (vae.decode, latents) if node == "VAEServerLoad" else (run, nodes[node], {"samples": latents}, "sd", 0, 5, lost)
    )
    if node == "VAEServerDecode":
        again = (run, nodes[node], {"samples": latents}, "sd", lost)
    with pytest.raises(RuntimeError, match="cannot be reached or broke off"):
        again[0](*again[1:])
    assert torch.equal(load_file(comfy.kept[0])["latent_tensor"], latents)


def test_the_folder_that_cannot_be_written_is_told(
    nodes: dict[str, Any], comfy: ComfyUI, proxy: tuple[Proxy, str], vaes: dict[str, LocalVae]
) -> None:
    script, url = proxy
    script.script += [(500, None)]
    (comfy.folder / "output").touch()
    with pytest.raises(RuntimeError, match="the sentence of 500 The latents could not be saved"):
        decode(nodes, url, vaes)


@pytest.mark.parametrize("act", [SILENT, ENDLESS])
def test_nothing_takes_longer_than_the_timeout(
    nodes: dict[str, Any], comfy: ComfyUI, proxy: tuple[Proxy, str], vaes: dict[str, LocalVae], act: str
) -> None:
    script, url = proxy
    comfy.settings_file.write_text(json.dumps({"timeout_s": 1.5}))
    script.script += [act] * 9
    with pytest.raises(RuntimeError, match=r"did not answer within 1\.5 s"):
        decode(nodes, url, vaes)
    assert 0 < float(script.posts[0]["X-Request-Timeout"]) <= 1.5
    assert comfy.kept


def test_a_wrong_model_gets_the_names_of_the_models(nodes: dict[str, Any], url: str, vaes: dict[str, LocalVae]) -> None:
    with pytest.raises(RuntimeError, match=r"has no model 'nothing'; it has .*flux, hunyuan, sd"):
        decode(nodes, url, vaes, "nothing")


def test_latents_of_another_model_are_told(nodes: dict[str, Any], url: str, vaes: dict[str, LocalVae]) -> None:
    with pytest.raises(RuntimeError, match="the latents have 4 channels, and those of flux have 16"):
        decode(nodes, url, vaes, "flux")


def test_latents_larger_than_the_server_takes_get_its_sentence(nodes: dict[str, Any], url: str) -> None:
    with pytest.raises(RuntimeError, match="answered 413: "):
        run(nodes["VAEServerDecode"], {"samples": torch.zeros(1, 4, 64, 64)}, "sd", url)


def test_a_redirect_is_not_followed(nodes: dict[str, Any], url: str) -> None:
    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(307)
            self.send_header("Location", url + self.path[1:])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(RuntimeError, match="answered 307"):
            run(nodes["VAEServerLoad"], "sd", f"http://127.0.0.1:{server.server_port}")


def test_something_else_than_a_vae_server_is_told(nodes: dict[str, Any], url: str) -> None:
    with pytest.raises(RuntimeError, match="answered 404"):
        run(nodes["VAEServerLoad"], "sd", url + "wrong/path/sd")


def test_a_key_is_sent(nodes: dict[str, Any], serve: Serve, vaes: dict[str, LocalVae]) -> None:
    url = serve({"sd": {"repo": str(vaes["sd"].folder)}}, api_key="secret")
    with pytest.raises(RuntimeError, match=r"answered 401: .*key"):
        run(nodes["VAEServerLoad"], "sd", url)
    assert run(nodes["VAEServerLoad"], "sd", url, "secret").decode(vaes["sd"].latents(6, 8)).shape == (1, 48, 64, 3)


# Progress and the cancel button.


def test_the_bar_follows_the_frames_of_a_video(
    nodes: dict[str, Any], comfy: ComfyUI, url: str, vaes: dict[str, LocalVae], held_video: threading.Event
) -> None:
    def look() -> None:
        if any(0.2 < share < 0.9 for bar in comfy.bars for share in bar):
            held_video.set()

    comfy.on_look = look
    latents = vaes["hunyuan"].latents(4, 6, 8)
    run(nodes["VAEServerDecodeToVideo"], {"samples": latents}, "hunyuan", address=url)
    assert held_video.is_set()


def test_the_cancel_button_ends_the_wait_and_the_work_of_the_server(
    nodes: dict[str, Any], comfy: ComfyUI, url: str, vaes: dict[str, LocalVae], held_video: threading.Event
) -> None:
    def metric(name: str) -> float:
        lines = requests.get(url + "metrics", timeout=PATIENCE_S).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}\b", line))

    def look() -> None:
        if any(0.2 < share < 0.9 for bar in comfy.bars for share in bar):
            raise Cancelled

    comfy.on_look = look
    before = metric("vae_cancelled_total")
    with pytest.raises(Cancelled):
        run(nodes["VAEServerDecodeToVideo"], {"samples": vaes["hunyuan"].latents(4, 6, 8)}, "hunyuan", address=url)
    until(lambda: metric("vae_cancelled_total") > before, "the server's notice that the client has left")
    held_video.set()
    until(lambda: metric("vae_inflight") + metric("vae_queue_depth") == 0, "the end of the work")
    assert not comfy.kept  # the user did not want them


def test_the_cancel_button_works_while_a_busy_server_is_waited_for(
    nodes: dict[str, Any], comfy: ComfyUI, proxy: tuple[Proxy, str], vaes: dict[str, LocalVae]
) -> None:
    script, url = proxy
    script.script += [(503, "300")]

    def look() -> None:
        if script.posts:
            raise Cancelled

    comfy.on_look = look
    with pytest.raises(Cancelled):
        decode(nodes, url, vaes)


# Previews.


def sampled(url: str, model: str, x0: torch.Tensor, scale: float) -> None:
    """Three steps of a sampler, each of which waits until the server has answered the one before."""
    from clients.comfyui.latents import find_model
    from clients.comfyui.preview import Previews
    from clients.comfyui.remote import Server

    previews = Previews(
        find_model(Server(url.rstrip("/"), model=model), lambda _: None), lambda latents: latents / scale
    )
    for step in range(3):
        previews.step(step, x0, 3)
        wait([previews._asked] if previews._asked else [])
    previews.end()


def test_a_preview_is_what_the_preview_model_makes_of_the_samplers_latents(
    nodes: dict[str, Any], comfy: ComfyUI, serve: Serve, tmp_path: Path, vaes: dict[str, LocalVae]
) -> None:
    tiny = small.tiny()
    tiny.save_pretrained(tmp_path / "tiny")
    url = serve({"tiny": {"repo": str(tmp_path / "tiny")}, "sd": {"repo": str(vaes["sd"].folder)}})
    x0 = vaes["sd"].latents(6, 8, batch=2)
    with torch.no_grad():
        expected = {"tiny": tiny.decode(x0[:1]).sample, "sd": vaes["sd"].decode(x0[:1] / 0.5)}
    for model, sample in expected.items():
        comfy.previews.clear()
        sampled(url, model, x0, 0.5)
        assert len(comfy.previews) == 2  # of the first two steps, each shown at the next
        found = torch.frombuffer(bytearray(comfy.previews[-1].tobytes()), dtype=torch.uint8).view(48, 64, 3) / 255
        assert (found - pixels_of(sample)[0]).abs().mean() < 0.08  # a JPEG of noise
        assert (found - pixels_of(expected["sd" if model == "tiny" else "tiny"])[0]).abs().mean() > 0.1


def test_the_preview_of_a_video_is_its_middle_frame(
    nodes: dict[str, Any], comfy: ComfyUI, url: str, vaes: dict[str, LocalVae]
) -> None:
    x0 = vaes["hunyuan"].latents(3, 6, 8)
    sampled(url, "hunyuan", x0, 1.0)
    sample = pixels_of(vaes["hunyuan"].decode(x0[:, :, 1:2]))[0, 0]
    found = torch.frombuffer(bytearray(comfy.previews[-1].tobytes()), dtype=torch.uint8).view(48, 64, 3) / 255
    assert (found - sample).abs().mean() < 0.08


def test_a_video_that_is_sampled_with_its_sound_has_previews(
    nodes: dict[str, Any], comfy: ComfyUI, url: str, vaes: dict[str, LocalVae]
) -> None:
    """ComfyUI packs both into one tensor, and tells their shapes."""
    x0, sound = vaes["hunyuan"].latents(3, 6, 8), torch.zeros(1, 8, 5, 16)
    packed = torch.cat([each.reshape(1, 1, -1) for each in (x0, sound)], dim=-1)

    class Patcher:
        model = SimpleNamespace(process_latent_out=lambda latents: latents)

        def clone(self) -> Patcher:
            return self

        def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
            self.wrapper = wrapper

    class Guider:
        class_obj = SimpleNamespace(model_patcher=Patcher())

        def __call__(self, *given: Any, latent_shapes: Any) -> None:
            until(lambda: given[5](0, packed, packed, 3) or bool(comfy.previews), "a preview")

    patcher = run(nodes["VAEServerPreview"], Patcher(), "hunyuan", url)
    given = ("noise", "latents", "sampler", "sigmas", None, None, False, 0)
    patcher.wrapper(Guider(), *given, latent_shapes=[x0.shape, sound.shape])
    sample = pixels_of(vaes["hunyuan"].decode(x0[:, :, 1:2]))[0, 0]
    found = torch.frombuffer(bytearray(comfy.previews[-1].tobytes()), dtype=torch.uint8).view(48, 64, 3) / 255
    assert (found - sample).abs().mean() < 0.08


def test_a_server_that_makes_no_previews_does_not_disturb_the_sampler(
    nodes: dict[str, Any],
    comfy: ComfyUI,
    proxy: tuple[Proxy, str],
    vaes: dict[str, LocalVae],
    caplog: pytest.LogCaptureFixture,
) -> None:
    script, url = proxy
    script.script += [(500, None)] * 3
    sampled(url, "sd", vaes["sd"].latents(6, 8), 1.0)
    assert not comfy.previews
    assert len(script.posts) == 1
    assert "no previews: " in caplog.text


# The package.


def test_the_registrys_description_is_complete() -> None:
    about = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    comfy = about["tool"]["comfy"]
    assert {"PublisherId", "DisplayName", "Icon"} <= set(comfy)
    assert (FOLDER / Path(comfy["Icon"]).name).is_file()
    assert (FOLDER / about["project"]["license"]["file"]).is_file()


@pytest.mark.parametrize("file", sorted((FOLDER / "example_workflows").glob("*.json")), ids=lambda file: file.stem)
def test_the_examples_use_the_nodes_as_they_are(nodes: dict[str, Any], file: Path) -> None:
    used = [node for node in json.loads(file.read_text())["nodes"] if node["type"].startswith("VAEServer")]
    assert used
    for node in used:
        inputs = nodes[node["type"]].INPUT_TYPES()
        known = {**inputs["required"], **inputs["optional"]}
        assert {each["name"] for each in node["inputs"]} <= set(known)
