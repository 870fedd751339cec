"""`stream=True`: the first fragments of a video arrive while later frames are decoded, and a stream that breaks is seen."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
import requests

from server.config import load_settings
from server.engine.video_render import VideoRender
from server.inprocess.direct import Direct
from tests.conftest import Serve, write_models_yaml
from tests.vaes import LocalVae
from tests.waiting import PATIENCE_S, until

FRAMES = 17
HALF = 9  # a test holds the decode back, or breaks it, once this many frames are done


@pytest.fixture
def url(serve: Serve, vaes: dict[str, LocalVae]) -> str:
    return serve({name: {"repo": str(vaes[name].folder)} for name in ("hunyuan", "sd")})


def post(url: str, vaes: dict[str, LocalVae], headers: Any = None, **query: Any) -> requests.Response:
    latents = vaes["hunyuan"].latents(5, 4, 6)
    sent = {"shape": list(latents.shape), "dtype": "float32", "output_type": "mp4", "stream": True, **query}
    body = latents.numpy().tobytes()
    return requests.post(url, body, params=sent, headers=headers, stream=True, timeout=PATIENCE_S)


def metric(url: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", requests.get(url + "metrics", timeout=PATIENCE_S).text, re.M)
    return float(found[1]) if found else 0.0


def frames_of(mp4: bytes, folder: Path) -> list[str]:
    """The checksum of each frame that ffmpeg shows."""
    path = folder / "video.mp4"
    path.write_bytes(mp4)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-f", "framemd5", "-"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in told.splitlines() if not line.startswith("#")]


def read_until_a_fragment(pieces: Iterator[bytes]) -> bytes:
    got = b""
    while b"mdat" not in got:
        got += next(pieces)
    return got


def test_fragments_arrive_while_later_frames_are_decoded(
    url: str, vaes: dict[str, LocalVae], held_video: threading.Event, tmp_path: Path
) -> None:
    answer = post(url, vaes)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    assert "content-length" not in answer.headers
    pieces = answer.iter_content(None)
    got = read_until_a_fragment(pieces)
    assert not held_video.is_set()
    held_video.set()
    got += b"".join(pieces)
    assert len(frames_of(got, tmp_path)) == FRAMES
    assert got.count(b"moof") == FRAMES


@pytest.mark.parametrize(
    ("query", "accept"),
    [
        ({"stream": None}, "video/mp4; profile=fragmented"),
        ({"stream": None}, 'video/mp4;profile="fragmented"'),
        ({}, "*/*"),
    ],
)
def test_it_is_asked_for_in_the_query_or_in_accept(
    url: str, vaes: dict[str, LocalVae], query: Any, accept: str
) -> None:
    assert b"moof" in post(url, vaes, {"Accept": accept}, **query).content
    assert b"moof" not in post(url, vaes, stream=False).content


def test_a_picture_is_not_streamed(url: str, vaes: dict[str, LocalVae]) -> None:
    latents = vaes["sd"].latents(8, 8)
    for output_type in ("pil", "pt"):
        sent = {"shape": list(latents.shape), "dtype": "float32", "output_type": output_type, "stream": True}
        answer = requests.post(url + "sd", latents.numpy().tobytes(), params=sent, timeout=PATIENCE_S)
        assert answer.status_code == 422
        assert "stream=True answers a video as an MP4" in answer.json()["error"]
    answer = post(url, vaes, stream="maybe")
    assert answer.status_code == 400


def test_an_error_before_the_first_piece_has_its_own_status(
    url: str, vaes: dict[str, LocalVae], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(self: Any, frames: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(VideoRender, "write", breaks)
    answer = post(url, vaes)
    assert answer.status_code == 500
    assert answer.json()["code"] == "internal"


def test_a_stream_that_breaks_ends_without_its_last_chunk(
    url: str, vaes: dict[str, LocalVae], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write, reached, done = VideoRender.write, threading.Event(), 0

    def breaks(self: Any, frames: Any) -> None:
        nonlocal done
        done += len(frames)
        write(self, frames)
        if done >= HALF:
            assert reached.wait(PATIENCE_S)
            raise ZeroDivisionError

    monkeypatch.setattr(VideoRender, "write", breaks)
    pieces = post(url, vaes).iter_content(None)
    read_until_a_fragment(pieces)
    reached.set()
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        b"".join(pieces)
    until(lambda: "a streamed answer broke off" in caplog.text, "the warning")
    assert requests.get(url + "health", timeout=PATIENCE_S).ok


def test_a_deadline_that_passes_breaks_the_stream(
    url: str, vaes: dict[str, LocalVae], held_video: threading.Event
) -> None:
    for patience_s in (2, 8, 32, 128):  # a busy machine may need more time until the first fragment
        answer = post(url, vaes, {"X-Request-Timeout": str(patience_s)})
        if answer.status_code == 200:
            break
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        b"".join(answer.iter_content(None))


def test_a_client_that_leaves_ends_its_own_decode_and_no_other(
    url: str, vaes: dict[str, LocalVae], held_video: threading.Event
) -> None:
    answer = post(url, vaes)
    read_until_a_fragment(answer.iter_content(None))
    answer.close()
    until(lambda: metric(url, 'vae_cancelled_total{stage="running"}') == 1, "the end of the request")
    held_video.set()
    assert b"moof" in post(url, vaes).content


def test_without_a_server_it_is_the_whole_file(vaes: dict[str, LocalVae], tmp_path: Path) -> None:
    config = write_models_yaml(tmp_path / "models.yaml", {"hunyuan": {"repo": str(vaes["hunyuan"].folder)}}, "hunyuan")
    latents = vaes["hunyuan"].latents(5, 4, 6)
    sent = {"shape": list(latents.shape), "dtype": "float32", "output_type": "mp4", "stream": True}
    direct = Direct(load_settings(config=config))
    request = direct.parse("hunyuan", sent, latents.numpy().tobytes(), "*/*")
    assert len(frames_of(bytes(direct.render(request, direct.run(request)).body), tmp_path)) == FRAMES
