"""Every failure is a JSON sentence with its status and code, and costs no decode."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import socket
import threading
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests

from server.config import Settings
from server.engine.coders.image.decoder import ExactKLDecoder
from server.engine.coders.stock import StockDecoder
from server.engine.coders.video.causal_decoder import ExactCausalDecoder
from server.engine.local import LocalEngine
from server.engine.weights import loading
from server.model_info import CoderId, ModelInfo
from server.scheduling.engines import Batch
from tests.conftest import REPOSITORY, Serve
from tests.vaes import LocalVae

LEAKS = re.compile(r"0x[0-9a-f]{6,}|Traceback|/home|/usr|/tmp|site-packages|File \"")
GOOD = {"shape": [1, 4, 8, 8], "dtype": "float32"}
BODY = np.zeros(256, "float32").tobytes()
BINARY = {"Content-Type": "tensor/binary"}


def post(
    url: str, params: Any = GOOD, data: Any = BODY, headers: dict[str, str] = BINARY, path: str = ""
) -> requests.Response:
    return requests.post(url + path, params=params, data=data, headers=headers, timeout=300)


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The decoders that ran; the server is a thread of this process."""
    ran: list[str] = []
    for decoder in (ExactKLDecoder, ExactCausalDecoder, StockDecoder):

        def counted(self: Any, *arguments: Any, original: Any = decoder.decode, **options: Any) -> Any:
            ran.append(self.name)
            return original(self, *arguments, **options)

        monkeypatch.setattr(decoder, "decode", counted)
    return ran


def assert_refused(response: requests.Response, status: int, code: str, words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error", "code", "request_id"}
    assert body["code"] == code
    assert re.search(words, body["error"]), body["error"]
    assert body["request_id"] == response.headers["x-request-id"]
    assert not LEAKS.search(response.text)


def with_params(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**GOOD, **changes}.items() if value is not None}


NAN, INF = np.full(256, np.nan, "float32").tobytes(), np.r_[np.zeros(255), np.inf].astype("float32").tobytes()
BAD_REQUESTS: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "no shape": ({"params": {"dtype": "float32"}}, 400, "bad_request", "shape is missing"),
    "no dtype": ({"params": with_params(dtype=None)}, 400, "bad_request", "dtype is missing"),
    "unknown dtype": ({"params": with_params(dtype="float8")}, 400, "bad_request", "one of float16, bfloat16, float32"),
    "uint8 latents": ({"params": with_params(dtype="uint8")}, 400, "bad_request", "dtype of latents"),
    "half the bytes": ({"data": BODY[:512]}, 400, "wrong_length", "needs 1024 bytes, but the body has 512; was dtype=float16"),
    "no bytes": ({"data": b""}, 400, "wrong_length", "needs 1024 bytes, but the body has 0"),
    "too many bytes": ({"data": BODY * 3}, 400, "wrong_length", "the body has 3072"),
    "chunked, too short": ({"data": iter([BODY[:100]])}, 400, "wrong_length", "the body has 100"),
    "chunked, too long": ({"data": iter([BODY] * 3)}, 400, "wrong_length", "needs 1024 bytes"),
    "rank 2": ({"params": with_params(shape=[16, 16])}, 400, "wrong_shape", "2 dimensions"),
    "rank 5": ({"params": with_params(shape=[1, 4, 1, 8, 8])}, 400, "wrong_shape", "5 dimensions"),
    "rank 6": ({"params": with_params(shape=[1, 1, 4, 1, 8, 8])}, 400, "bad_request", "at most 5"),
    "rank 4 with wrong channels": (
        {"params": with_params(shape=[1, 5, 8, 8])}, 400, "wrong_shape", "have 5 channels.*decoded at POST / .*encoded there and at POST /encode",
    ),
    "a zero dimension": ({"params": with_params(shape=[1, 4, 0, 8])}, 400, "bad_request", "whole numbers from 1"),
    "a negative dimension": ({"params": with_params(shape=[1, 4, -8, 8])}, 400, "bad_request", "not '-8'"),
    "a fractional dimension": ({"params": with_params(shape=[1, 4, 8.5, 8])}, 400, "bad_request", "not '8.5'"),
    "an enormous dimension": ({"params": with_params(shape=[1, 4, 10**9, 8])}, 400, "bad_request", "from 1 to 999999"),
    "Arabic digits": ({"params": with_params(shape=[1, 4, "٨", 8])}, 400, "bad_request", "whole numbers"),
    "an underscore": ({"params": with_params(shape=[1, 4, "1_0", 8])}, 400, "bad_request", "whole numbers"),
    "too many pixels": ({"params": with_params(shape=[1, 4, 128, 512])}, 413, "too_large", "at most 131072"),
    "a huge picture": ({"params": with_params(shape=[1, 4, 99999, 99999])}, 413, "too_large", "pixels"),
    "too large a batch": ({"params": with_params(shape=[5, 4, 8, 8])}, 413, "too_large", "a batch of 5"),
    "packed without size": ({"params": with_params(shape=[1, 16, 16])}, 400, "wrong_shape", "need height and width"),
    "packed with height alone": (
        {"params": with_params(shape=[1, 16, 16], height=64)}, 400, "wrong_shape", "need height and width",
    ),
    "a size that does not fit the tokens": (
        {"params": with_params(shape=[1, 16, 16], height=64, width=96)}, 400, "wrong_shape", "16 tokens do not fit 64x96",
    ),
    "a size that is no number": (
        {"params": with_params(shape=[1, 16, 16], height="tall", width=64)}, 400, "bad_request", "height must be a whole",
    ),
    "neither packed nor one latent": ({"params": with_params(shape=[8, 8, 5])}, 400, "wrong_shape", "neither one latent"),
    "channels last": (
        {"params": with_params(shape=[1, 8, 8, 4])}, 400, "wrong_shape",
        r"latents of shape 1x8x8x4 look channels-last; send \[B, 4, H, W\], in torch latents.permute\(0, 3, 1, 2\).contiguous\(\)",
    ),
    "channels last without a batch": (
        {"params": with_params(shape=[8, 8, 4])}, 400, "wrong_shape",
        r"8x8x4 look channels-last; send \[4, H, W\], in torch latents.permute\(2, 0, 1\)",
    ),
    "an axis too many": (
        {"params": with_params(shape=[1, 1, 4, 8, 8])}, 400, "wrong_shape", "has 5 dimensions, one too many; send shape 1x4x8x8",
    ),
    "an axis of one frame too many": (
        {"params": with_params(shape=[1, 4, 1, 8, 8])}, 400, "wrong_shape", "one too many; send shape 1x4x8x8",
    ),
    "an axis too many for anything": (
        {"params": with_params(shape=[1, 1, 1, 4, 8, 8])}, 400, "bad_request", "at most 5: is there an axis too many",
    ),
    "NaN": ({"data": NAN}, 400, "nonfinite_input", "256 of 256 latent values are NaN"),
    "one Inf": ({"data": INF}, 400, "nonfinite_input", "1 of 256"),
    "scaling_factor zero": ({"params": with_params(scaling_factor=0)}, 400, "bad_request", "must not be zero"),
    "scaling_factor nan": ({"params": with_params(scaling_factor="nan")}, 400, "bad_request", "finite decimal number"),
    "scaling_factor inf": ({"params": with_params(scaling_factor="1e999")}, 400, "bad_request", "finite decimal number"),
    "scaling_factor word": ({"params": with_params(scaling_factor="big")}, 400, "bad_request", "not 'big'"),
    "shift_factor huge": ({"params": with_params(shift_factor=1e9)}, 400, "bad_request", "between -1e\\+06 and 1e\\+06"),
    "a flag that is none": ({"params": with_params(do_scaling="maybe")}, 400, "bad_request", "True or False"),
    "a scalar twice": ({"params": {**GOOD, "scaling_factor": [1, 2]}}, 400, "bad_request", "sent 2 times"),
    "unknown output_type": ({"params": with_params(output_type="gif")}, 400, "bad_request", "one of pil, pt, mp4"),
    "unknown image_format": ({"params": with_params(image_format="bmp")}, 400, "bad_request", "one of jpg, jpeg, png"),
    "quality out of range": ({"params": with_params(quality=101)}, 400, "bad_request", "between 1 and 100"),
    "fps zero": ({"params": with_params(fps=0)}, 400, "bad_request", "fps must be between"),
    "unknown model": ({"path": "sdx"}, 404, "unknown_model", "known models: .*sd-v1.*sdxl"),
    "unknown model in the query": ({"params": with_params(model="../../x")}, 404, "unknown_model", "no such model"),
    "an unknown model to encode with": ({"path": "sdx/encode"}, 404, "unknown_model", "known models"),
    "unknown route": ({"path": "a/b/c"}, 404, "not_found", "no such route"),
    "two pictures in one JPEG": (
        {"params": with_params(shape=[2, 4, 8, 8]), "data": BODY * 2}, 422, "impossible", "output_type=pt, or a request for each item",
    ),
    "a picture from a video model": (
        {"params": with_params(shape=[1, 16, 2, 4, 4]), "path": "hunyuan"}, 406, "not_acceptable", "output_type=mp4 or pt",
    ),
    "an MP4 from an image model": ({"params": with_params(output_type="mp4")}, 406, "not_acceptable", "decodes images"),
    "two clips in one MP4": (
        {"params": with_params(shape=[2, 16, 1, 4, 4], output_type="mp4"), "data": BODY * 2, "path": "hunyuan"},
        422, "impossible", "a batch of 2",
    ),
    "too many frames": (
        {"params": with_params(shape=[1, 16, 9, 4, 4], output_type="mp4"), "path": "hunyuan"}, 413, "too_large", "33 frames",
    ),
    "a picture model's latents for a video model": (
        {"params": with_params(shape=[1, 8, 8], output_type="mp4"), "path": "hunyuan"}, 400, "wrong_shape", "video latents",
    ),
    "a picture too wide for a JPEG": (
        {"params": with_params(shape=[1, 16, 1, 8200]), "path": "sd3"}, 422, "impossible", "8x65600 does not fit a JPG, whose sides are at most 65500",
    ),
    "a packed batch without its tokens' size in a video": (
        {"params": with_params(shape=[1, 15, 8, 8], output_type="mp4"), "path": "hunyuan"}, 400, "wrong_shape", "is not one video",
    ),
    "Accept that nothing fits": ({"headers": {**BINARY, "Accept": "image/gif"}}, 406, "not_acceptable", "image/jpeg"),
    "a picture format for pt": (
        {"params": with_params(output_type="pt"), "headers": {**BINARY, "Accept": "image/png"}},
        406, "not_acceptable", "tensor/binary",
    ),
    "an unknown body type": ({"headers": {"Content-Type": "text/csv"}}, 415, "unsupported_body", "tensor/binary"),
    "a compressed body": ({"headers": {**BINARY, "Content-Encoding": "gzip"}}, 415, "unsupported_body", "compressed"),
    "JSON that is none": (
        {"headers": {"Content-Type": "application/json"}, "data": "{"}, 400, "bad_request", "is not JSON",
    ),
    "JSON nested too deep": (
        {"headers": {"Content-Type": "application/json"}, "data": "[" * 99999}, 400, "bad_request", "is not JSON",
    ),
    "JSON without inputs": (
        {"headers": {"Content-Type": "application/json"}, "data": "[]"}, 400, "bad_request", "no string 'inputs'",
    ),
    "bad base64": (
        {"headers": {"Content-Type": "tensor/base64"}, "data": '{"inputs": "a*b"}'}, 400, "bad_request", "is not base64",
    ),
    "parameters that are no object": (
        {"headers": {"Content-Type": "application/json"}, "data": '{"inputs": "", "parameters": [1]}'},
        400, "bad_request", "'parameters' is not an object",
    ),
    "a parameter that is an object": (
        {"headers": {"Content-Type": "application/json"}, "data": '{"inputs": "", "parameters": {"shape": {}}}', "params": {}},
        400, "bad_request", "must be a number",
    ),
    "base64 of half the bytes": (
        {
            "headers": {"Content-Type": "application/json"},
            "data": json.dumps({"inputs": base64.b64encode(BODY[:512]).decode()}),
        },
        400, "wrong_length", "the body has 512",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_gets_a_sentence_and_costs_no_decode(url: str, decodes: list[str], case: str) -> None:
    request, status, code, words = BAD_REQUESTS[case]
    assert_refused(post(url, **request), status, code, words)
    assert decodes == []


def test_a_good_request_costs_one_decode(url: str, decodes: list[str]) -> None:
    assert post(url).ok
    assert decodes == ["exact"]


def test_a_method_that_a_route_does_not_take_is_405(url: str) -> None:
    for method, path in [("GET", "predict"), ("PUT", ""), ("POST", "health"), ("DELETE", "models"), ("GET", "sd")]:
        response = requests.request(method, url + path, timeout=300)
        assert_refused(response, 405, "method_not_allowed", "this route allows only")
        assert response.headers["allow"]
    assert_refused(requests.get(url + "favicon.ico", timeout=300), 404, "not_found", "no such route")
    assert requests.options(url, timeout=300).headers["allow"] == "GET, HEAD, POST"


def test_a_body_over_the_limit_is_refused_before_it_is_read(serve: Serve, vaes: dict[str, LocalVae]) -> None:
    address = serve({"sd": {"repo": str(vaes["sd"].folder)}}, max_body_mb=1)
    assert_refused(post(address, with_params(shape=[1, 4, 512, 512])), 413, "too_large", "larger than the 1048576")
    host, port = urlsplit(address).hostname, urlsplit(address).port
    with socket.create_connection((host, port), 300) as client:
        client.sendall(b"POST /?shape=1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 413 ")
    chunks = iter([b'{"inputs": "'] + [b"A" * 65536] * 20)
    response = post(address, data=chunks, headers={"Content-Type": "application/json"})
    assert_refused(response, 413, "too_large", "larger than the 1048576")


class Gate(LocalEngine):
    """A device that is busy until the test opens it."""

    def __init__(self, settings: Settings, opened: threading.Event) -> None:
        super().__init__(settings)
        self.opened = opened
        self.turn = asyncio.Lock()

    async def run(self, batch: Batch) -> None:
        async with self.turn:
            batch.note_started()
            await asyncio.to_thread(self.opened.wait, 300)
            await super().run(batch)


def gate(opened: threading.Event) -> Any:
    return lambda settings, metrics: Gate(settings, opened)


def test_a_full_queue_is_429_with_retry_after(serve: Serve, vaes: dict[str, LocalVae]) -> None:
    opened = threading.Event()
    address = serve({"sd": {"repo": str(vaes["sd"].folder)}}, engine=gate(opened), max_queue=2)
    answers: list[int] = []

    def ask(width: int) -> None:  # of widths that are not decoded together
        answers.append(post(address, with_params(shape=[1, 4, 8, width]), BODY * (width // 8)).status_code)

    waiting = [threading.Thread(target=ask, args=(width,)) for width in (8, 16)]
    for thread in waiting:
        thread.start()
    told = ""
    while not ("inf_queue_size 1.0\n" in told and "inf_batch_current_size 1.0\n" in told):
        told = requests.get(address + "metrics", timeout=300).text
    refused = post(address)
    assert requests.get(address + "health", timeout=300).ok, "a full queue must not fail the readiness probe"
    opened.set()
    for thread in waiting:
        thread.join()
    assert_refused(refused, 429, "queue_full", "2 requests are already waiting or in progress; try again in")
    assert int(refused.headers["retry-after"]) >= 1
    assert answers == [200, 200]


def test_a_client_that_leaves_takes_its_request_along(
    serve: Serve, vaes: dict[str, LocalVae], decodes: list[str]
) -> None:
    opened = threading.Event()
    address = serve({"sd": {"repo": str(vaes["sd"].folder)}}, engine=gate(opened))
    head = b"POST /?shape=1,4,8,8&dtype=float32 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1024\r\n\r\n"
    with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port), 10) as client:
        client.sendall(head + BODY)
        while "inf_batch_current_size 1.0" not in requests.get(address + "metrics", timeout=300).text:
            pass
    while "inf_batch_current_size 0.0" not in requests.get(address + "metrics", timeout=300).text:
        pass
    opened.set()
    assert post(address).ok
    assert len(decodes) == 1


def test_half_sent_bodies_keep_nobody_out(serve: Serve, vaes: dict[str, LocalVae]) -> None:
    address = serve({"sd": {"repo": str(vaes["sd"].folder)}}, max_queue=1)
    half = (
        b"POST /?shape=1,4,8,8&dtype=float32 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1024\r\n\r\n" + BODY[:100]
    )
    with ExitStack() as open_uploads:
        for _ in range(20):
            slow = socket.create_connection((urlsplit(address).hostname, urlsplit(address).port), 10)
            open_uploads.enter_context(slow).sendall(half)
        assert post(address).ok


def test_a_full_queue_refuses_before_the_body_is_read(serve: Serve, vaes: dict[str, LocalVae]) -> None:
    opened = threading.Event()
    address = serve({"sd": {"repo": str(vaes["sd"].folder)}}, engine=gate(opened), max_queue=1)
    waiting = threading.Thread(target=post, args=(address,))
    waiting.start()
    while "vae_inflight 1.0" not in requests.get(address + "metrics", timeout=300).text:
        pass
    with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port), 10) as client:
        client.sendall(
            b"POST /?shape=1,4,8,8&dtype=float32 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1024\r\n\r\n"
        )
        assert client.recv(4096).startswith(b"HTTP/1.1 429 ")
    opened.set()
    waiting.join()


def test_the_bytes_of_accepted_requests_are_bounded_but_one_alone_is_taken(
    serve: Serve, vaes: dict[str, LocalVae]
) -> None:
    opened = threading.Event()
    address = serve({"sd": {"repo": str(vaes["sd"].folder)}}, engine=gate(opened), max_queue_mb=1)
    large = with_params(shape=[1, 4, 64, 64], output_type="pt")
    body = np.zeros((1, 4, 64, 64), "float32").tobytes()
    waiting = threading.Thread(target=post, args=(address, large, body))
    waiting.start()
    while "vae_inflight 1.0" not in requests.get(address + "metrics", timeout=300).text:
        pass
    assert_refused(post(address, large, body), 429, "queue_full", "as many bytes as this server allows")
    opened.set()
    waiting.join()
    assert post(address, large, body).ok
    sent = json.dumps({"inputs": base64.b64encode(body).decode()})
    assert post(address, large, sent, {"Content-Type": "application/json"}).ok


def test_loading_one_model_does_not_keep_another_from_decoding(
    serve: Serve, vaes: dict[str, LocalVae], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, load = threading.Event(), loading.load_vae

    def slow_for_flux(info: ModelInfo, *rest: Any) -> Any:
        assert info.name != "flux" or opened.wait(300)
        return load(info, *rest)

    monkeypatch.setattr(loading, "load_vae", slow_for_flux)
    address = serve({name: {"repo": str(vaes[name].folder)} for name in ("sd", "flux")})
    answers: list[int] = []
    shape = with_params(shape=[1, 16, 4, 4])
    waiting = threading.Thread(target=lambda: answers.append(post(address, shape, path="flux").status_code))
    waiting.start()
    assert post(address).ok
    assert answers == []
    opened.set()
    waiting.join()
    assert answers == [200]


def test_a_warm_up_that_fails_is_a_failed_start(
    serve: Serve, vaes: dict[str, LocalVae], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(ExactKLDecoder, "decode", broken)
    address = serve({"sd": {"repo": str(vaes["sd"].folder), "warmup": [[64, 64]]}})
    assert_refused(requests.get(address + "health", timeout=300), 503, "unavailable", "did not load")


def test_a_start_that_fails_in_an_unknown_way_is_a_failed_start(serve: Serve, vaes: dict[str, LocalVae]) -> None:
    class Broken(LocalEngine):
        async def describe(self, model: str, *, is_local_only: bool = False) -> ModelInfo:
            raise ZeroDivisionError

    address = serve({"sd": {"repo": str(vaes["sd"].folder)}}, engine=lambda settings, _: Broken(settings))
    assert_refused(requests.get(address + "health", timeout=300), 503, "unavailable", "did not load")


def test_a_request_past_its_deadline_is_504(serve: Serve, vaes: dict[str, LocalVae]) -> None:
    opened = threading.Event()
    address = serve({"sd": {"repo": str(vaes["sd"].folder)}}, engine=gate(opened), request_timeout_s=0.2)
    try:
        assert_refused(post(address), 504, "deadline_passed", "not done after 0.2 s")
    finally:
        opened.set()


@pytest.mark.parametrize(
    ("flags", "models", "limits"),
    [
        ({}, "loaded on this server; the server's log says why$", "smaller image, or raise max_pixels in models.yaml"),
        (
            {"allowed_hosts": "*"},
            "loaded on this server; the server's log says why; tell its operator",
            "smaller image, or ask its operator to raise max_pixels in models.yaml",
        ),
        (
            {"host": "0.0.0.0"},
            "loaded on this server; the server's log says why; tell its operator",
            "smaller image, or ask its operator to raise max_pixels in models.yaml",
        ),
    ],
)
def test_who_reads_on_loopback_is_the_operator(
    serve: Serve, vaes: dict[str, LocalVae], flags: dict[str, Any], models: str, limits: str
) -> None:
    address = serve({"sd": {"repo": str(vaes["sd"].folder)}, "lost": {"repo": "./nowhere"}}, **flags)
    assert_refused(post(address, path="lost"), 503, "model_unavailable", models)
    assert_refused(post(address, with_params(shape=[1, 4, 999, 999])), 413, "too_large", limits)


def test_sentences_leave_it_to_the_reader_who_the_operator_is() -> None:
    """What the operator must do is an error's `operator_task`; only errors.py says whom to ask for it."""
    sources = {path.name: path.read_text() for path in (REPOSITORY / "server").rglob("*.py")}
    assert [name for name, source in sources.items() if re.search("(tell|ask) its operator", source)] == ["errors.py"]


def test_a_bug_is_500_with_a_fixed_sentence(serve: Serve, vaes: dict[str, LocalVae]) -> None:
    class Broken(LocalEngine):
        async def run(self, batch: Batch) -> None:
            raise ZeroDivisionError("/tmp/secret at 0x7fffdeadbeef")

    address = serve({"sd": {"repo": str(vaes["sd"].folder)}}, engine=lambda settings, _: Broken(settings))
    assert_refused(post(address), 500, "internal", "the server failed on this request")


def test_a_request_that_a_shutdown_cancels_is_503(serve: Serve, vaes: dict[str, LocalVae]) -> None:
    class Cancelled(LocalEngine):
        async def run(self, batch: Batch) -> None:
            for pending in batch.members:
                pending.answer.cancel()

    address = serve({"sd": {"repo": str(vaes["sd"].folder)}}, engine=lambda settings, _: Cancelled(settings))
    assert_refused(post(address), 503, "unavailable", "shutting down and did not finish")


def test_out_of_memory_is_413(serve: Serve, vaes: dict[str, LocalVae], monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(StockDecoder, "decode", out_of_memory)
    address = serve({"sd": {"repo": str(vaes["sd"].folder), "decoder": "diffusers"}})
    assert_refused(post(address), 413, "too_large_for_device", "does not fit this server's memory")


def test_a_model_that_does_not_load_is_503_and_the_others_go_on(serve: Serve, vaes: dict[str, LocalVae]) -> None:
    address = serve({"sd": {"repo": str(vaes["sd"].folder)}, "lost": {"repo": "./nowhere"}})
    response = post(address, path="lost")
    assert_refused(response, 503, "model_unavailable", "'lost' cannot be loaded on this server")
    assert response.headers["retry-after"]
    assert post(address).ok
    listed = {model["name"]: model["state"] for model in requests.get(address + "models", timeout=300).json()["models"]}
    assert listed == {"sd": "loaded", "lost": "failed"}


def test_a_server_whose_default_does_not_load_is_never_ready(serve: Serve) -> None:
    address = serve({"lost": {"repo": "./nowhere", "preload": True}})
    assert_refused(requests.get(address + "health", timeout=300), 503, "unavailable", "did not load")
    assert requests.get(address + "health/live", timeout=300).ok
    assert_refused(post(address), 503, "unavailable", "did not load")


def test_a_server_that_still_loads_is_503_until_it_can_serve(serve: Serve, vaes: dict[str, LocalVae]) -> None:
    opened = threading.Event()

    class SlowToLoad(LocalEngine):
        async def load(self, coder: CoderId) -> None:
            await asyncio.to_thread(opened.wait, 300)
            await super().load(coder)

    address = serve(
        {"sd": {"repo": str(vaes["sd"].folder), "preload": True}},
        engine=lambda settings, _: SlowToLoad(settings),
        until_started=False,
    )
    for response in (requests.get(address + "health", timeout=300), post(address)):
        assert_refused(response, 503, "unavailable", "still loading")
        assert response.headers["retry-after"]
    assert requests.get(address + "health/live", timeout=300).ok
    opened.set()
    while requests.get(address + "health", timeout=300).status_code == 503:
        pass
    assert post(address).ok
