"""MP4 to pixels: upright, the frames that a player shows, by an ffmpeg that may take little and never stays."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import psutil
import pytest
from diffusers.utils import load_video

from server import ffmpeg
from server.errors import BadRequest, TooLarge
from server.inputs import Header, read_file, read_header, video
from tests.conftest import REPOSITORY
from tests.inputs.mp4 import FTYP, H264, box, few, full, movie, numbers, source, trak, write
from tests.waiting import until

ROTATIONS = {
    "90": ("-display_rotation", "90"),
    "180": ("-display_rotation", "180"),
    "270": ("-display_rotation", "270"),
    "mirrored": ("-display_hflip",),
    "mirrored and turned": ("-display_hflip", "-display_rotation", "90"),
}


def read(data: bytes, *, rotate: bool = True) -> tuple[Header, np.ndarray]:
    header = read_header(data, "video/mp4", 257, rotate=rotate)
    raw = read_file(data, header, "RGB")
    pixels = np.frombuffer(raw.data, np.uint8).reshape(raw.shape)
    assert pixels.shape == (header.frames, header.height, header.width, 3)
    return header, pixels


def loaded(path: Path) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its file to the garbage collector
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in load_video(str(path))])
        gc.collect()
    return frames


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """imageio converts colours less exactly, by about a level."""
    assert found.shape == expected.shape
    assert np.abs(found.astype(float) - expected).mean() < 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("video") / "whole.mp4", *source(1.2), *H264, "-bf", "0", "-g", "10")


@pytest.mark.parametrize("name", ROTATIONS)
def test_a_display_matrix_is_applied_as_load_video_does(name: str, whole: Path, tmp_path: Path) -> None:
    turned = write(tmp_path / "turned.mp4", *ROTATIONS[name], "-i", whole, "-c", "copy")
    header, upright = read(turned.read_bytes())
    assert_same(upright, loaded(turned))
    assert (header.height, header.width) == (
        (96, 64) if "90" in name or "turned" in name or "270" in name else (64, 96)
    )
    _, stored = read(turned.read_bytes(), rotate=False)
    assert np.array_equal(stored, read(whole.read_bytes())[1])


def test_a_cut_video_has_the_frames_that_load_video_gives(whole: Path, tmp_path: Path) -> None:
    """Without B-frames, where imageio neither repeats nor drops a frame to keep time."""
    cut = write(tmp_path / "cut.mp4", "-ss", "0.24", "-t", "0.44", "-i", whole, "-c", "copy")
    header, frames = read(cut.read_bytes())
    assert (header.frames, header.video.movie.samples) == (11, 17)
    assert_same(frames, loaded(cut))
    assert_same(frames, read(whole.read_bytes())[1][6:17])


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9", "libsvtav1", "mpeg4"])
def test_every_usual_codec_decodes_within_the_limits(codec: str, tmp_path: Path) -> None:
    made = write(tmp_path / "made.mp4", *source(0.2, size="1920x1080"), "-c:v", codec, "-pix_fmt", "yuv420p")
    header, frames = read(made.read_bytes())
    assert header.video.memory_bytes < 700 << 20
    assert_same(frames, loaded(made))


def test_a_small_file_of_many_frames_never_reaches_ffmpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffmpeg, "start", lambda *_, **__: pytest.fail("ffmpeg was started"))
    with pytest.raises(TooLarge):
        read_header(movie(trak(few(stsz=full(b"stsz", numbers(1, 85_000_000))))), "video/mp4", 257)


def test_ffmpeg_takes_no_more_memory_than_it_may(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = read_header(whole.read_bytes(), "video/mp4", 257)
    monkeypatch.setattr(video, "BASE_BYTES", 96 << 20)
    with pytest.raises(BadRequest, match="the video"):
        read_file(whole.read_bytes(), header, "RGB")


def test_ffmpeg_takes_no_more_time_than_it_may(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = read_header(whole.read_bytes(), "video/mp4", 257)
    monkeypatch.setattr(video, "BASE_S", 1.0)
    monkeypatch.setattr(video, "_command", lambda *_, **__: ENDLESS)
    with pytest.raises(BadRequest, match="takes far longer to decode"):
        read_file(whole.read_bytes(), header, "RGB")


ENDLESS = ["-v", "error", "-f", "lavfi", "-i", "testsrc=size=640x480", "-f", "null", "-"]


def environment(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def is_ffmpeg(pid: int) -> bool:
    """Once it is no longer the launcher."""
    return Path(f"/proc/{pid}/exe").readlink() == Path(imageio_ffmpeg.get_ffmpeg_exe()).resolve()


def test_no_variable_of_ours_reaches_ffmpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAE_SERVER_API_KEY", "secret")
    with ffmpeg.start(ENDLESS) as process:
        assert b"secret" not in environment(process.pid)
        until(lambda: is_ffmpeg(process.pid), "ffmpeg")
        assert environment(process.pid) == b""
        process.kill()


def test_ffmpeg_ends_with_the_process_that_started_it() -> None:
    """Though it reads and writes no pipe whose end would tell it."""
    code = f"from server import ffmpeg; print(ffmpeg.start({ENDLESS}).pid, flush=True); input()"
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout
        started = psutil.Process(int(parent.stdout.readline()))
        until(lambda: is_ffmpeg(started.pid), "ffmpeg")
        parent.send_signal(signal.SIGKILL)
    until(lambda: not started.is_running() or started.status() == psutil.STATUS_ZOMBIE, "the end of ffmpeg")


def test_a_file_that_is_no_video_is_refused_by_ffmpeg() -> None:
    for data in (movie(trak(few())), FTYP + box(b"moov"), FTYP):
        with pytest.raises(BadRequest, match=r"the MP4|the video"):
            read(data)
