"""The proxies' files: nginx's in a real nginx in front of a real server, and the unit of systemd by systemd itself."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import torch
import trustme
import yaml

from server.config import load_settings
from tests.conftest import REPOSITORY, running, write_models_yaml
from tests.vaes import LocalVae
from tests.waiting import until
from tests.web.test_remote_decode import decode_quietly

PROXIES = REPOSITORY / "deploy" / "proxies"
UNIT = REPOSITORY / "deploy" / "vae-server.service"
NGINX = shutil.which("nginx") or ("/usr/sbin/nginx" if Path("/usr/sbin/nginx").exists() else None)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, vaes: dict[str, LocalVae]) -> Iterator[tuple[str, Path]]:
    """The address of nginx and the certificate of its issuer. The file has the names, the certificate and the ports of this test."""
    folder = tmp_path_factory.mktemp("nginx")
    issuer = trustme.CA()
    issued = issuer.issue_cert("localhost")
    issuer.cert_pem.write_to_path(str(folder / "issuer"))
    issued.private_key_pem.write_to_path(str(folder / "key"))
    (folder / "cert").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    models: dict[str, Any] = {name: {"repo": str(vaes[name].folder), "dtype": "float32"} for name in ("sd", "hunyuan")}
    config = write_models_yaml(folder / "models.yaml", models, "sd")
    with running(load_settings(config=config, allowed_hosts="localhost", max_body_mb=8)) as server:
        port, text = free_port(), (PROXIES / "nginx.conf").read_text()
        for found, put in (
            ("127.0.0.1:8000", urlsplit(server).netloc),
            ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
            ("server_name vae.example", "server_name localhost"),
            ("/etc/ssl/vae.example.pem", str(folder / "cert")),
            ("/etc/ssl/vae.example.key", str(folder / "key")),
        ):
            assert text.count(found) == 1, found
            text = text.replace(found, put)
        (folder / "site.conf").write_text(text)
        temporary = "".join(
            f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (folder / "nginx.conf").write_text(
            f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors; events {{}}"
            f"http {{ access_log off; {temporary} include {folder}/site.conf; }}"
        )
        command = [str(NGINX), "-p", str(folder), "-e", f"{folder}/errors", "-c", f"{folder}/nginx.conf"]
        proxy = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            until(lambda: proxy.poll() is not None or is_open(port), "nginx")
            assert proxy.poll() is None, proxy.stderr and proxy.stderr.read()
            yield f"https://localhost:{port}/", folder / "issuer"
        finally:
            proxy.terminate()
            proxy.communicate(timeout=300)


@pytest.fixture
def trusting(site: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """The address, which requests trusts."""
    url, issuer = site
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(issuer))
    return url


def is_open(port: int) -> bool:
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


needs_nginx = pytest.mark.skipif(NGINX is None, reason="needs nginx: make nginx")


@needs_nginx
@pytest.mark.parametrize("path", ["", "vae/", "vae/sd"])
def test_latents_of_megabytes_are_decoded_also_below_a_path(
    trusting: str, vaes: dict[str, LocalVae], path: str
) -> None:
    latents = vaes["sd"].latents(8, 8, batch=8).repeat(1, 1, 8, 8)[:, :, :64, :64]  # [8, 4, 64, 64], half a megabyte
    latents = torch.cat([latents] * 3, 3)  # more than nginx takes by default
    answer = decode_quietly(
        f"{trusting}{path}",
        latents[:8],
        output_type="pt",
        return_type="pt",
        partial_postprocess=True,
        scaling_factor=1.0,
    )
    assert latents.nbytes > 1 << 20
    assert answer.shape == (8, 512, 1536, 3)


@needs_nginx
def test_the_page_and_its_files_are_found_below_a_path(trusting: str) -> None:
    page = requests.get(f"{trusting}vae/", headers={"Accept": "text/html"}, timeout=300)
    assert page.headers["content-type"].startswith("text/html")
    for file in re.findall(r'(?:src|href)="(page/[^"]+)"', page.text):
        assert requests.get(f"{trusting}vae/{file}", timeout=300).status_code == 200
    assert requests.get(f"{trusting}vae/docs/", timeout=300).url == f"{trusting}vae/docs", "the redirect keeps the path"
    origin = trusting.rstrip("/")  # what a browser sends with the page's own requests
    headers = {"Origin": origin, "Sec-Fetch-Site": "same-origin"}
    assert requests.post(f"{trusting}vae/", headers=headers, timeout=300).json()["code"] != "cross_site"


@needs_nginx
def test_the_servers_own_refusals_arrive(trusting: str) -> None:
    query = "shape=1&shape=4&shape=1024&shape=1024&dtype=float32"
    answer = requests.post(f"{trusting}?{query}", data=b"x" * (9 << 20), timeout=300)
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    answer = requests.post(f"{trusting}nobody", timeout=300)
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_model")


@needs_nginx
def test_a_stream_arrives_while_it_is_decoded(
    trusting: str, vaes: dict[str, LocalVae], held_video: threading.Event
) -> None:
    latents = vaes["hunyuan"].latents(5, 4, 6)
    query = {"shape": list(latents.shape), "dtype": "float32", "output_type": "mp4", "stream": True}
    with requests.post(
        f"{trusting}hunyuan", params=query, data=latents.numpy().tobytes(), stream=True, timeout=300
    ) as answer:
        pieces = answer.iter_content(None)
        first = next(pieces)
        assert first[4:8] == b"ftyp"
        held_video.set()  # only now is the rest decoded
        assert len(b"".join(pieces)) > len(first)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze, which Debian's systemd has")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    program = tmp_path / "vae-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/vae-server/bin/vae-server", str(program)))
    told = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stdout + told.stderr) == (0, "")


def test_the_unit_waits_longer_than_a_drain() -> None:
    (wait_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    config = REPOSITORY / "models.yaml"
    assert int(wait_s) > load_settings(config=config).options.drain_timeout_s


def test_the_configuration_of_traefik_is_yaml() -> None:
    routers = yaml.safe_load((PROXIES / "traefik.yaml").read_text())["http"]["routers"]
    assert routers.keys() == {"vae", "vae-path"}
