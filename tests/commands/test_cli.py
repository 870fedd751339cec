"""`python -m server` as a user runs it: exit statuses, one sentence and no traceback.

What a process adds nothing to is run in this one, because each process imports torch for seconds.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from click.testing import CliRunner
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors.torch import load_file, save_file

from server.commands import cli
from tests.conftest import REPOSITORY, write_models_yaml
from tests.engine.weights import original_names
from tests.vaes import LocalVae
from tests.waiting import PATIENCE_S

Vaes = dict[str, LocalVae]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "PYTHONWARNINGS": "error::FutureWarning"}


def run(*arguments: object, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **OFFLINE, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@dataclass(frozen=True)
class Ran:
    """What `run` returns, of a command that was run in this process."""

    returncode: int
    stdout: str
    stderr: str


def invoke(*arguments: object) -> Ran:
    ran = CliRunner().invoke(cli.main, [*map(str, arguments)])
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    return Ran(ran.exit_code, ran.stdout, ran.stderr)


def assert_one_sentence(ran: subprocess.CompletedProcess[str] | Ran, words: str, status: int) -> None:
    assert ran.returncode == status, ran.stderr
    assert "Traceback" not in ran.stderr
    errors = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ran.stderr
    assert re.search(words, errors[0]), errors[0]


def test_help_says_every_flag_and_variable_without_importing_torch() -> None:
    told = run("serve", "--help").stdout
    for flag in ("--host", "--port", "--device", "--config", "--max-queue", "--request-timeout-s", "--api-key-file"):
        assert flag in told
        assert f"VAE_SERVER_{flag[2:].replace('-', '_').upper()}" in told
    code = "import sys, server.commands.cli, server.web.routes; sys.exit(any(m in sys.modules for m in ('torch', 'diffusers')))"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


@pytest.mark.parametrize(
    ("arguments", "words", "status"),
    [
        (("serve", "--config", "/nowhere.yaml"), "/nowhere.yaml: no such file", 2),
        (("serve", "--port", "http"), "--port: expected a valid integer", 2),
        (("serve", "--device", "cuda:7"), "device cuda:7: this torch .* sees no CUDA device; use --device cpu", 2),
        (("serve", "nobody"), "no model 'nobody' in .*models.yaml; known: demo, sd-v1", 2),
        (("serve", "flux"), "flux .black-forest-labs/FLUX.1-schnell, subfolder vae.: .*HF_HUB_OFFLINE", 1),
        (("download", "sd-xl"), "sd-xl .madebyollin/sdxl-vae-fp16-fix.: .*not in this machine's cache", 1),
        (("decode", "/nowhere.safetensors", "x.png"), "/nowhere.safetensors: No such file", 2),
        (("decode", "README.md", "x.png"), "not a safetensors file", 2),
    ],
)
def test_a_mistake_is_one_sentence_and_no_traceback(arguments: tuple[str, ...], words: str, status: int) -> None:
    assert_one_sentence(run(*arguments), words, status)


def test_a_port_in_use_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ran = run("serve", "--port", taken.getsockname()[1])
    assert_one_sentence(ran, "cannot listen on 127.0.0.1:.* choose another --host or --port", 2)


def test_models_lists_what_is_here(models_yaml: Path) -> None:
    told = invoke("models", "--config", models_yaml).stdout
    assert re.search(
        r"^\* sd +.* \(also sd-v1\)\n +images, latents with 4 channels.*; weights on disk, \d+ MiB", told, re.MULTILINE
    )
    assert re.search(
        r"^  hunyuan .*\n +videos, latents with 16 channels, each latent pixel covers 8x8 pixels of 4 frames",
        told,
        re.MULTILINE,
    )


def test_models_lists_every_shipped_model_without_the_network() -> None:
    listed = json.loads(invoke("models", "--format", "json").stdout)
    assert len(listed) > 25
    for model in listed:
        assert all(model[key] for key in ("latents", "outputs", "class")), model["name"]
        assert bool(model["inputs"]) == (model["kind"] != "audio"), model["name"]
        assert model["weights"]["decoder_mb"] is not None, model["name"]
        assert (model["licence"] is None) == (model["name"] == "demo")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--kind", "preview", "taes"), {"taesd", "taesdxl", "taesd3"}),
        (("--kind", "preview", "wan"), {"taew2_1", "taew2_2"}),
        (("KREA",), {"qwen-image"}),
        (("--kind", "video", "ltx-2.5"), {"ltx-2.5", "ltx-2.5-diffusion"}),
        (("--kind", "image", "ltx"), set()),
    ],
)
def test_models_lists_some_of_them(arguments: tuple[str, ...], expected: set[str]) -> None:
    listed = json.loads(invoke("models", *arguments, "--format", "json").stdout)
    assert {model["name"] for model in listed} == expected


def test_models_lists_each_model_in_one_kind() -> None:
    kinds = [
        invoke("models", "--kind", kind, "--format", "markdown").stdout
        for kind in ("image", "video", "audio", "preview")
    ]
    assert "\n".join(kinds) == invoke("models", "--format", "markdown").stdout


def test_models_says_that_none_matches() -> None:
    assert_one_sentence(run("models", "nobody"), "no model of models.yaml matches; run", 1)


def test_check_finds_nothing_wrong_with_good_models(models_yaml: Path) -> None:
    ran = invoke("check", "--config", models_yaml)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for words in ("configuration", "device: cpu", "Pillow has jpg", "ffmpeg has libx264", "'sd' decodes in "):
        assert words in ran.stdout


def test_check_names_every_problem_and_exits_1(vaes: Vaes, tmp_path: Path) -> None:
    models: dict[str, Any] = {"lost": {"repo": "./nowhere"}, "good": {"repo": str(vaes["sd"].folder)}}
    models["later"] = {"repo": "owner/name"}
    models["odd"] = {"repo": "owner/name", "family": "klx"}
    models["gpu"] = {"repo": "owner/name", "device": "cuda:9"}
    ran = run(
        "check",
        "--config",
        write_models_yaml(tmp_path / "models.yaml", models, "lost"),
        IMAGEIO_FFMPEG_EXE="/bin/false",
    )
    assert_one_sentence(ran, "4 problems found", 1)
    assert re.search(r"^PROBLEM  .*there is no such file or folder", ran.stdout, re.MULTILINE)
    assert re.search(r"^PROBLEM  .*ffmpeg", ran.stdout, re.MULTILINE)
    assert re.search(r"^PROBLEM  odd: unknown family 'klx'", ran.stdout, re.MULTILINE)
    assert re.search(r"^PROBLEM  gpu: device cuda:9: this torch", ran.stdout, re.MULTILINE)
    assert re.search(r"^ok .*good: weights are on disk", ran.stdout, re.MULTILINE)
    assert re.search(r"^ok .*later: not downloaded;", ran.stdout, re.MULTILINE)


def test_download_of_a_local_folder_says_where_it_is(models_yaml: Path, vaes: Vaes) -> None:
    assert invoke("download", "sd", "--config", models_yaml).stdout == f"sd: {vaes['sd'].folder}\n"


@pytest.fixture
def latents_file(vaes: Vaes, tmp_path: Path) -> Path:
    path = tmp_path / "latents.safetensors"
    save_file({"latents": vaes["sd"].latents(8, 12).half()}, path)
    return path


def expected_pixels(vaes: Vaes, factor: float) -> np.ndarray:
    sample = vaes["sd"].decode(vaes["sd"].latents(8, 12).half().float() / factor)[0]
    return (sample / 2 + 0.5).clamp(0, 1).mul(255).round().permute(1, 2, 0).numpy()


def test_decode_in_process(models_yaml: Path, vaes: Vaes, latents_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    ran = invoke("decode", latents_file, out, "--config", models_yaml)
    assert ran.returncode == 0, ran.stderr
    assert np.abs(np.asarray(Image.open(out)).astype(int) - expected_pixels(vaes, 0.18215)).max() <= 1
    invoke("decode", latents_file, out, "--config", models_yaml, "--unscaled")
    assert np.abs(np.asarray(Image.open(out)).astype(int) - expected_pixels(vaes, 1)).max() <= 1


def test_a_comfyui_latent_is_decoded_unscaled(vaes: dict[str, LocalVae], tmp_path: Path) -> None:
    """Whatever --scaled says: the file says it itself."""
    latents = vaes["sd"].latents(8, 8)
    save_file({"latent_tensor": latents, "latent_format_version_0": torch.tensor([])}, tmp_path / "z.latent")
    save_file({"latents": latents}, tmp_path / "z.safetensors")
    (tmp_path / "models.yaml").write_text(f"models: {{sd: {{repo: '{vaes['sd'].folder}', dtype: float32}}}}")
    made = []
    for source, *flags in (("z.latent",), ("z.latent", "--scaled"), ("z.safetensors", "--unscaled")):
        out = tmp_path / "out.png"
        assert run("decode", tmp_path / source, out, "--config", tmp_path, *flags).returncode == 0
        made.append(out.read_bytes())
    assert made[0] == made[1] == made[2]


def test_decode_at_a_server(url: str, vaes: Vaes, latents_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    assert invoke("decode", latents_file, out, "--server", url).returncode == 0
    assert np.abs(np.asarray(Image.open(out)).astype(int) - expected_pixels(vaes, 0.18215)).max() <= 1
    assert invoke("decode", latents_file, tmp_path / "out.jpg", "--server", url, "--quality", "90").returncode == 0
    save_file({"video": vaes["hunyuan"].latents(2, 4, 4)}, latents_file)
    assert invoke("decode", latents_file, tmp_path / "out.mp4", "--server", url, "--model", "hunyuan").returncode == 0
    assert (tmp_path / "out.mp4").read_bytes()[4:8] == b"ftyp"
    assert_one_sentence(invoke("decode", latents_file, out, "--server", url), "this model takes latents", 2)
    assert_one_sentence(
        invoke("decode", latents_file, out, "--server", "http://127.0.0.1:9/"), "is the server running", 2
    )
    assert_one_sentence(invoke("decode", latents_file, out, "--server", "127.0.0.1:9"), "write http://127.0.0.1:9", 2)
    assert_one_sentence(invoke("decode", latents_file, tmp_path / "out.gif"), "use one of .jpg, .jpeg, .png, .mp4", 2)
    assert_one_sentence(
        invoke("decode", latents_file, out, "--key", "x"),
        "has no tensor 'x'; it has 'video'; choose one of them with --key",
        2,
    )


@pytest.mark.parametrize("options", [(), ("--unscaled",), ("--seed", "3", "--unscaled")])
@pytest.mark.parametrize("where", ["here", "there"])
def test_encode_a_picture_and_decode_it_again(
    url: str, models_yaml: Path, vaes: Vaes, tmp_path: Path, options: tuple[str, ...], where: str
) -> None:
    picture, latents, again = tmp_path / "in.png", tmp_path / "out.safetensors", tmp_path / "again.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)).save(picture)
    place = ("--config", models_yaml) if where == "here" else ("--server", url)
    ran = invoke("encode", picture, latents, *place, *options)
    assert ran.returncode == 0, ran.stderr
    with torch.no_grad(), Image.open(picture) as opened:
        posterior = vaes["sd"].module.encode(VaeImageProcessor().preprocess(opened)).latent_dist
    expected = posterior.sample(torch.Generator().manual_seed(3)) if "--seed" in options else posterior.mode()
    scale = 1 if "--unscaled" in options else 0.18215
    torch.testing.assert_close(load_file(latents)["latents"], expected * scale, atol=1e-4, rtol=0)
    assert invoke("decode", latents, again, *place, *options[-1:]).returncode == 0
    with Image.open(again) as opened:
        assert opened.size == (96, 64)


def test_encode_says_what_is_wrong_with_a_file(url: str, tmp_path: Path) -> None:
    out, text = tmp_path / "out.safetensors", tmp_path / "text.png"
    text.write_text("no picture")
    assert_one_sentence(
        invoke("encode", text, out, "--server", url), "the body is not a PNG, JPEG, WebP or MP4 file", 2
    )
    assert_one_sentence(invoke("encode", tmp_path / "none.png", out), "No such file", 2)


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_serve_one_model_at_the_root_until_a_signal(models_yaml: Path, vaes: Vaes, port: int) -> None:
    command = [sys.executable, "-m", "server", "serve", "flux", "--config", str(models_yaml), "--port", str(port)]
    server = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}/"
    assert server.stderr
    told = ""
    try:
        while "ready: " not in told:
            told += (line := server.stderr.readline())
            assert line, told
        latents = vaes["flux"].latents(8, 8)
        query: dict[str, Any] = {"shape": [1, 16, 8, 8], "dtype": "float32"}
        response = requests.post(url, params=query, data=latents.numpy().tobytes(), timeout=300)
        assert Image.open(io.BytesIO(response.content)).size == (64, 64)
        assert requests.post(url + "sd", params=query, timeout=300).status_code == 404
        assert requests.get(url + "models", timeout=300).json()["models"][0]["state"] == "loaded"
    finally:
        server.send_signal(signal.SIGTERM)
        told += server.communicate(timeout=300)[1]
    assert f"ready: {url} decodes with 'flux'" in told
    assert "Traceback" not in told
    assert server.returncode == 0


@pytest.fixture
def forms(vaes: Vaes, tmp_path: Path) -> Path:
    """One VAE in several forms: diffusers' folder, the variant fp16, an original file, a decoder, an encoder."""
    state, config = vaes["sd"].module.state_dict(), vaes["sd"].folder / "config.json"
    for name, file in (("plain", "diffusion_pytorch_model"), ("half", "diffusion_pytorch_model.fp16")):
        (tmp_path / name).mkdir()
        shutil.copy(config, tmp_path / name)
        save_file({key: value.half() for key, value in state.items()}, tmp_path / name / f"{file}.safetensors")
    renamed = {key: value.half().contiguous() for key, value in original_names.ldm(state).items()}
    for name, others in (("original", "-"), ("decoder", "encoder."), ("encoder", "decoder.")):
        kept = {f"first_stage_model.{key}": value for key, value in renamed.items() if not key.startswith(others)}
        save_file(kept, tmp_path / f"{name}.safetensors")
    return tmp_path


def test_serve_paths_of_several_forms(forms: Path, vaes: Vaes, port: int) -> None:
    words = ["./plain", "half", "original.safetensors", "decoder.safetensors", "encoder.safetensors"]
    command = [sys.executable, "-m", "server", "serve", *words, "--vae-config", "plain/config.json"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "VAE_SERVER_DTYPE": "float32"}
    server = subprocess.Popen(
        [*command, "--port", str(port)], cwd=forms, env=environment, stderr=subprocess.PIPE, text=True
    )
    url = f"http://127.0.0.1:{port}/"
    assert server.stderr
    told = ""
    try:
        while "ready: " not in told:
            told += (line := server.stderr.readline())
            assert line, told
        latents = vaes["sd"].latents(8, 8)
        query: dict[str, Any] = {"shape": [1, 4, 8, 8], "dtype": "float32", "output_type": "pt"}
        data = latents.numpy().tobytes()
        answers = {
            name: requests.post(url + name, params=query, data=data, timeout=300)
            for name in ("", "half", "original", "decoder", "encoder")
        }
        assert {name: answer.status_code for name, answer in answers.items()} == {
            **dict.fromkeys(("", "half", "original", "decoder"), 200),
            "encoder": 422,
        }
        assert len({answers[name].content for name in ("", "half", "original", "decoder")}) == 1
        assert "are only an encoder, without the decoder, so it cannot decode" in answers["encoder"].json()["error"]
        pixels = {"shape": [1, 3, 16, 16], "dtype": "uint8"}
        encoded = {
            name: requests.post(f"{url}{name}/encode", params=pixels, data=bytes(768), timeout=300).status_code
            for name in ("original", "decoder", "encoder")
        }
        assert encoded == {"original": 200, "decoder": 422, "encoder": 200}
        listed = {model["name"]: model for model in requests.get(url + "models", timeout=300).json()["models"]}
        assert listed["decoder"]["directions"] == ["decode"]
        assert (listed["plain"]["repo"], listed["original"]["repo"]) == ("a local folder", "a local file")
    finally:
        server.send_signal(signal.SIGTERM)
        told += server.communicate(timeout=300)[1]
    assert server.returncode == 0, told


def test_check_of_each_form(forms: Path) -> None:
    names = [forms / "half", forms / "original.safetensors", forms / "encoder.safetensors"]
    ran = invoke("check", *names, "--vae-config", forms / "plain")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "'half' decodes in" in ran.stdout
    assert "'original' decodes in" in ran.stdout
    assert "4 channels, only to encode\n" in ran.stdout
    assert "'encoder' encodes in" in ran.stdout


def test_a_signal_during_the_start_ends_it(models_yaml: Path) -> None:
    for ending in (signal.SIGTERM, signal.SIGINT):
        command = [
            sys.executable,
            "-X",
            "importtime",
            "-m",
            "server",
            "serve",
            "--port",
            "0",
            "--config",
            str(models_yaml),
        ]
        server = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        assert server.stderr
        while "uvicorn" not in server.stderr.readline():
            pass  # the flags are read and the heavy imports under way
        server.send_signal(ending)
        told = server.communicate(timeout=300)[1]
        assert server.returncode == 0
        assert "Traceback" not in told


def test_serve_reads_the_offline_hub_cache(vaes: Vaes, tmp_path: Path) -> None:
    from tests.engine.weights.test_loading import hub_cache

    hub_cache(tmp_path / "hub", "owner/name", vaes["sd"].folder, "vae")
    models = {"hubbed": {"repo": "owner/name", "subfolder": "vae"}}
    config = write_models_yaml(tmp_path / "models.yaml", models, "hubbed")
    ran = run("check", "--config", config, HF_HOME=str(tmp_path))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "'hubbed' decodes" in ran.stdout
    assert run("download", "--config", config, HF_HOME=str(tmp_path)).returncode == 0
