"""A server with a certificate, and real clients that check it."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import pytest
import requests
import torch
import trustme
from cryptography.hazmat.primitives import serialization
from PIL import Image

from server.config import load_settings
from server.errors import ConfigError
from server.web import protocol
from tests.conftest import REPOSITORY, Serve, write_models_yaml
from tests.load import process
from tests.vaes import LocalVae
from tests.waiting import PATIENCE_S, until
from tests.web.test_remote_decode import decode_quietly

pytestmark = pytest.mark.usefixtures("one_core")


class Files:
    """A certificate for 127.0.0.1, its key, both in one file, and the certificate of the issuer."""

    def __init__(self, folder: Path) -> None:
        issuer = trustme.CA()
        issued = issuer.issue_cert("127.0.0.1")
        self.cert, self.key, self.both, self.issuer = (folder / name for name in ("cert", "key", "both", "issuer"))
        issuer.cert_pem.write_to_path(str(self.issuer))
        issued.private_key_pem.write_to_path(str(self.key))
        issued.private_key_and_cert_chain_pem.write_to_path(str(self.both))
        self.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def url(files: Files, serve: Serve, vaes: dict[str, LocalVae]) -> str:
    models = {"sd": {"repo": str(vaes["sd"].folder), "dtype": "float32"}}
    return serve(models, tls_cert=files.cert, tls_key=files.key)


def test_diffusers_client_decodes(
    url: str, files: Files, vaes: dict[str, LocalVae], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert url.startswith("https://")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(files.issuer))
    image = decode_quietly(url, vaes["sd"].latents(8, 8), scaling_factor=1.0)
    assert isinstance(image, Image.Image)
    assert image.size == (64, 64)


def test_a_large_body_and_a_large_answer_arrive_whole(url: str, files: Files, vaes: dict[str, LocalVae]) -> None:
    latents = vaes["sd"].latents(64, 64)
    query: dict[str, Any] = {"shape": list(latents.shape), "dtype": "float32", "output_type": "pt"}
    query |= {"output_dtype": "float32"}
    answer = requests.post(url, params=query, data=latents.numpy().tobytes(), verify=str(files.issuer), timeout=300)
    assert answer.status_code == 200
    sample = torch.frombuffer(bytearray(answer.content), dtype=torch.float32).reshape(1, 3, 512, 512)
    torch.testing.assert_close(sample, vaes["sd"].decode(latents), atol=1e-4, rtol=0)


def test_a_client_that_does_not_trust_it_or_speaks_http_gets_no_answer(url: str) -> None:
    with pytest.raises(requests.exceptions.SSLError):
        requests.get(f"{url}health", timeout=300)
    with pytest.raises(requests.exceptions.ConnectionError):
        requests.get(f"{url.replace('https', 'http')}health", timeout=300)


def test_a_head_that_never_ends_is_closed(files: Files, serve: Serve, vaes: dict[str, LocalVae]) -> None:
    """The limits of slow clients hold behind TLS too."""
    models = {"sd": {"repo": str(vaes["sd"].folder)}}
    place = urlsplit(serve(models, tls_cert=files.both, head_timeout_s=3))  # the handshake must be done by then too
    context = ssl.create_default_context(cafile=files.issuer)
    with connected(place, context) as secure:
        secure.sendall(b"GET /health HTTP/1.1\r\n")
        assert everything(secure).startswith(b"HTTP/1.1 408")


def test_a_client_that_does_not_read_is_cut_off(
    files: Files, serve: Serve, vaes: dict[str, LocalVae], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MOST_CREDIT_S", 0.0)  # the system's buffers take megabytes at once
    models = {"sd": {"repo": str(vaes["sd"].folder)}}
    place = urlsplit(serve(models, tls_cert=files.both, send_timeout_s=0.5))
    context = ssl.create_default_context(cafile=files.issuer)
    query = "shape=1&shape=4&shape=144&shape=144&dtype=float32&output_type=pt&output_dtype=float32"
    latents = vaes["sd"].latents(144, 144).numpy().tobytes()
    head = f"POST /?{query} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(latents)}\r\n\r\n"
    with connected(place, context) as secure:
        secure.sendall(head.encode() + latents)
        until(lambda: 'vae_cancelled_total{stage="sending"} 1.0' in metrics(place, files), "the end of the answer")
        assert len(everything(secure)) < 4 * 3 * 1152**2


def connected(place: SplitResult, context: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection((str(place.hostname), place.port or 0), timeout=300)
    return context.wrap_socket(plain, server_hostname="127.0.0.1")


def everything(secure: ssl.SSLSocket) -> bytes:
    """What the server sends until it closes the connection, in whatever way."""
    answer = b""
    with suppress(OSError):
        while piece := secure.recv(65536):
            answer += piece
    return answer


def metrics(place: SplitResult, files: Files) -> str:
    return requests.get(f"{place.geturl()}metrics", verify=str(files.issuer), timeout=300).text


@pytest.mark.slow
def test_a_handshake_that_never_comes_is_ended(files: Files, models_yaml: Path) -> None:
    """In a process of its own, which also says that it speaks HTTPS."""
    command = [sys.executable, "-m", "server", "serve", "--config", str(models_yaml), "--port", "0"]
    command += ["--tls-cert", str(files.both), "--head-timeout-s", "1"]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            ready = next(line for line in process.stderr if line.startswith("ready: "))
            address = ready.split()[1]
            assert address.startswith("https://127.0.0.1:")
            assert requests.get(f"{address}health", verify=str(files.issuer), timeout=300).status_code == 200
            place = urlsplit(address)
            with socket.create_connection((str(place.hostname), place.port or 0), timeout=40) as silent:
                assert silent.recv(1) == b""  # asyncio's own limit is 60 seconds
        finally:
            process.terminate()
            process.communicate(timeout=300)


@pytest.mark.slow
def test_silent_connections_are_counted_before_their_handshake(files: Files, models_yaml: Path) -> None:
    """However many there are, the newest client is served, and the oldest of them are closed."""
    most = 8 + 4  # --max-connections, and those that may get a refusal
    flags = ("--tls-cert", str(files.both), "--max-connections", "8", "--head-timeout-s", str(10 * PATIENCE_S))
    with process(models_yaml, *flags) as (address, server), ExitStack() as stack:
        place = urlsplit(address)
        silent = [
            stack.enter_context(socket.create_connection((str(place.hostname), place.port or 0))) for _ in range(40)
        ]
        for _ in range(3):
            answer = requests.get(f"{address}health", verify=str(files.issuer), timeout=PATIENCE_S)
            assert answer.status_code == 200
        until(lambda: sum(map(is_closed, silent)) >= len(silent) - most, "the end of the oldest")
        assert not is_closed(silent[-1]), "the newest may still begin"
        context = ssl.create_default_context(cafile=files.issuer)
        with context.wrap_socket(silent[-1], server_hostname="127.0.0.1") as begun:
            begun.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            assert everything(begun).startswith(b"HTTP/1.1 200")
        server.terminate()
        assert server.wait(PATIENCE_S) == 0, "it does not wait for those that are silent"


def is_closed(plain: socket.socket) -> bool:
    """Whether the other side has closed a connection on which it has sent nothing."""
    plain.setblocking(False)
    try:
        return plain.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    finally:
        plain.setblocking(True)


def test_a_request_that_comes_with_the_end_of_the_handshake_is_answered(url: str, files: Files) -> None:
    """In one packet, so that the server has the request before it knows that the handshake is complete."""
    place = urlsplit(url)
    received, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context(cafile=files.issuer)
    secure = context.wrap_bio(received, to_send, server_hostname="127.0.0.1")
    with socket.create_connection((str(place.hostname), place.port or 0), timeout=PATIENCE_S) as plain:
        while True:
            try:
                secure.do_handshake()
                break
            except ssl.SSLWantReadError:
                plain.sendall(to_send.read())
                received.write(plain.recv(65536))
        secure.write(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        plain.sendall(to_send.read())  # the client's last part of the handshake, and the request
        while True:
            try:
                assert secure.read(65536).startswith(b"HTTP/1.1 200")
                break
            except ssl.SSLWantReadError:
                piece = plain.recv(65536)
                assert piece, "an answer"
                received.write(piece)


WRONG: dict[str, tuple[dict[str, str], str]] = {
    "a key alone": ({"tls_key": "key"}, "--tls-key: is set without --tls-cert"),
    "no such file": ({"tls_cert": "nothing", "tls_key": "key"}, "nothing: No such file or directory"),
    "no key": ({"tls_cert": "cert"}, "is not a certificate with its key"),
    "the key of another": ({"tls_cert": "cert", "tls_key": "other"}, "do not belong together"),
    "an encrypted key": ({"tls_cert": "cert", "tls_key": "secret"}, "and a key without a password"),
    "no PEM file": ({"tls_cert": "text", "tls_key": "key"}, "give PEM files"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_cannot_be_used_are_refused_at_the_start(case: str, files: Files, tmp_path: Path) -> None:
    for name in ("cert", "key"):
        (tmp_path / name).write_bytes(getattr(files, name).read_bytes())
    (tmp_path / "other").write_bytes(trustme.CA().issue_cert("127.0.0.1").private_key_pem.bytes())
    key = serialization.load_pem_private_key((tmp_path / "key").read_bytes(), None)
    form, scheme = serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"word")
    (tmp_path / "secret").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, scheme))
    (tmp_path / "text").write_text("not a certificate")
    config = write_models_yaml(tmp_path / "models.yaml", {"m": {"repo": "a/b"}}, "m")
    flags, said = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        load_settings(config=config, **{name: tmp_path / file for name, file in flags.items()})
    assert said in str(caught.value)
