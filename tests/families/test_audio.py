"""Audio through the server, as a user sends it, against the waveform of the real pipeline."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import wave
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from numpy.typing import NDArray
from safetensors.torch import save

from server.config import load_settings
from tests.conftest import REPOSITORY, running, write_models_yaml
from tests.pipelines import vaes
from tests.pipelines.sample import noise
from tests.pipelines.sounds import SOUNDS, Sound, oobleck

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_core")]
BINARY = {"Content-Type": "application/octet-stream"}
sound = cache(lambda name: SOUNDS[name]())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audio")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    models: dict[str, Any] = {}
    for name in SOUNDS:
        found: Sound = sound(name)
        models[name] = {"repo": str(found.save(folder / name)), "family": found.family}
    oobleck().save_pretrained(folder / "short")
    models["short"] = {"repo": str(folder / "short"), "limits": {"max_seconds": 1, "max_batch": 2}}
    shutil.copytree(folder / "ltx2-audio" / "audio_vae", folder / "alone" / "audio_vae")
    models["alone"] = {"repo": str(folder / "alone"), "subfolder": "audio_vae"}
    vaes.wan().save_pretrained(folder / "wan")
    oobleck(sampling_rate=16000).save_pretrained(folder / "music")
    models |= {"music": {"repo": str(folder / "music")}, "wan": {"repo": str(folder / "wan"), "audio": "music"}}
    models["mute"] = {"repo": str(folder / "wan"), "audio": "alone"}
    models["drawn"] = {"repo": str(folder / "wan"), "audio": "wan"}
    models["silent"] = {"repo": str(folder / "wan")}
    with running(load_settings(config=write_models_yaml(folder / "models.yaml", models, "short"))) as url:
        yield url


def ask(address: str, name: str, latents: torch.Tensor, **query: Any) -> requests.Response:
    query |= {"shape": list(latents.shape), "dtype": str(latents.dtype).removeprefix("torch.")}
    data = latents.contiguous().numpy().tobytes()
    return requests.post(address + name, params=query, data=data, headers=BINARY, timeout=300)


def tensor(answer: requests.Response) -> torch.Tensor:
    assert answer.status_code == 200, answer.text
    shape = [int(size) for size in answer.headers["shape"].strip("[]").split(",")]
    assert answer.headers["dtype"] == "float32"
    return torch.frombuffer(bytearray(answer.content), dtype=torch.float32).reshape(shape)


def samples(wav: bytes) -> tuple[int, NDArray[np.int16]]:
    """The rate and the samples `[n, channels]` of a WAV file."""
    with wave.open(io.BytesIO(wav)) as file:
        assert file.getsampwidth() == 2
        values = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return file.getframerate(), values.reshape(-1, file.getnchannels())


@pytest.mark.parametrize("name", SOUNDS)
def test_a_pipelines_latents_become_its_waveform(address: str, name: str) -> None:
    found = sound(name)
    answer = tensor(ask(address, name, found.latents, output_type="pt", do_scaling=found.is_scaled))
    assert found.waveform.std() > 0.05
    torch.testing.assert_close(answer, found.waveform, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SOUNDS)
def test_a_wav_holds_the_waveform(address: str, name: str) -> None:
    found = sound(name)
    answer = ask(address, name, found.latents, do_scaling=found.is_scaled)  # WAV is what audio is answered with
    assert (answer.status_code, answer.headers["content-type"]) == (200, "audio/wav"), answer.text
    rate, values = samples(answer.content)
    expected = (found.waveform[0].T.clamp(-1, 1) * 32767).round().numpy()
    assert rate == found.sampling_rate
    assert np.abs(values - expected).max() <= 4  # 1e-4 of full scale


@pytest.mark.parametrize("query", [{"output_type": "flac"}, {}])
def test_a_flac_holds_the_samples_of_the_wav(address: str, query: dict[str, str]) -> None:
    latents = sound("ace-step").latents
    wav = ask(address, "ace-step", latents, output_type="wav").content
    accept = {} if query else {"Accept": "audio/flac"}
    params = {"shape": list(latents.shape), "dtype": "float32", **query}
    data = latents.numpy().tobytes()
    flac = requests.post(address + "ace-step", params=params, data=data, headers=BINARY | accept, timeout=300)
    samples_in_header = int.from_bytes(flac.content[21:26], "big") & (1 << 36) - 1
    assert samples_in_header == len(samples(wav)[1])
    assert (flac.content[:4], flac.headers["content-type"]) == (b"fLaC", "audio/flac")
    command = [get_ffmpeg_exe(), "-v", "error", "-i", "pipe:0", "-f", "s16le", "pipe:1"]
    raw = subprocess.run(command, input=flac.content, capture_output=True, check=True).stdout
    assert np.array_equal(np.frombuffer(raw, "<i2").reshape(-1, 2), samples(wav)[1])


def test_a_safetensors_file_and_both_orders_of_axes(address: str) -> None:
    found = sound("stable-audio")
    expected = tensor(ask(address, "stable-audio", found.latents, output_type="pt"))
    file = save({"latents": found.latents.contiguous()})
    by_file = requests.post(f"{address}stable-audio?output_type=pt", data=file, headers=BINARY, timeout=300)
    assert torch.equal(tensor(by_file), expected)
    assert torch.equal(tensor(ask(address, "stable-audio", found.latents.transpose(1, 2), output_type="pt")), expected)
    assert torch.equal(tensor(ask(address, "stable-audio", found.latents[0], output_type="pt")), expected)


def test_mono_and_batches(address: str) -> None:
    found = sound("minimax-h3-audio")
    left = tensor(ask(address, "minimax-h3-audio", found.latents[:1], output_type="pt", do_scaling=True))
    torch.testing.assert_close(left, found.waveform[:, :1], atol=1e-4, rtol=1e-4)
    latents = torch.cat([sound("stable-audio").latents] * 2)
    both = tensor(ask(address, "short", latents, output_type="pt"))
    assert torch.equal(both[0], both[1])


def test_a_long_sound_is_decoded_in_parts_that_fit_exactly(folder: Path, address: str) -> None:
    latents = noise(1, 6, 2500)
    answer = tensor(ask(address, "music", latents, output_type="pt"))
    with torch.inference_mode():
        expected = oobleck(sampling_rate=16000).decode(latents).sample
    assert expected.shape[2] == 8 * 2500
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)


REFUSED: dict[str, tuple[str, tuple[int, ...], dict[str, Any], int, str]] = {
    "an image of audio": (
        "short",
        (1, 6, 12),
        {"output_type": "pil"},
        406,
        "decodes audio; send output_type=wav, flac",
    ),
    "a video of audio": ("short", (1, 6, 12), {"output_type": "mp4"}, 406, "decodes audio; send output_type=wav, flac"),
    "a stream of audio": ("short", (1, 6, 12), {"stream": True}, 422, "send output_type=mp4 to a video model"),
    "image latents": ("short", (1, 6, 12, 12), {}, 400, "has 4 dimensions; this model takes audio latents [B, 6, L]"),
    "other channels": ("short", (1, 5, 12), {}, 400, "is not audio latents of this model, [B, 6, L]"),
    "two in one file": ("short", (2, 6, 12), {}, 422, "a batch of 2 does not fit one WAV"),
    "a long one": ("short", (1, 6, 126), {}, 413, "are 1.01 seconds of audio, but 'short' takes at most 1"),
    "two sounds of H3": ("minimax-h3-audio", (4, 4, 9), {}, 400, "one request holds one sound"),
    "other rows": ("ltx2-audio", (1, 2, 9, 3), {}, 400, "is not audio latents of this model, [B, 2, L, 2], or packed"),
    "without the vocoder": ("alone", (1, 2, 9, 2), {}, 503, "'alone' cannot be loaded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_decoded_is_refused(address: str, case: str) -> None:
    name, shape, query, status, said = REFUSED[case]
    answer = ask(address, name, torch.zeros(shape), **query)
    assert (answer.status_code, said in answer.json()["error"]) == (status, True), answer.text


BOTH = {"latents": noise(1, 16, 5, 4, 4), "audio_latents": noise(1, 6, 3400)}  # 1.7 s of each at 10 and 16000 Hz


def ffmpeg(data: bytes, *arguments: str) -> bytes:
    command = [get_ffmpeg_exe(), "-v", "error", "-i", "pipe:0", *arguments, "pipe:1"]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


def test_a_video_with_sound(address: str) -> None:
    mp4, alone = (
        requests.post(f"{address}wan?output_type=mp4&fps=10", data=save(tensors), headers=BINARY, timeout=300)
        for tensors in (BOTH, {"latents": BOTH["latents"]})
    )
    assert (mp4.status_code, mp4.headers["content-type"]) == (200, "video/mp4"), mp4.text
    frames = [ffmpeg(each.content, "-map", "0:v", "-c", "copy", "-f", "h264") for each in (mp4, alone)]
    assert frames[0] == frames[1]
    raw = ffmpeg(mp4.content, "-map", "0:a", "-ac", "2", "-ar", "16000", "-f", "s16le")
    _, expected = samples(ask(address, "music", BOTH["audio_latents"]).content)
    found = np.frombuffer(raw, "<i2").reshape(-1, 2)[: len(expected)]
    assert abs(len(found) - len(expected)) < 2048  # AAC has blocks of 1024
    likeness = np.corrcoef(found[:, 0], expected[: len(found), 0])[0, 1]
    assert likeness > 0.9


def test_a_video_without_sound_needs_no_audio_model(address: str) -> None:
    answer = requests.post(f"{address}mute?output_type=mp4", data=save({"latents": BOTH["latents"]}), timeout=300)
    assert answer.status_code == 200, answer.text
    both = requests.post(f"{address}mute?output_type=mp4", data=save(BOTH), timeout=300)
    assert both.status_code == 503


@pytest.mark.parametrize("is_here", [True, False])
def test_the_command_sends_the_whole_file_for_a_video_with_sound(
    address: str, folder: Path, tmp_path: Path, is_here: bool
) -> None:
    (tmp_path / "both.safetensors").write_bytes(save(BOTH))
    place = ["--no-server", "--config", str(folder / "models.yaml")] if is_here else ["--server", address]
    command = [sys.executable, "-m", "server", "decode", "both.safetensors", "out.mp4", "--model", "wan", *place]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    if is_here:
        assert (ran.returncode, "decoded by a running server only" in ran.stderr) == (1, True), ran.stderr
    else:
        assert ran.returncode == 0, ran.stderr
        assert ffmpeg((tmp_path / "out.mp4").read_bytes(), "-map", "0:a", "-f", "s16le")


WITHOUT_SOUND: dict[str, tuple[str, dict[str, torch.Tensor], str]] = {
    "no audio model": ("silent?output_type=mp4", BOTH, "'silent' has no audio model"),
    "no audio model under that name": ("drawn?output_type=mp4", BOTH, "'drawn' names 'wan' as its audio model"),
    "factors": ("wan?output_type=mp4&scaling_factor=1", BOTH, "hold for one tensor"),
    "a tensor": ("wan?output_type=pt", BOTH, "only a whole MP4 holds sound beside a video"),
    "a stream": ("wan?output_type=mp4&stream=True", BOTH, "only a whole MP4 holds sound beside a video"),
    "other channels": (
        "wan?output_type=mp4",
        BOTH | {"audio_latents": noise(1, 5, 9)},
        "audio_latents: shape 1x5x9 is not audio latents",
    ),
}


@pytest.mark.parametrize("case", WITHOUT_SOUND)
def test_sound_that_cannot_be_answered_is_refused(address: str, case: str) -> None:
    path, tensors, said = WITHOUT_SOUND[case]
    answer = requests.post(address + path, data=save(tensors), headers=BINARY, timeout=300)
    assert (answer.status_code, said in answer.json()["error"]) == (
        400 if case in ("factors", "other channels") else 422,
        True,
    ), answer.text


def test_audio_is_not_encoded(address: str) -> None:
    answer = requests.post(f"{address}short/encode", data=b"RIFF", timeout=300)
    assert answer.status_code == 422
    assert "decodes audio but does not encode it" in answer.json()["error"]


def test_models_are_listed_as_audio(address: str) -> None:
    listed = {each["name"]: each for each in requests.get(f"{address}models?kind=audio", timeout=300).json()["models"]}
    assert listed.keys() == SOUNDS.keys() | {"short", "music"}
    entry = listed["ltx2.3-audio"]
    assert entry["directions"] == ["decode"]
    assert entry["outputs"][:2] == ["audio/wav", "audio/x-wav"]
    assert entry["latents"]["sampling_rate"] == 1200
    assert entry["config"]["vocoder"]["_class_name"] == "LTX2VocoderWithBWE"
