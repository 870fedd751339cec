"""SD.Next's own module, with the patch, against this server. The rest of SD.Next is replaced by the few names it uses."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from server.families import FAMILIES
from server.values import Scaling
from tests.conftest import REPOSITORY, Serve
from tests.vaes import LocalVae

PATCH = REPOSITORY / "clients" / "sdnext" / "sd_vae_remote.patch"
FILES = ("modules/ui_definitions.py", "modules/vae/sd_vae_remote.py")
pytestmark = pytest.mark.skipif("SDNEXT" not in os.environ, reason="needs a checkout of SD.Next: SDNEXT=FOLDER")


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two files of the checkout, with the patch."""
    root = tmp_path_factory.mktemp("sdnext")
    for file in FILES:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text((Path(os.environ["SDNEXT"]) / file).read_text())
    subprocess.run(["git", "apply", str(PATCH)], cwd=root, check=True)
    return root


@pytest.fixture
def remote(patched: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """SD.Next's module for remote VAEs."""
    opts = SimpleNamespace(remote_vae_url="", remote_vae_type="raw", remote_vae_encode=True)
    vae = SimpleNamespace(config={"scaling_factor": 99.0})
    parts = {
        "shared": SimpleNamespace(opts=opts, sd_model_type="sd", sd_model=SimpleNamespace(vae=vae)),
        "devices": SimpleNamespace(cpu=torch.device("cpu"), dtype=torch.float32),
        "errors": SimpleNamespace(display=lambda error, _where: (_ for _ in ()).throw(error)),
        "modelloader": SimpleNamespace(hf_login=lambda: None),
        "logger": SimpleNamespace(log=logging.getLogger("sdnext")),
    }
    package = ModuleType("modules")
    for name, part in parts.items():
        setattr(package, name, part)
        monkeypatch.setitem(sys.modules, f"modules.{name}", part)
    monkeypatch.setitem(sys.modules, "modules", package)
    spec = importlib.util.spec_from_file_location("sd_vae_remote", patched / "modules" / "vae" / "sd_vae_remote.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return SimpleNamespace(module=module, opts=opts)


def test_the_settings_compile(patched: Path) -> None:
    text = (patched / FILES[0]).read_text()
    compile(text, FILES[0], "exec")
    assert '"remote_vae_url"' in text


@pytest.mark.parametrize("model", ["sd", "sdxl", "sd3", "f1", "hunyuanvideo"])
def test_every_model_is_decoded_with_the_servers_statistics(
    remote: Any, serve: Serve, vaes: dict[str, LocalVae], model: str
) -> None:
    local = vaes[{"f1": "flux", "hunyuanvideo": "hunyuan"}.get(model, model)]
    remote.opts.remote_vae_url = serve({model: {"repo": str(local.folder), "dtype": "float32"}})
    is_video = model == "hunyuanvideo"
    latents = local.latents(*((3, 4, 6) if is_video else (4, 6)))
    sent = FluxPipeline._pack_latents(latents, 1, latents.shape[1], 4, 6) if model == "f1" else latents
    sent = latents[0] if is_video else sent  # SD.Next's videos may have no batch axis
    made = remote.module.remote_decode(sent, width=48, height=32, model_type=model)
    family = FAMILIES["hunyuan_video" if is_video else "kl"]
    expected = local.decode(family.unscale(latents, family.describe(local.module.config), Scaling(from_model=True)))
    torch.testing.assert_close(made.float(), expected, atol=2e-3, rtol=0)


def test_a_batch_is_sent_one_by_one(remote: Any, serve: Serve, vaes: dict[str, LocalVae]) -> None:
    remote.opts.remote_vae_url = serve({"sd": {"repo": str(vaes["sd"].folder), "dtype": "float32"}})
    remote.opts.remote_vae_type = "png"
    latents = vaes["sd"].latents(4, 6).repeat(3, 1, 1, 1)
    made = remote.module.remote_decode(latents, width=48, height=32, model_type="sd")
    assert [image.size for image in made] == [(48, 32)] * 3


def test_a_picture_is_encoded(remote: Any, serve: Serve, vaes: dict[str, LocalVae]) -> None:
    remote.opts.remote_vae_url = serve({"sd": {"repo": str(vaes["sd"].folder), "dtype": "float32"}})
    latents = remote.module.remote_encode(Image.new("RGB", (48, 32), "teal"), model_type="sd")
    assert latents.shape == (1, 4, 4, 6)


def test_without_an_address_nothing_changes(remote: Any) -> None:
    assert remote.module.endpoint(remote.module.hf_decode_endpoints, "sd").startswith("https://")
    assert remote.module.endpoint(remote.module.hf_decode_endpoints, "qwen") is None
