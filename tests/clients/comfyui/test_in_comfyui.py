"""The nodes in the real ComfyUI, by workflows over its HTTP API: `make test-comfyui COMFYUI=FOLDER`."""

from __future__ import annotations

import asyncio
import io
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import requests
import torch
from diffusers import AutoencoderKL, AutoencoderOobleck
from PIL import Image
from safetensors.torch import load_file, save_file

from server.config import load_settings
from tests.clients.comfyui.program import FOLDER, Failed, Flow, Program, program
from tests.conftest import running, write_models_yaml
from tests.pipelines import vaes as small
from tests.pipelines.sample import seeded
from tests.vaes import LocalVae
from tests.waiting import PATIENCE_S, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="needs COMFYUI=FOLDER, a ComfyUI with its packages: see make test-comfyui"),
]

# ComfyUI reads an AutoencoderKL only in the sizes of the real ones.
FULL: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "sd": {"latent_channels": 4},
    "flux": {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
}
KEY = "secret-key"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, vaes: dict[str, LocalVae]) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("full")
    for name, config in MODELS.items():
        vae = seeded(AutoencoderKL, **FULL, **config)
        small.brightened(vae, vae.decoder.conv_out)
        vae.save_pretrained(folder / name)
    small.tiny(latent_channels=16).save_pretrained(folder / "tiny")
    sizes = {"encoder_hidden_size": 8, "decoder_channels": 8, "decoder_input_channels": 8}
    sound = seeded(AutoencoderOobleck, downsampling_ratios=[2, 4], channel_multiples=[1, 2], **sizes)
    sound.save_pretrained(folder / "sound")
    entries = {name: {"repo": str(folder / name), "dtype": "float32"} for name in (*MODELS, "tiny", "sound")}
    video = {"repo": str(vaes["hunyuan"].folder), "dtype": "float32"}
    return {**entries, "hunyuan": video}


@pytest.fixture(scope="module")
def server(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = write_models_yaml(tmp_path_factory.mktemp("server") / "models.yaml", models, "sd")
    with running(load_settings(config=config, api_key=KEY)) as url:
        yield url


@pytest.fixture(scope="module")
def comfyui(models: dict[str, Any], server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    folder = tmp_path_factory.mktemp("comfyui")
    (folder / "models" / "vae").mkdir(parents=True)
    (folder / "input").mkdir()
    for name in MODELS:
        weights = Path(models[name]["repo"]) / "diffusion_pytorch_model.safetensors"
        (folder / "models" / "vae" / f"{name}.safetensors").symlink_to(weights)
    shapes = {"sd": (2, 4, 8, 12), "flux": (1, 16, 8, 12), "hunyuan": (1, 16, 4, 6, 8), "sound": (1, 8, 500)}
    for name, shape in shapes.items():
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        content = {"latent_tensor": latents, "latent_format_version_0": torch.tensor([])}
        save_file(content, folder / "input" / f"{name}.latent")
    levels = np.random.default_rng(0).integers(0, 256, (70, 101, 4), dtype=np.uint8)
    levels[..., 3] = 255
    levels[20:50, 30:60, 3] = 0  # the mask
    Image.fromarray(levels).save(folder / "input" / "picture.png")
    with program(folder, {"VAE_SERVER_URL": server, "VAE_SERVER_KEY": KEY}) as found:
        yield found


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def save(image: str) -> dict[str, Any]:
    return node("SaveImage", images=[image, 0], filename_prefix=image)


@pytest.mark.parametrize("name", MODELS)
def test_images_are_those_of_comfyuis_own_decode(comfyui: Program, name: str) -> None:
    flow: Flow = {
        "latents": node("LoadLatent", latent=f"{name}.latent"),
        "vae": node("VAELoader", vae_name=f"{name}.safetensors"),
        "remote": node("VAEServerLoad", model=name),
        "local": node("VAEDecode", samples=["latents", 0], vae=["vae", 0]),
        "decode": node("VAEServerDecode", samples=["latents", 0], model=name),
        "stock": node("VAEDecode", samples=["latents", 0], vae=["remote", 0]),
        "tiled": node(
            "VAEDecodeTiled",
            samples=["latents", 0],
            vae=["remote", 0],
            tile_size=64,
            overlap=0,
            temporal_size=64,
            temporal_overlap=8,
        ),
    }
    flow |= {f"save {each}": save(each) for each in ("local", "decode", "stock", "tiled")}
    files = comfyui.run(flow)
    expected = comfyui.pictures(files["save local"])
    assert expected.std() > 20
    for each in ("decode", "stock", "tiled"):
        found = comfyui.pictures(files[f"save {each}"])
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("name", MODELS)
def test_latents_are_those_of_comfyuis_own_encode(comfyui: Program, name: str) -> None:
    encodes = ("VAEEncode", "VAEEncodeForInpaint")
    flow: Flow = {
        "picture": node("LoadImage", image="picture.png"),
        "vae": node("VAELoader", vae_name=f"{name}.safetensors"),
        "remote": node("VAEServerLoad", model=name),
        "node": node("VAEServerEncode", pixels=["picture", 0], model=name),
    }
    for kind in encodes:
        inpaint = {"mask": ["picture", 1], "grow_mask_by": 6} if "Inpaint" in kind else {}
        # VAEEncodeForInpaint cuts its pixels wrongly if they are not whole latent pixels.
        flow["whole"] = node(
            "ImageScale", image=["picture", 0], upscale_method="nearest-exact", width=96, height=64, crop="disabled"
        )
        pixels = ["whole" if inpaint else "picture", 0]
        flow[f"{kind} local"] = node(kind, pixels=pixels, vae=["vae", 0], **inpaint)
        flow[f"{kind} remote"] = node(kind, pixels=pixels, vae=["remote", 0], **inpaint)
    made = ["node", *(f"{kind} {place}" for kind in encodes for place in ("local", "remote"))]
    flow |= {f"save {each}": node("SaveLatent", samples=[each, 0], filename_prefix=each) for each in made}
    files = comfyui.run(flow)
    found = {each: comfyui.latents(files[f"save {each}"]) for each in made}
    for kind in encodes:
        torch.testing.assert_close(found[f"{kind} remote"], found[f"{kind} local"], atol=5e-3, rtol=2e-3)
    assert torch.equal(found["node"], found["VAEEncode remote"])


def test_a_video_becomes_images_and_an_mp4(comfyui: Program, vaes: dict[str, LocalVae]) -> None:
    flow: Flow = {
        "latents": node("LoadLatent", latent="hunyuan.latent"),
        "images": node("VAEServerDecode", samples=["latents", 0], model="hunyuan"),
        "save images": save("images"),
        "video": node("VAEServerDecodeToVideo", samples=["latents", 0], model="hunyuan", fps=8.0, quality=9),
        "save video": node("SaveVideo", video=["video", 0], filename_prefix="video", format="auto", codec="auto"),
        "parts": node("GetVideoComponents", video=["video", 0]),
        "frames": node("SaveImage", images=["parts", 0], filename_prefix="frames"),
    }
    files = comfyui.run(flow)
    latents = load_file(comfyui.folder / "input" / "hunyuan.latent")["latent_tensor"]
    sample = vaes["hunyuan"].decode(latents)[0].permute(1, 2, 3, 0)  # [C, F, H, W] -> [F, H, W, C]
    expected = (255 * (sample / 2 + 0.5).clamp(0, 1)).round().numpy()
    assert np.abs(comfyui.pictures(files["save images"]) - expected).max() <= 1
    frames = comfyui.pictures(files["frames"])
    assert frames.shape == expected.shape
    assert np.abs(frames - expected).mean() < 15  # of noise, whose colours H.264 keeps for 2x2 pixels together
    (file,) = files["save video"]
    count, seconds = imageio_ffmpeg.count_frames_and_secs(str(comfyui.path(file)))
    assert count == len(expected)
    assert seconds == pytest.approx(len(expected) / 8, abs=0.05)


def test_sound_is_decoded_by_comfyuis_own_node(comfyui: Program) -> None:
    flow: Flow = {
        "latents": node("LoadLatent", latent="sound.latent"),
        "remote": node("VAEServerLoad", model="sound"),
        "sound": node("VAEDecodeAudio", samples=["latents", 0], vae=["remote", 0]),
        "save": node("SaveAudio", audio=["sound", 0], filename_prefix="sound"),
    }
    (file,) = comfyui.run(flow)["save"]
    header = comfyui.path(file).read_bytes()[:42]
    assert header[:4] == b"fLaC"
    assert int.from_bytes(header[18:26]) & (1 << 36) - 1 == 500 * 8  # samples, in the last 36 bits


class Listener:
    """What ComfyUI sends to one of its pages: messages, and pictures of previews."""

    def __init__(self, comfyui: Program) -> None:
        self.messages: list[dict[str, Any]] = []
        self.pictures: list[Image.Image] = []
        self.name = "listener"
        self._comfyui = comfyui
        self._is_open, self._ends = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._listen()))

    def __enter__(self) -> Listener:
        self._thread.start()
        assert self._is_open.wait(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join(PATIENCE_S)

    @property
    def shares(self) -> list[float]:
        """What the progress bar showed."""
        found = [each["data"] for each in self.messages if each["type"] == "progress"]
        return [each["value"] / each["max"] for each in found]

    async def _listen(self) -> None:
        import aiohttp

        address = f"{self._comfyui.url}ws?clientId={self.name}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            self._is_open.set()
            while not self._ends.is_set():
                try:
                    message = await socket.receive(0.1)
                except TimeoutError:
                    continue
                if message.type is aiohttp.WSMsgType.TEXT:
                    self.messages.append(json.loads(message.data))
                elif message.type is aiohttp.WSMsgType.BINARY:
                    picture = Image.open(io.BytesIO(message.data[message.data.index(b"\xff\xd8") :]))
                    picture.load()
                    self.pictures.append(picture)


def to_video() -> Flow:
    return {
        "latents": node("LoadLatent", latent="hunyuan.latent"),
        # A comment that differs each time, because ComfyUI remembers what a node made.
        "video": node("VAEServerDecodeToVideo", samples=["latents", 0], model="hunyuan", fps=1.0 + len(FLOWS)),
        "save": node("SaveVideo", video=["video", 0], filename_prefix="video", format="auto", codec="auto"),
    }


FLOWS: list[str] = []


def metric(server: str, names: str) -> float:
    """The sum of the server's metrics with these names."""
    lines = requests.get(server + "metrics", headers={"X-API-Key": KEY}, timeout=PATIENCE_S).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"({names})\b", line))


def test_the_bar_of_comfyui_follows_a_video(comfyui: Program, held_video: threading.Event) -> None:
    with Listener(comfyui) as page:
        FLOWS.append(comfyui.start(to_video(), page.name))
        until(lambda: any(0.2 < share < 0.9 for share in page.shares), "progress")
        held_video.set()
        assert comfyui.wait(FLOWS[-1])["status"]["status_str"] == "success"
        until(lambda: 1 in page.shares, "the end of the bar")


def test_the_cancel_button_of_comfyui_ends_the_work_of_the_server(
    comfyui: Program, server: str, held_video: threading.Event
) -> None:
    before = metric(server, "vae_cancelled_total")
    with Listener(comfyui) as page:
        FLOWS.append(comfyui.start(to_video(), page.name))
        until(lambda: any(0.2 < share < 0.9 for share in page.shares), "progress")
        assert requests.post(comfyui.url + "interrupt", json={}, timeout=PATIENCE_S).ok
        told = comfyui.wait(FLOWS[-1])  # although the server still holds the decode
        assert "execution_interrupted" in [name for name, _ in told["status"]["messages"]]
    until(lambda: metric(server, "vae_cancelled_total") > before, "the server's notice that the client has left")
    held_video.set()
    until(lambda: metric(server, "vae_inflight|vae_queue_depth") == 0, "the end of the server's work")


def test_previews_come_from_the_server_while_sampling(comfyui: Program) -> None:
    flow: Flow = {
        "wan": node("SmallWan", frames=1),
        "previews": node("VAEServerPreview", diffusion_model=["wan", 0], model="tiny"),
        "sample": node(
            "KSampler",
            model=["previews", 0],
            positive=["wan", 1],
            negative=["wan", 1],
            latent_image=["wan", 2],
            seed=0,
            steps=30,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="sampled"),
    }
    with Listener(comfyui) as page:
        told = comfyui.wait(comfyui.start(flow, page.name))
        assert told["status"]["status_str"] == "success", told["status"]
        until(lambda: len(page.pictures) > 0, "a preview")
        assert {picture.size for picture in page.pictures} == {(512, 512)}  # to which ComfyUI enlarges it
        assert np.asarray(page.pictures[-1]).std() > 5


def test_a_refusal_is_shown_and_the_latents_are_kept(comfyui: Program, server: str) -> None:
    def flow(**about: Any) -> Flow:
        latents = node("LoadLatent", latent="sd.latent")
        return {"l": latents, "d": node("VAEServerDecode", samples=["l", 0], **about), "s": save("d")}

    with pytest.raises(
        Failed, match=r"has no model 'other'; it has .* The latents are saved in (.*)\.latent"
    ) as raised:
        comfyui.run(flow(model="other"))
    with pytest.raises(Failed, match=r"answered 401: .*key"):
        comfyui.run(flow(model="sd", key="wrong"))
    with pytest.raises(Failed, match=r"answered 401: .*key"):  # the key of the settings is not for this address
        comfyui.run(flow(model="sd", address=server.replace("127.0.0.1", "localhost")))
    path = re.search(r"saved in (.*\.latent)", str(raised.value))
    assert path
    kept = Path(path.group(1))
    (comfyui.folder / "input" / "kept.latent").write_bytes(kept.read_bytes())
    again: Flow = {
        "l": node("LoadLatent", latent="kept.latent"),
        "d": node("VAEServerDecode", samples=["l", 0], model="sd"),
        "s": save("d"),
    }
    assert comfyui.pictures(comfyui.run(again)["s"]).shape == (2, 64, 96, 3)


def test_another_node_may_give_the_address(comfyui: Program, server: str) -> None:
    flow: Flow = {
        "address": node("PrimitiveString", value=server),
        "l": node("LoadLatent", latent="sd.latent"),
        "d": node("VAEServerDecode", samples=["l", 0], model="sd", address=["address", 0]),
        "s": save("d"),
    }
    assert comfyui.pictures(comfyui.run(flow)["s"]).shape == (2, 64, 96, 3)


def menus(comfyui: Program) -> dict[str, Any]:
    about = requests.get(comfyui.url + "object_info", timeout=PATIENCE_S).json()
    inputs = {name: each["input"]["required"] for name, each in about.items() if name.startswith("VAEServer")}
    return {name: each["model"][0] for name, each in inputs.items() if "model" in each}


def test_the_menus_list_the_servers_models(comfyui: Program) -> None:
    found = menus(comfyui)
    assert len(found) == 5
    assert sorted(found["VAEServerDecode"]) == ["default", "flux", "hunyuan", "sd"]
    assert found["VAEServerPreview"][:2] == ["default", "tiny"]


def test_the_examples_are_offered(comfyui: Program) -> None:
    offered = requests.get(comfyui.url + "workflow_templates", timeout=PATIENCE_S).json()
    assert sorted(offered["remote_vae"]) == ["inpainting_with_comfyuis_own_nodes", "text_to_image", "text_to_video"]


def test_a_lost_server_does_not_keep_comfyui_from_starting(models: dict[str, Any], tmp_path: Path) -> None:
    config = write_models_yaml(tmp_path / "models.yaml", models, "sd")
    with running(load_settings(config=config)) as lost:
        pass
    with program(tmp_path / "comfyui", {"VAE_SERVER_URL": lost}) as found:
        assert menus(found) == dict.fromkeys(menus(found), "STRING")
        assert len(menus(found)) == 5
