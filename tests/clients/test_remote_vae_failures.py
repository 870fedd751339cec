"""Lost and busy servers, wrong keys and models: what RemoteVAE says and does, and that no latents are lost."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from remote_vae import RemoteVAE, RemoteVAEError, Timeout
from safetensors.torch import load_file

from server.config import load_settings
from tests.clients.scripted import BROKEN, ENDLESS, SILENT, Proxy, scripted
from tests.conftest import Serve, running
from tests.vaes import LocalVae

SOON = Timeout(connect=5, read=300, total=1.5)


@pytest.fixture
def latents(vaes: dict[str, LocalVae]) -> torch.Tensor:
    return vaes["sd"].latents(6, 8)


@pytest.fixture
def expected(vaes: dict[str, LocalVae], latents: torch.Tensor) -> torch.Tensor:
    return vaes["sd"].decode(latents)


def assert_levels(found: torch.Tensor, expected: torch.Tensor) -> None:
    """At most half a level apart, by the rounding to bytes."""
    torch.testing.assert_close(found, expected.clamp(-1, 1), atol=0.51 / 127.5, rtol=0)


def nowhere(vaes: dict[str, LocalVae], models_yaml: Path) -> str:
    """The address of a server that has ended."""
    with running(load_settings(config=models_yaml)) as address:
        pass
    return address


@pytest.mark.parametrize("act", [(429, "0"), (503, "0"), (429, None), (502, None), BROKEN])
def test_a_failure_that_passes_is_tried_again(
    proxy: tuple[Proxy, str], latents: torch.Tensor, expected: torch.Tensor, act: tuple[int, str | None] | str
) -> None:
    script, address = proxy
    vae = RemoteVAE(address + "sd")
    script.script += [act]
    assert_levels(vae.decode(latents).sample, expected)
    assert len(script.posts) == 2


def test_retry_after_is_waited_for_and_reported(
    proxy: tuple[Proxy, str], latents: torch.Tensor, expected: torch.Tensor
) -> None:
    script, address = proxy
    told: list[tuple[str, float, float | None]] = []
    vae = RemoteVAE(address + "sd", progress=lambda *about: told.append(about))
    script.script += [(429, "1")] * 4  # more often than `retries`, because the server is only busy
    assert_levels(vae.decode(latents).sample, expected)
    assert [about for about in told if about[0] == "wait"] == [("wait", 0, 1.0), ("wait", 1.0, 1.0)] * 4
    assert ("send", latents.nbytes, latents.nbytes) in told
    assert ("receive", 48 * 64 * 3, 48 * 64 * 3) in told


def test_a_wait_beyond_the_timeout_is_not_begun(
    proxy: tuple[Proxy, str], latents: torch.Tensor, tmp_path: Path
) -> None:
    script, address = proxy
    vae = RemoteVAE(address + "sd", timeout=(5, 300, 300), save_latents=tmp_path)
    script.script += [(503, "100000")]
    with pytest.raises(RemoteVAEError, match="answered 503: the sentence of 503") as raised:
        vae.decode(latents)
    assert (raised.value.status, raised.value.code) == (503, "some_code")
    assert len(script.posts) == 1


@pytest.mark.parametrize("act", [SILENT, ENDLESS])
def test_nothing_takes_longer_than_the_timeout(
    proxy: tuple[Proxy, str], latents: torch.Tensor, tmp_path: Path, act: str
) -> None:
    script, address = proxy
    vae = RemoteVAE(address + "sd", timeout=SOON, save_latents=tmp_path)
    script.script += [act] * 9
    with pytest.raises(RemoteVAEError, match=r"did not answer within 1\.5 s|cannot be reached or broke off"):
        vae.decode(latents)
    assert 0 < float(script.posts[0]["X-Request-Timeout"]) <= SOON.total


def test_a_fault_of_the_server_is_not_tried_again(
    proxy: tuple[Proxy, str], latents: torch.Tensor, tmp_path: Path
) -> None:
    script, address = proxy
    vae = RemoteVAE(address + "sd", save_latents=tmp_path)
    script.script += [(500, None)]
    with pytest.raises(RemoteVAEError, match="the sentence of 500"):
        vae.decode(latents)
    assert len(script.posts) == 1


def test_the_latents_of_a_failed_decode_are_kept(
    proxy: tuple[Proxy, str], url: str, latents: torch.Tensor, expected: torch.Tensor, tmp_path: Path
) -> None:
    script, address = proxy
    vae = RemoteVAE(address + "sd", save_latents=tmp_path / "kept")
    script.script += [(500, None)]
    with pytest.raises(RemoteVAEError, match=str(tmp_path / "kept")) as raised:
        vae.decode(latents.to(torch.bfloat16))
    error = raised.value
    assert error.latents is not None
    assert error.latents_file is not None
    assert torch.equal(error.latents, latents.to(torch.bfloat16))
    assert torch.equal(load_file(error.latents_file)["latents"], latents.to(torch.bfloat16))
    again = RemoteVAE(url + "sd").decode(load_file(error.latents_file)["latents"].float()).sample
    torch.testing.assert_close(again, expected.clamp(-1, 1), atol=0.1, rtol=0)
    sent = requests.post(url + "sd?image_format=png", error.latents_file.read_bytes(), timeout=300)
    assert sent.ok, sent.text


def test_latents_that_cannot_be_saved_are_still_in_the_error(
    proxy: tuple[Proxy, str], latents: torch.Tensor, tmp_path: Path
) -> None:
    script, address = proxy
    (tmp_path / "file").touch()
    vae = RemoteVAE(address + "sd", save_latents=tmp_path / "file")
    script.script += [(500, None)]
    with pytest.warns(UserWarning, match="cannot be saved"), pytest.raises(RemoteVAEError) as raised:
        vae.decode(latents)
    assert torch.equal(raised.value.latents, latents)


def test_a_server_that_is_gone_is_told_with_its_address(
    vaes: dict[str, LocalVae], models_yaml: Path, latents: torch.Tensor, tmp_path: Path
) -> None:
    with running(load_settings(config=models_yaml)) as address:
        vae = RemoteVAE(address + "sd", retries=0, save_latents=tmp_path)
        vae.decode(latents)
    with pytest.raises(RemoteVAEError, match=rf"{address}sd cannot be reached or broke off") as raised:
        vae.decode(latents)
    assert raised.value.latents_file
    with pytest.raises(RemoteVAEError, match="cannot be reached"):
        RemoteVAE(address + "sd", retries=0)


def test_another_server_of_the_pool_takes_over(
    proxy: tuple[Proxy, str], url: str, models_yaml: Path, vaes: dict[str, LocalVae],
    latents: torch.Tensor, expected: torch.Tensor,
) -> None:  # fmt: skip
    script, address = proxy
    vae = RemoteVAE([nowhere(vaes, models_yaml) + "sd", address + "sd", url + "sd"])
    script.script += [(500, None)]
    assert_levels(vae.decode(latents).sample, expected)  # by the third one, which is preferred from then on
    assert_levels(vae.decode(latents).sample, expected)
    assert len(script.posts) == 1


def test_a_local_vae_takes_over_with_a_warning(
    proxy: tuple[Proxy, str], vaes: dict[str, LocalVae], latents: torch.Tensor, expected: torch.Tensor, tmp_path: Path
) -> None:
    script, address = proxy
    local, asked = vaes["sd"], []
    ways = [str(local.folder), lambda: asked.append(1) or local.module, local.module, "local"]
    for fallback in ways:
        vae = RemoteVAE(address + "sd", fallback=fallback, save_latents=tmp_path)
        vae._entry["repo"] = str(local.folder)  # of a model of the Hub it is the repository
        for _ in range(2):
            script.script += [(500, None)]
            with pytest.warns(UserWarning, match="the sentence of 500 The local VAE is used"), torch.no_grad():
                sample = vae.decode(latents).sample
            torch.testing.assert_close(sample, expected, atol=1e-5, rtol=0)
        script.script += [(500, None)]
        pixels = expected.clamp(-1, 1)
        with pytest.warns(UserWarning, match="The local VAE is used"), torch.no_grad():
            found = vae.encode(pixels).latent_dist
        with torch.no_grad():
            torch.testing.assert_close(found.mode(), local.module.encode(pixels).latent_dist.mode())
    assert len(asked) == 1, "it is loaded once"
    assert not list(tmp_path.iterdir()), "nothing was lost"


class BrokenVAE(torch.nn.Module):
    """A local VAE that cannot decode."""

    def decode(self, *_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")


def fails() -> Any:
    raise ZeroDivisionError("no VAE")


@pytest.mark.parametrize(
    ("fallback", "words"),
    [
        (fails, "ZeroDivisionError: no VAE"),
        ("/nonexistent/folder", "OSError"),
        ("local", "the server loads this model from a folder"),
        (BrokenVAE, "OutOfMemoryError: no memory"),
    ],
)
def test_the_latents_are_kept_if_the_local_vae_fails_too(
    proxy: tuple[Proxy, str], latents: torch.Tensor, tmp_path: Path, fallback: Any, words: str
) -> None:
    script, address = proxy
    vae = RemoteVAE(address + "sd", fallback=fallback, save_latents=tmp_path)
    script.script += [(500, None)]
    with pytest.warns(UserWarning, match="The local VAE is used"), pytest.raises(RemoteVAEError) as raised:
        vae.decode(latents)
    assert "the sentence of 500 The local VAE failed too" in str(raised.value)
    assert words in str(raised.value)
    assert raised.value.latents_file is not None
    torch.testing.assert_close(load_file(raised.value.latents_file)["latents"], latents)


@pytest.mark.parametrize("key", ["a\nb", "é€"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ValueError, match="not printable ASCII") as raised:
        RemoteVAE("http://127.0.0.1:1/sd", key=key)
    assert key not in str(raised.value)


def test_a_wrong_request_is_not_given_to_the_local_vae(url: str, vaes: dict[str, LocalVae], tmp_path: Path) -> None:
    vae = RemoteVAE(url + "sd", fallback=lambda: vaes["sd"].module, save_latents=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RemoteVAEError, match=r"400: .*16 channels, but this model's have 4"):
            vae.decode(torch.zeros(1, 16, 8, 8))


def test_a_wrong_key_is_told(
    serve: Serve, vaes: dict[str, LocalVae], latents: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAE_SERVER_API_KEY", "right")
    address = serve({"sd": {"repo": str(vaes["sd"].folder)}})
    for given in (None, "wrong"):
        with pytest.raises(
            RemoteVAEError, match=r"401: (a key is required|this server does not know the key)"
        ) as raised:
            RemoteVAE(address + "sd", key=given)
        assert raised.value.status == 401
    RemoteVAE(address + "sd", key="right").decode(latents)
    RemoteVAE(address.replace("http://", "http://user:right@") + "sd").decode(latents)
    monkeypatch.setenv("REMOTE_VAE_KEY", "right")
    vae = RemoteVAE(address + "sd")
    vae.decode(latents)
    assert "right" not in repr(vae)


def test_a_wrong_model_is_told_with_those_that_there_are(url: str) -> None:
    with pytest.raises(RemoteVAEError, match=r"this server has no model 'sd9'; it has .*sdxl") as raised:
        RemoteVAE(url + "sd9")
    assert raised.value.status == 404


@pytest.mark.parametrize("address", ["host:8000/flux", "ftp://host/flux", "flux", ""])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is not the address of a server"):
        RemoteVAE(address)


def test_an_answer_that_is_no_tensor_is_told(proxy: tuple[Proxy, str], latents: torch.Tensor, tmp_path: Path) -> None:
    script, address = proxy
    vae = RemoteVAE(address + "sd", save_latents=tmp_path)
    script.script += [(200, None)]
    with pytest.raises(RemoteVAEError, match="sent something other than a tensor") as raised:
        vae.decode(latents)
    assert raised.value.latents_file


def test_something_else_than_this_server_is_told(tmp_path: Path) -> None:
    with scripted("http://127.0.0.1:9/") as (script, address):
        script.forward = lambda handler, body: script.perform(handler, (200, None), body)  # type: ignore[method-assign]  # the script is replaced on purpose
        with pytest.raises(RemoteVAEError, match="is not a VAE decode server"):
            RemoteVAE(address + "sd")
