"""`decoder: package.module:Class`: the example of docs/operations.md through real servers, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from safetensors.torch import load_file, save_file

from server.config import load_settings
from server.engine.coders.interface import Stopped
from server.engine.models import LoadedModels
from server.errors import ConfigError, ModelUnavailable
from server.model_info import CoderId, Direction
from server.values import Layout
from tests.commands.test_cli import run
from tests.conftest import REPOSITORY, Serve, write_models_yaml

SCALING = 0.18215  # of the configuration `sd`
EXAMPLE = "LatentsToColours"
ALLOWED = {"allow_custom_decoders": True}

# Other classes in the module of the example, and what is said of each.
WRONG = {
    "NoDecode": ("class NoDecode:\n    pass\n", "my_decoders:NoDecode has no method decode.latents., which the server"),
    "Greedy": (
        "class Greedy:\n    def __init__(self, weights):\n        pass\n    def decode(self, latents):\n        pass\n",
        r"my_decoders:Greedy cannot be built from colours.safetensors .TypeError at custom.py:\d+: .*'config'",
    ),
    "Wordy": (
        f"class Wordy({EXAMPLE}):\n    def decode(self, latents):\n        return 'pixels'\n",
        "my_decoders:Wordy returns a str; it must return a tensor",
    ),
    "Small": (
        f"class Small({EXAMPLE}):\n    def decode(self, latents):\n        return self.colours(latents)\n",
        "my_decoders:Small must decode latents 1x4x8x8 to floats 1x3x64x64, and returns float32 1x3x8x8",
    ),
    "Whole": (
        f"class Whole({EXAMPLE}):\n    def decode(self, latents):\n        return super().decode(latents).int()\n",
        "to floats 1x3x64x64, and returns int32 1x3x64x64",
    ),
    "Broken": (
        f"class Broken({EXAMPLE}):\n    def decode(self, latents):\n        raise KeyError('lost')\n",
        "my_decoders:Broken cannot decode latents 1x4x8x8 .KeyError at my_decoders.py:\\d+: 'lost'",
    ),
}


def example() -> str:
    """The class that docs/operations.md shows."""
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    (block,) = [each for each in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if f"class {EXAMPLE}" in each]
    return str(block)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on sys.path with the module of the example, other modules, and weights."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "my_decoders.py").write_text(example() + "\n\n" + "\n\n".join(text for text, _ in WRONG.values()))
    (folder / "lacks_another.py").write_text("import nowhere_at_all\n")
    (folder / "raises.py").write_text("raise OSError('no licence')\n")
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(4, 3, 1)
    save_file({f"colours.{key}": value for key, value in layer.state_dict().items()}, folder / "colours.safetensors")
    monkeypatch.syspath_prepend(str(folder))
    for name in ("my_decoders", "lacks_another", "raises"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


def entry(package: Path, name: str = f"my_decoders:{EXAMPLE}", **keys: Any) -> dict[str, Any]:
    return {"repo": str(package / "colours.safetensors"), "config": "sd", "decoder": name, **keys}


def settings(package: Path, made: dict[str, Any], **flags: Any) -> Any:
    return load_settings(config=write_models_yaml(package / "models.yaml", {"m": made}, "m"), **flags)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        call()
    assert "\n" not in caught.value.detail
    return caught.value.detail


def test_the_example_of_the_docs_decodes_what_a_server_is_sent(package: Path, serve: Serve) -> None:
    address = serve({"m": entry(package, dtype="float32")}, **ALLOWED)
    answer, latents = post(address)
    assert answer.status_code == 200, answer.text
    check_sample(answer, latents, package)
    (listed,) = requests.get(address + "models", timeout=300).json()["models"]
    assert listed["decoder"] == f"my_decoders:{EXAMPLE}"
    assert listed["directions"] == ["decode"]
    one = latents[:1]
    image = requests.post(address, params=query(one), data=one.numpy().tobytes(), timeout=300)
    assert image.headers["content-type"] == "image/jpeg"
    encoded = requests.post(address + "encode", params={"shape": [1, 3, 64, 64], "dtype": "uint8"}, data=bytes(12288),
        timeout=300)  # fmt: skip
    assert encoded.status_code == 422
    assert "cannot encode" in encoded.text


def query(latents: torch.Tensor) -> dict[str, Any]:
    return {"shape": list(latents.shape), "dtype": "float32", "do_scaling": True}


def post(address: str) -> tuple[requests.Response, torch.Tensor]:
    latents = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    sent = query(latents) | {"output_type": "pt"}
    return requests.post(address, params=sent, data=latents.numpy().tobytes(), timeout=300), latents


def check_sample(answer: requests.Response, latents: torch.Tensor, package: Path) -> None:
    """The pixels are those of the layer, of unscaled latents."""
    weights = load_file(package / "colours.safetensors")
    colours = torch.nn.functional.conv2d(latents / SCALING, weights["colours.weight"], weights["colours.bias"])
    expected = colours.repeat_interleave(8, 2).repeat_interleave(8, 3).numpy()
    assert np.abs(np.frombuffer(answer.content, "float32").reshape(expected.shape) - expected).max() <= 1e-4


@pytest.mark.slow
def test_a_server_with_worker_processes_decodes_with_it_if_it_may(package: Path) -> None:
    config = write_models_yaml(package / "models.yaml", {"m": entry(package, preload=True)}, "m")
    path = {"PYTHONPATH": f"{REPOSITORY}:{package}", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "server", "serve", "--config", str(config), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(
        [*command, "--allow-custom-decoders"], cwd=REPOSITORY, env=path, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stderr
            told = next(line for line in server.stderr if line.startswith(("ready: ", "error: ")))
            found = re.search(r"http://\S+?:\d+", told)
            assert found, told
            answer, latents = post(found[0] + "/")
            check_sample(answer, latents, package)
        finally:
            server.terminate()
            server.communicate(timeout=300)
    ran = subprocess.run(command, cwd=REPOSITORY, env=path, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode != 0
    assert "which the server runs only if it is started with --allow-custom-decoders" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.slow
def test_check_says_whether_it_may_run_and_runs_it(package: Path) -> None:
    config = write_models_yaml(package / "models.yaml", {"m": entry(package)}, "m")
    path = f"{REPOSITORY}:{package}"
    ran = run("check", "--config", config, PYTHONPATH=path)
    assert ran.returncode == 1
    assert f"PROBLEM  m: decoder: my_decoders:{EXAMPLE} is code of an installed package" in ran.stdout
    ran = run("check", "--config", config, "--allow-custom-decoders", PYTHONPATH=path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "'m' decodes in" in ran.stdout
    ran = run("check", "--config", config, PYTHONPATH=path, VAE_SERVER_ALLOW_CUSTOM_DECODERS="1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    ran = run("check", "--config", config, "--allow-custom-decoders")
    assert "decoder: there is no module my_decoders in this Python; install the package" in ran.stdout


def test_without_the_flag_no_code_of_the_package_runs(package: Path, serve: Serve) -> None:
    (package / "my_decoders.py").write_text(f"open({str(package / 'ran')!r}, 'w')\n")
    said = refused(lambda: LoadedModels(settings(package, entry(package))).load("m"))
    assert said.endswith("which the server runs only if it is started with --allow-custom-decoders")
    address = serve({"sd": {"repo": str(REPOSITORY / "server" / "demo")}, "m": entry(package)})
    answer, _ = post(address + "m")
    assert answer.status_code == 503
    assert not (package / "ran").exists()


def test_work_that_nobody_waits_for_ends_between_the_layers(package: Path) -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Stopped

    coder = LoadedModels(settings(package, entry(package), **ALLOWED)).load("m").coder
    with pytest.raises(Stopped):
        coder.decode(torch.zeros(1, 4, 2, 2), Layout.PIXELS, check=check)


@pytest.mark.parametrize("name", WRONG)
def test_a_class_that_does_not_fit_is_one_sentence(name: str, package: Path) -> None:
    models = LoadedModels(settings(package, entry(package, f"my_decoders:{name}"), **ALLOWED))
    assert re.search(f"^m .*: decoder: .*{WRONG[name][1]}", refused(lambda: models.load("m")))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.at:All", "there is no module nowhere in this Python; install the package that has nowhere.at:All"),
        ("my_decoders.sub:All", "there is no module my_decoders.sub in this Python"),
        ("my_decoders:Missing", "my_decoders has no class Missing; check the name"),
        ("my_decoders:torch", "my_decoders has no class torch"),
        ("lacks_another:All", "lacks_another needs the module nowhere_at_all; install it too"),
        ("raises:All", "raises cannot be imported .OSError at raises.py:1: no licence"),
    ],
)
def test_a_class_that_is_not_there_is_one_sentence(name: str, words: str, package: Path) -> None:
    models = LoadedModels(settings(package, entry(package, name), **ALLOWED))
    assert re.search(f"^m .*: decoder: {words}", refused(lambda: models.load("m")))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"decoder": "fast"},
            "decoder: expected auto, diffusers, plain, or the class .* package.module:Class, got 'fast'",
        ),
        ({"decoder": "a.b:c()"}, "decoder: expected auto"),
        ({"decoder": "a:B", "tiling": "diffusers"}, "tiling is for diffusers' own decoder; leave it out beside"),
    ],
)
def test_an_entry_that_cannot_be_meant_is_one_sentence(keys: dict[str, str], words: str, package: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(package, {"repo": "x/y"} | keys)


def test_a_family_whose_statistics_are_among_the_weights_asks_the_class_for_them(package: Path) -> None:
    text = (
        example().replace("4", "128").replace("scale_factor=8", "scale_factor=(1, 32, 32)").replace("Conv2d", "Conv3d")
    )
    (package / "my_decoders.py").write_text(text.replace("        self.load_state_dict(load_file(weights))\n", ""))
    models = LoadedModels(settings(package, entry(package, config="ltx-2"), **ALLOWED))
    assert "lacks latents_mean, the statistics of the latents of the family ltx2" in refused(lambda: models.load("m"))
    with_them = "        self.latents_mean, self.latents_std = torch.zeros(128), torch.full((128,), 2.0)\n"
    (package / "my_decoders.py").write_text(
        text.replace("        self.load_state_dict(load_file(weights))\n", with_them)
    )
    sys.modules.pop("my_decoders")
    assert models.load("m").spec.latents_std == (2.0,) * 128
    assert models.holds(CoderId("m", Direction.DECODE))
