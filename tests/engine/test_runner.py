"""Frames go to the encoder as they are done, and the MP4 is the same as that of the whole clip."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from server.config import load_settings
from server.engine import pipeline, runner, video_render
from server.engine.models import LoadedModels
from server.engine.pipeline import NonFiniteOutput
from server.engine.video_render import VideoRender
from server.errors import NonFiniteInput
from server.outputs import format_named
from server.outputs.video import render_mp4_frames
from server.values import Geometry, RawTensor, Rendered, RenderOptions, Request, Result
from tests.conftest import write_models_yaml
from tests.requests import decode_job
from tests.vaes import LocalVae


class Listener:
    """What a batch of one request came to."""

    def __init__(self) -> None:
        self.outcome: Result[Rendered] | Exception | None = None
        self.ended = threading.Event()
        self.progress: list[int] = []
        self.pieces: list[bytes] = []

    def is_wanted(self, index: int) -> bool:
        return True

    def started(self) -> None: ...

    def progressed(self, index: int, frames: int) -> None:
        self.progress.append(frames)

    def emitted(self, index: int, piece: bytes) -> None:
        self.pieces.append(piece)

    def computed(self) -> None: ...

    def finished(self, index: int, result: Result[Rendered]) -> None:
        self.outcome = result
        self.ended.set()

    def failed(self, index: int, error: Exception) -> None:
        self.outcome = error
        self.ended.set()


@pytest.fixture
def request_and_runner(vaes: dict[str, LocalVae], tmp_path: Path) -> Iterator[tuple[Request, runner.Runner]]:
    models: dict[str, Any] = {"hunyuan": {"repo": str(vaes["hunyuan"].folder), "dtype": "float32"}}
    settings = load_settings(config=write_models_yaml(tmp_path / "models.yaml", models, "hunyuan"))
    made = runner.Runner(settings, LoadedModels(settings))
    latents = vaes["hunyuan"].latents(5, 4, 6)
    data = memoryview(latents.numpy().tobytes())
    geometry = Geometry((1, 16, 5, 4, 6), False, 17, 32, 48)
    job = decode_job("hunyuan", geometry, format_name="mp4", render=RenderOptions(10, 5, "video/mp4"))
    yield Request(job, data), made
    made.close()


def listened(made: runner.Runner, request: Request) -> Listener:
    listener = Listener()
    made.submit([request], listener)
    assert listener.ended.wait(300)
    return listener


def outcome_of(made: runner.Runner, request: Request) -> Result[Rendered] | Exception | None:
    return listened(made, request).outcome


def streamed_bytes(made: runner.Runner, request: Request) -> bytes:
    """All pieces of a streamed answer, after which nothing is left."""
    listener = listened(made, replace(request, job=replace(request.job, format="fragmented-mp4")))
    assert isinstance(listener.outcome, Result)
    assert listener.outcome.body.body.nbytes == 0
    return b"".join(listener.pieces)


def test_frames_are_encoded_while_later_ones_are_decoded(
    request_and_runner: tuple[Request, runner.Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    request, made = request_and_runner
    taken: list[int] = []
    first_taken = threading.Event()

    def watched(chunks: Iterable[RawTensor], options: RenderOptions) -> Any:
        def seen() -> Iterator[RawTensor]:
            for chunk in chunks:
                taken.append(chunk.shape[0])
                first_taken.set()
                yield chunk

        return render_mp4_frames(seen(), options)

    write = VideoRender.write
    written: list[bool] = []

    def waits_for_the_first(self: Any, frames: Any) -> None:
        if len(written) == 5:
            assert first_taken.wait(300), "no frame was taken while others were still to be computed"
        written.append(True)
        write(self, frames)

    mp4 = format_named("mp4")
    monkeypatch.setattr(video_render, "format_named", lambda _: replace(mp4, render_frames=watched))
    monkeypatch.setattr(VideoRender, "write", waits_for_the_first)
    streamed = outcome_of(made, request)
    assert isinstance(streamed, Result)
    assert (sum(taken), max(taken)) == (17, 1)

    whole = made._models.run([request])[0]
    assert not isinstance(whole, Exception)
    assert bytes(streamed.body.body) == bytes(mp4.render(whole.body, request.job.render).body)


def test_a_clip_that_fails_on_the_way_ends_its_encoder_and_is_told(
    request_and_runner: tuple[Request, runner.Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    request, made = request_and_runner
    write = VideoRender.write

    def breaks(self: Any, frames: Any) -> None:
        write(self, frames)
        raise ZeroDivisionError

    monkeypatch.setattr(VideoRender, "write", breaks)
    assert isinstance(outcome_of(made, request), ZeroDivisionError)


def test_a_decode_that_begins_again_gives_every_frame_once(
    request_and_runner: tuple[Request, runner.Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here because memory ran out after nine frames, in the middle of a chunk of frames or between two."""
    request, made = request_and_runner
    expected, streamed = outcome_of(made, request), streamed_bytes(made, request)
    assert isinstance(expected, Result)
    write, written = VideoRender.write, 0

    def runs_out(self: Any, frames: Any) -> None:
        nonlocal written
        if written < 9 <= written + len(frames):
            write(self, frames[: 9 - written])
            written = 9
            raise torch.OutOfMemoryError
        written += len(frames)
        write(self, frames)

    monkeypatch.setattr(VideoRender, "write", runs_out)
    got = outcome_of(made, request)
    assert isinstance(got, Result)
    assert got.oom_steps
    assert bytes(got.body.body) == bytes(expected.body.body)
    written = 0
    assert streamed_bytes(made, request) == streamed


def test_progress_counts_the_frames_that_are_done(request_and_runner: tuple[Request, runner.Runner]) -> None:
    request, made = request_and_runner
    progress = listened(made, request).progress
    assert progress == sorted(progress)
    assert progress[-1] == 17
    assert len(progress) > 2


def test_a_clip_that_overflows_on_the_way_is_decoded_again_in_float32(
    request_and_runner: tuple[Request, runner.Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    request, made = request_and_runner
    expected = outcome_of(made, request)
    entry = made._models._settings.models["hunyuan"].model_copy(update={"dtype": "bfloat16"})
    settings = made._models._settings.model_copy(update={"models": {"hunyuan": entry}})
    half = runner.Runner(settings, LoadedModels(settings))
    run, calls = pipeline.run, []

    def overflows_once(model: Any, jobs: Any, stream: Any, check: Any) -> Any:
        calls.append(stream)
        outcomes = run(model, jobs, stream if len(calls) > 1 else None, check)
        if len(calls) == 1:
            stream.rewind()
            return [NonFiniteOutput()]
        return outcomes

    monkeypatch.setattr("server.engine.models.run", overflows_once)
    got = outcome_of(half, request)
    half.close()
    assert isinstance(expected, Result)
    assert isinstance(got, Result)
    assert got.is_upcast
    assert bytes(got.body.body) == bytes(expected.body.body)


def test_clips_that_are_refused_leave_no_render_thread_waiting(
    request_and_runner: tuple[Request, runner.Runner],
) -> None:
    request, made = request_and_runner
    nans = memoryview(b"\xff\xff\xff\x7f" * (16 * 5 * 4 * 6))
    bad = replace(request, data=nans)
    for _ in range(3):  # more than there are render threads
        assert isinstance(outcome_of(made, bad), NonFiniteInput)
    assert isinstance(outcome_of(made, request), Result)
