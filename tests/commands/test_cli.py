"""`python -m server` as a user runs it: exit statuses, one sentence and no traceback.

What a process adds nothing to is run in this one, because each process imports torch for seconds.
"""

from __future__ import annotations

import http.server
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
import trustme
from click.testing import CliRunner
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors.torch import load_file, save_file

from server.commands import cli, flags
from server.commands.servers import find
from server.commands.serving import announce
from server.config import ServerOptions, load_settings
from tests.conftest import REPOSITORY, Serve, write_models_yaml
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


COMMANDS = ["serve", "models", "check", "download", "decode", "encode", "completion"]


def test_help_lists_the_commands_in_the_order_of_use() -> None:
    shown = invoke("--help").stdout
    listed = shown.split("Commands:")[1].split("Examples:")[0]
    assert re.findall(r"^  (\w+)  ", listed, re.MULTILINE) == COMMANDS
    assert "..." not in listed, "every summary fits its line"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_groups_and_examples_that_it_understands(command: str) -> None:
    shown = invoke(command, "--help").stdout
    options, examples = shown.split("Examples:\n")
    (others,) = re.findall(r"^Other options:\n((?:  .*\n)+)", options, re.MULTILINE)
    assert re.findall(r"--[\w-]+", others) == ["--help"], "every other option has a group"
    for line in examples.strip().splitlines():
        _, name, *words = line.split(" > ")[0].split(" >> ")[0].split()
        assert name == command
        cli.main.commands[command].make_context(command, words)  # raises for an unknown option or a wrong value


def test_every_option_of_serve_has_one_group() -> None:
    grouped = [name for names in flags.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(ServerOptions.model_fields.keys() - {"api_key"})


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


def test_models_lists_what_is_here_in_a_table(models_yaml: Path) -> None:
    head, *rows = invoke("models", "--config", models_yaml).stdout.splitlines()
    starts = [found.start() for found in re.finditer(r"(?<=  )\S", head)]
    cells = {}
    for row in rows:
        texts = [row[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
        cells[texts[0]] = texts
    assert re.fullmatch(r"sd image '4 channels' '8x8' 'on disk, \d+ MiB'", told(cells["sd"]))
    assert re.fullmatch(r"hunyuan video '16 channels' '8x8, 4 frames' 'on disk, \d+ MiB'", told(cells["hunyuan"]))
    assert [row.split()[1] for row in rows if row.startswith("*")] == ["sd"], "the default model"


def told(cells: list[str]) -> str:
    name, kind, *others = cells
    return " ".join([name, kind, *(repr(text) for text in others if text)])


@pytest.mark.parametrize("word", ["flux", "H1"])
def test_models_shows_one_model_by_its_name_or_an_alias(word: str) -> None:
    shown = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in invoke("models", word).stdout.splitlines()[1:])
    assert shown["repository"] == "black-forest-labs/FLUX.1-schnell, subfolder vae"
    assert shown["latents"] == "16 channels, packed; a latent pixel is 8x8"
    assert shown["scaling"] == "scaling_factor 0.3611, shift_factor 0.1159"
    assert shown["licence"] == "Apache-2.0; gated: accept it on the Hub, then set HF_TOKEN"
    assert shown["weights"] == "at most 319 MiB to download; run `python -m server download flux`"
    assert [model["name"] for model in json.loads(invoke("models", word, "--json").stdout)] == ["flux"]


def test_models_says_what_it_does_not_know(tmp_path: Path) -> None:
    config = write_models_yaml(
        tmp_path / "models.yaml",
        {"odd": {"repo": "owner/name"}, "own": {"repo": "owner/name", "decoder": "package.module:Class"}},
        "odd",
    )
    rows = [re.split(r"  +", line) for line in invoke("models", "--config", config).stdout.splitlines()]
    assert rows[1:] == [["*", "odd", *("?" * 3), "not downloaded", "?"], ["", "own", *("?" * 3), "not allowed", "?"]]
    assert (
        "its config.json is not on this machine; run `python -m server download odd`"
        in invoke("models", "odd", "--config", config).stdout
    )
    assert "--allow-custom-decoders" in invoke("models", "own", "--config", config).stdout


def test_models_imports_no_torch(models_yaml: Path) -> None:
    """Whatever is on disk: importing torch and diffusers takes seconds."""
    code = f"""
import sys
from server.commands.cli import main
for words in (["models"], ["models", "flux"], ["models", "--config", {str(models_yaml)!r}, "--json"]):
    main(words, standalone_mode=False)
print(*sorted({{"torch", "diffusers", "transformers", "accelerate"}} & sys.modules.keys()), file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ran.stderr.strip() == ""
    assert ran.stdout.count("flux") > 1


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


def test_check_finds_an_audio_model_that_is_none(vaes: dict[str, LocalVae], tmp_path: Path) -> None:
    models = {"hunyuan": {"repo": str(vaes["hunyuan"].folder), "audio": "sd"}, "sd": {"repo": str(vaes["sd"].folder)}}
    ran = invoke("check", "--config", write_models_yaml(tmp_path / "models.yaml", models, "sd"))
    assert ran.returncode == 1
    assert "hunyuan: audio: 'sd' is a model of images; name an audio model" in ran.stdout


def test_models_says_that_none_matches() -> None:
    assert_one_sentence(run("models", "nobody"), "no model of models.yaml matches; run", 1)


def test_check_finds_nothing_wrong_with_good_models(models_yaml: Path) -> None:
    ran = invoke("check", "--config", models_yaml)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for words in ("configuration", "device: cpu", "Pillow has jpg", "ffmpeg has libx264", "'sd' decodes in "):
        assert words in ran.stdout


def test_check_tells_scripts_in_json(vaes: Vaes, tmp_path: Path) -> None:
    models = {"lost": {"repo": "./nowhere"}, "good": {"repo": str(vaes["sd"].folder)}}
    ran = invoke("check", "--json", "--config", write_models_yaml(tmp_path / "models.yaml", models, "good"))
    findings = json.loads(ran.stdout)
    assert ran.returncode == 1
    assert [finding["text"][:5] for finding in findings if finding["is_problem"]] == ["lost "]
    assert any("'good' decodes in" in finding["text"] for finding in findings)


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
    for source, *words in (("z.latent",), ("z.latent", "--scaled"), ("z.safetensors", "--unscaled")):
        out = tmp_path / "out.png"
        assert run("decode", tmp_path / source, out, "--config", tmp_path, *words).returncode == 0
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


def port_of(url: str) -> str:
    return url.rstrip("/").rpartition(":")[2]


def test_a_server_on_this_machine_is_used_if_it_has_the_model(
    url: str, models_yaml: Path, latents_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAE_SERVER_PORT", port_of(url))
    out, again = tmp_path / "out.png", tmp_path / "again.safetensors"
    shown = invoke("decode", latents_file, out).stdout
    assert re.fullmatch(rf"{out}: 96x64 pixels, \d+ bytes, [\d.]+ s by sd at {url}\n", shown)
    assert json.loads(invoke("decode", latents_file, out, "--model", "SD-V1", "--json").stdout)["model"] == "sd"
    shown = invoke("encode", out, again).stdout
    assert re.fullmatch(rf"{again}: latents 1x4x8x12 float32, \d+ bytes, [\d.]+ s by sd at {url}\n", shown)
    # Without its default model, with options for this process, and on request, it is not used.
    for words in (("--model", "demo"), ("--config", models_yaml), ("--no-server",)):
        told = json.loads(invoke("decode", latents_file, out, *words, "--json").stdout)
        assert told["server"] is None, words
    save_file({"latents": torch.zeros(1, 5, 8, 8)}, latents_file)
    assert_one_sentence(
        invoke("decode", latents_file, out), "the latents have 5 channels.*; without this server: --no-server", 2
    )
    assert_one_sentence(invoke("decode", latents_file, out, "--server", url, "--no-server"), "exclude each other", 2)


@pytest.mark.parametrize(
    "body", [b"Ok", b"[]", b'{"models": 3, "default": "sd"}', b'{"models": [{}], "default": "sd"}']
)
def test_another_program_at_the_port_is_not_used(body: bytes) -> None:
    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as other:
        threading.Thread(target=other.serve_forever).start()
        try:
            assert find(other.server_port, None) is None
            assert find(other.server_port, "sd") is None
        finally:
            other.shutdown()


def test_a_server_that_asks_for_a_key_is_not_used(serve: Serve, vaes: Vaes) -> None:
    address = serve({"sd": {"repo": str(vaes["sd"].folder)}}, api_key="secret")
    assert find(int(port_of(address)), None) is None


def test_a_server_on_this_machine_with_a_certificate_is_used_if_that_is_trusted(
    serve: Serve, vaes: Vaes, latents_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    issuer, certificate, out = tmp_path / "issuer", tmp_path / "certificate", tmp_path / "out.png"
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(issuer))
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(certificate))
    address = serve({"sd": {"repo": str(vaes["sd"].folder), "dtype": "float32"}}, tls_cert=certificate)
    monkeypatch.setenv("VAE_SERVER_PORT", port_of(address))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(issuer))
    shown = invoke("decode", latents_file, out).stdout
    assert re.fullmatch(rf"{out}: 96x64 pixels, \d+ bytes, [\d.]+ s by sd at {address}\n", shown)
    assert f" by sd at {address}" in invoke("encode", out, tmp_path / "again.safetensors").stdout
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    refused = invoke("decode", latents_file, out)
    assert_one_sentence(refused, "not trusted here.* set REQUESTS_CA_BUNDLE to .*; without this server: --no-server", 2)
    assert_one_sentence(invoke("decode", latents_file, out, "--server", address), "set REQUESTS_CA_BUNDLE", 2)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "missing.pem"))
    for named in ((), ("--server", address)):
        unread = invoke("decode", latents_file, out, *named)
        assert_one_sentence(unread, "REQUESTS_CA_BUNDLE: set it to a file with certificates, or unset it", 2)
    monkeypatch.setenv("VAE_SERVER_PORT", "1")
    assert invoke("decode", latents_file, out).returncode == 0, "where no server runs, it does not matter"
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    assert find(int(port_of(address)), "another-model") is None, "then its certificate does not matter"


def test_a_key_in_the_address_is_sent_and_not_shown(
    serve: Serve, vaes: Vaes, latents_file: Path, tmp_path: Path
) -> None:
    address = serve({"sd": {"repo": str(vaes["sd"].folder)}}, api_key="secret").replace("//", "//user:secret@")
    ran = invoke("decode", latents_file, tmp_path / "out.png", "--server", address)
    assert ran.returncode == 0, ran.stderr
    refused = invoke("decode", latents_file, tmp_path / "out.png", "--server", address.replace("secret", "hidden"))
    assert refused.returncode == 2
    assert not any(word in ran.stdout + refused.stderr for word in ("secret", "hidden"))


def test_json_says_what_was_made(url: str, models_yaml: Path, vaes: Vaes, tmp_path: Path) -> None:
    source, out = tmp_path / "video.safetensors", tmp_path / "out.mp4"
    save_file({"latents": vaes["hunyuan"].latents(2, 4, 6)}, source)
    ran = invoke("decode", source, out, "--model", "hunyuan", "--server", url, "--json")
    made = json.loads(ran.stdout)
    assert made.pop("seconds") > 0
    expected = {"file": str(out), "bytes": out.stat().st_size, "width": 48, "height": 32, "frames": 5}
    assert made == {**expected, "model": "hunyuan", "server": url}
    latents = tmp_path / "again.safetensors"
    made = json.loads(invoke("encode", out, latents, "--model", "hunyuan", "--config", models_yaml, "--json").stdout)
    assert (made["shape"], made["dtype"], made["server"]) == ([1, 16, 2, 4, 6], "float32", None)
    assert made["bytes"] == latents.stat().st_size


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


def test_encode_writes_only_files_of_latents(url: str, tmp_path: Path) -> None:
    picture = tmp_path / "in.png"
    Image.new("RGB", (64, 64)).save(picture)
    for suffix in (".png", ".latent", ""):
        out = tmp_path / f"out{suffix}"
        ran = invoke("encode", picture, out, "--server", url)
        assert_one_sentence(ran, f"'{suffix}' is not a format that encode writes; use .safetensors or .sft", 2)
        assert not out.exists()
    assert invoke("encode", picture, tmp_path / "out.SFT", "--server", url).returncode == 0


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


@pytest.mark.parametrize(("certificate", "scheme"), [(None, "http"), (Path("cert.pem"), "https")])
def test_the_address_that_is_told_has_the_right_scheme(
    certificate: Path | None, scheme: str, models_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = load_settings(config=models_yaml)
    options = settings.options.model_copy(update={"tls_cert": certificate})
    with socket.create_server(("127.0.0.1", 0)) as listener:
        announce(settings.model_copy(update={"options": options}), listener)
        expected = f"ready: {scheme}://127.0.0.1:{listener.getsockname()[1]}/ decodes with 'sd'\n"
    assert capsys.readouterr().err.startswith(expected)


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
