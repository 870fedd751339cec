"""A real browser: the page decodes a dropped file, and plays and seeks the MP4."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from diffusers import FluxPipeline
from PIL import Image
from playwright.sync_api import Error
from safetensors.torch import save_file

from server.web.openapi import DESCRIPTION
from tests.conftest import REPOSITORY, Serve
from tests.pipelines.sounds import oobleck
from tests.vaes import LocalVae
from tests.waiting import until
from tests.web.browser import DEMO, needs_chromium, open_page

pytestmark = needs_chromium


def test_the_page_decodes_a_picture(browser: Any, url: str, vaes: dict[str, LocalVae], tmp_path: Path) -> None:
    latents = tmp_path / "latents.safetensors"
    save_file({"latents": vaes["sd"].latents(8, 12).half()}, latents)
    page = open_page(browser, url, "sd")
    page.set_input_files("#file", latents)
    page.wait_for_selector("#result img")
    size = page.evaluate(
        "async () => { const i = document.querySelector('#result img'); await i.decode(); return [i.naturalWidth, i.naturalHeight]; }"
    )
    assert size == [96, 64]
    assert "decode;dur=" in page.inner_text("#said")
    assert page.problems == []
    assert not page.locator("#height").is_visible(), "only packed latents need it"


def test_the_page_decodes_comfyuis_latent_unscaled(
    browser: Any, url: str, vaes: dict[str, LocalVae], tmp_path: Path
) -> None:
    z = vaes["sd"].latents(8, 12)
    save_file({"latent_tensor": z, "latent_format_version_0": torch.tensor([])}, tmp_path / "z.latent")
    page = open_page(browser, url, "sd")
    page.set_input_files("#file", tmp_path / "z.latent")
    page.wait_for_selector("#result img")
    assert page.problems == []


MODELS = ["sd", "sdxl", "sd3", "flux", "hunyuan", "sd-bf16"]


@pytest.mark.parametrize("model", MODELS)
def test_the_snippet_runs_in_the_installed_diffusers_without_a_warning(
    browser: Any, url: str, vaes: dict[str, LocalVae], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page(browser, url)
    for side, pixels in (("height", 64), ("width", 96)):
        page.evaluate(f"document.getElementById('{side}').value = {pixels}")
    page.select_option("#model", model)
    page.wait_for_selector(f"#python:has-text('/{model}')")
    vae = vaes[model.removesuffix("-bf16")]
    scaled = vae.latents(*((2, 4, 4) if model == "hunyuan" else (8, 12)))
    latents = FluxPipeline._pack_latents(scaled, 1, 16, 8, 12) if model == "flux" else scaled
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"latents": latents}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(page.inner_text("#python"), names)
    if model == "hunyuan":
        assert (tmp_path / "video.mp4").read_bytes()[4:8] == b"ftyp"
        return
    params = {"shape": list(scaled.shape), "dtype": "float32", "do_scaling": True, "image_format": "png"}
    expected = requests.post(url + model, scaled.numpy().tobytes(), params=params, timeout=60).content
    difference = np.asarray(names["image"]).astype(int) - np.asarray(Image.open(io.BytesIO(expected))).astype(int)
    assert np.abs(difference).max() <= 1, "what the pipeline's own statistics give"


def test_the_browser_asks_for_a_key_and_an_address_may_hold_it(
    browser: Any, serve: Serve, vaes: dict[str, LocalVae], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As an operator gives it to others, http://user:KEY@host/, and without it the page is not shown."""
    monkeypatch.setenv("VAE_SERVER_API_KEY", "secret")
    address = serve({"sd": {"repo": str(vaes["sd"].folder), "dtype": "float32"}})
    save_file({"latents": vaes["sd"].latents(8, 12)}, tmp_path / "latents.safetensors")
    page = open_page(browser, address.replace("http://", "http://user:secret@"))
    page.set_input_files("#file", tmp_path / "latents.safetensors")
    page.wait_for_selector("#result img")
    assert page.problems == []
    asked = browser.new_context(http_credentials={"username": "any", "password": "secret"})
    page = asked.new_page()
    assert page.goto(address).status == 200, "playwright types the key into the dialog that Basic opens"
    page.locator("#model option").first.wait_for(state="attached")
    with pytest.raises(Error, match="ERR_INVALID_AUTH_CREDENTIALS"):  # it asks, and nobody types a key
        browser.new_page().goto(address)


def test_a_page_of_another_site_can_do_nothing_unless_it_is_listed(
    browser: Any, serve: Serve, vaes: dict[str, LocalVae], url: str
) -> None:
    """`localhost` is another site than `127.0.0.1`."""
    foreign = url.replace("127.0.0.1", "localhost")
    listed = serve({"sd": {"repo": str(vaes["sd"].folder), "dtype": "float32"}}, cors_origins=foreign.rstrip("/"))
    page = browser.new_page()
    page.goto(foreign + "health")  # not the server's page, whose policy lets it ask nobody else
    ask = """async (url) => {
        const query = 'shape=1,4,8,8&dtype=float32&output_type=pt';
        const headers = { 'Content-Type': 'tensor/binary', 'X-Request-Timeout': '60' };
        try {
            const answer = await fetch(url + '?' + query, { method: 'POST', body: new Uint8Array(1024), headers });
            const names = ['shape', 'dtype', 'x-request-id', 'server-timing'];
            return [answer.status, ...names.map((name) => answer.headers.get(name) !== null)];
        } catch (error) {
            return [error.name];
        }
    }"""
    assert page.evaluate(ask, listed) == [200, True, True, True, True]
    assert page.evaluate(ask, url) == ["TypeError"], "its preflight is refused"
    before = count(url)
    page.evaluate(
        "(url) => fetch(url, { method: 'POST', mode: 'no-cors', body: new Blob([new Uint8Array(1024)]) })",
        url + "?shape=1,4,8,8&dtype=float32",
    )
    assert count(url) == before, "a request that needs no preflight decodes nothing either"


@pytest.mark.parametrize(
    "key", [{"X-API-Key": "secret"}, {"Authorization": "Bearer secret"}], ids=lambda key: next(iter(key))
)
def test_a_listed_page_of_another_site_sends_its_key(
    browser: Any,
    serve: Serve,
    vaes: dict[str, LocalVae],
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    key: dict[str, str],
) -> None:
    """The browser first asks by a preflight, which has no key, whether the page may send the header."""
    monkeypatch.setenv("VAE_SERVER_API_KEY", "secret")
    foreign = url.replace("127.0.0.1", "localhost")
    listed = serve({"sd": {"repo": str(vaes["sd"].folder), "dtype": "float32"}}, cors_origins=foreign.rstrip("/"))
    ask = """async ([url, key]) => {
        const query = 'shape=1,4,8,8&dtype=float32&output_type=pt&output_dtype=float32';
        const headers = { 'Content-Type': 'tensor/binary', ...key };
        try {
            const answer = await fetch(url + '?' + query, { method: 'POST', body: new Uint8Array(1024), headers });
            const error = answer.ok ? null : (await answer.clone().json()).code;
            return [answer.status, answer.headers.get('shape'), (await answer.arrayBuffer()).byteLength, error];
        } catch (error) {
            return [error.name];
        }
    }"""
    page = browser.new_page()
    page.goto(foreign + "health")
    assert page.evaluate(ask, [listed, key]) == [200, "[1, 3, 64, 64]", 4 * 3 * 64 * 64, None]
    status, shape, _, code = page.evaluate(ask, [listed, {}])
    assert (status, shape, code) == (401, None, "unauthorized"), "the page can read why it is refused"
    page.goto(url + "health")  # the same server by its other name, which is not listed
    assert page.evaluate(ask, [listed, key]) == ["TypeError"]


def count(url: str) -> float:
    """How many decodes there were."""
    told = requests.get(url + "metrics", timeout=10).text
    return sum(float(line.split()[-1]) for line in told.splitlines() if line.startswith("vae_decode_seconds_count"))


def test_the_page_says_why_a_file_is_wrong(browser: Any, url: str, vaes: dict[str, LocalVae], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.safetensors"
    page = open_page(browser, url, "sd")
    several = {"one": torch.zeros(1), "other": torch.zeros(1)}
    for tensors, words in [({"latents": torch.zeros(1, 5, 8, 8)}, "have 5 channels"), (several, "name it latents")]:
        save_file(tensors, wrong)
        page.set_input_files("#file", wrong)
        page.locator("#said.failed", has_text=words).wait_for()


def test_an_mp4_plays_and_seeks(browser: Any, url: str, vaes: dict[str, LocalVae], tmp_path: Path) -> None:
    latents = tmp_path / "clip.safetensors"
    save_file({"latents": vaes["hunyuan"].latents(5, 8, 8)}, latents)
    page = open_page(browser, url)
    page.set_input_files("#file", latents)
    page.locator("#said", has_text="Done in").wait_for()
    played = page.evaluate(
        """async () => {
            const video = document.querySelector('#result video');
            video.loop = false;
            const heard = (name) => new Promise((done) => video.addEventListener(name, done, { once: true }));
            if (video.readyState < 1) await heard('loadedmetadata');
            video.pause();
            const sought = heard('seeked');
            video.currentTime = 1.0;
            await sought;
            const at = video.currentTime;
            const ended = heard('ended');
            await video.play();
            await ended;
            return [video.videoWidth, video.videoHeight, video.duration, at, video.currentTime];
        }"""
    )
    assert played[:2] == [64, 64]
    assert played[2] == pytest.approx(1.7, abs=0.1), "17 frames at 10 a second"
    assert played[3] == pytest.approx(1.0)
    assert played[4] == pytest.approx(played[2], abs=0.01)


def test_one_click_decodes_an_example(browser: Any, serve: Serve) -> None:
    page = open_page(browser, serve(DEMO))
    assert (
        page.locator("#samples img").evaluate_all("all => all.map(each => each.complete && each.naturalWidth)")
        == [192] * 4
    )
    page.get_by_role("button", name="coffee").press("Enter")
    page.wait_for_selector("#result img")
    assert page.locator("figcaption").inner_text().startswith("coffee.safetensors, demo: ")
    with page.expect_download() as downloading:
        page.get_by_role("link", name="Download").click()
    assert downloading.value.suggested_filename == "coffee.png"
    page.get_by_role("button", name="china").click()
    page.locator("figure").nth(1).wait_for()
    assert page.locator("figcaption").first.inner_text().startswith("china"), "the newest result comes first"
    assert page.problems == []


def test_the_model_that_fits_is_found_by_the_file(
    browser: Any, serve: Serve, vaes: dict[str, LocalVae], tmp_path: Path
) -> None:
    url = serve({name: {"repo": str(vaes[name].folder)} for name in ("sd", "sdxl", "sd3", "hunyuan")})
    page = open_page(browser, url)
    save_file({"latents": vaes["sd3"].latents(4, 4)}, tmp_path / "one.safetensors")
    page.set_input_files("#file", tmp_path / "one.safetensors")
    page.locator("figcaption", has_text="one.safetensors, sd3").wait_for()
    save_file({"latents": vaes["sd"].latents(4, 4)}, tmp_path / "two.safetensors")
    page.set_input_files("#file", tmp_path / "two.safetensors")
    page.locator("#choice button").nth(1).wait_for()
    assert page.locator("#choice button").all_inner_texts() == ["sd", "sdxl"]
    assert "fits 2 models" in page.inner_text("#choice h2")
    page.locator("#choice button", has_text="sdxl").click()
    page.locator("figcaption", has_text="two.safetensors, sdxl").wait_for()
    assert page.problems == []


def test_audio_is_played_and_its_python_code_runs(browser: Any, serve: Serve, tmp_path: Path) -> None:
    oobleck(sampling_rate=16000).save_pretrained(tmp_path / "oobleck")
    page = open_page(browser, serve({**DEMO, "music": {"repo": str(tmp_path / "oobleck")}}))
    save_file({"latents": torch.randn(1, 6, 2000)}, tmp_path / "latents.safetensors")
    page.set_input_files("#file", tmp_path / "latents.safetensors")
    page.locator("figcaption", has_text="latents.safetensors, music").wait_for()
    page.wait_for_function("document.querySelector('#result audio').duration > 0.9")
    assert page.get_by_role("link", name="Download").get_attribute("download") == "latents.wav"
    subprocess.run([sys.executable, "-c", page.inner_text("#python")], cwd=tmp_path, check=True)
    assert (tmp_path / "audio.wav").read_bytes()[:4] == b"RIFF"
    assert page.problems == []


def test_the_contract_is_shown_without_other_sites(browser: Any, serve: Serve) -> None:
    url = serve(DEMO)
    page = open_page(browser, url)
    page.goto(f"{url}docs#decode")
    page.wait_for_selector("details#decode[open] td")
    shown = page.inner_text("details#decode")
    assert "scaling_factor" in shown
    assert "tensor/binary: bytes" in shown
    operations = page.evaluate("[...document.querySelectorAll('details')].map(each => each.id)")
    described = [
        item[method]["operationId"]
        for item in DESCRIPTION["paths"].values()
        for method in ("get", "post", "delete")
        if method in item
    ]
    assert operations == described
    assert page.problems == []


def test_the_size_of_packed_latents_is_suggested_and_can_be_corrected(
    browser: Any, serve: Serve, vaes: dict[str, LocalVae], tmp_path: Path
) -> None:
    page = open_page(browser, serve({"flux": {"repo": str(vaes["flux"].folder)}}))
    assert not page.locator("#height").is_visible()
    packed = FluxPipeline._pack_latents(vaes["flux"].latents(8, 12), 1, 16, 8, 12)
    save_file({"latents": packed}, tmp_path / "packed.safetensors")
    page.set_input_files("#file", tmp_path / "packed.safetensors")
    page.wait_for_selector("#result img")
    assert [page.input_value("#height"), page.input_value("#width")] == ["64", "96"]
    page.fill("#height", "96")
    page.fill("#width", "64")
    page.set_input_files("#file", tmp_path / "packed.safetensors")
    page.locator("figure").nth(1).wait_for()
    size = "all => all.map(each => [each.naturalWidth, each.naturalHeight])"
    assert page.locator("#result img").evaluate_all(size) == [[64, 96], [96, 64]]
    assert page.problems == []


def test_a_photo_is_shown_beside_its_reconstruction(browser: Any, serve: Serve, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), "uint8")).save(photo)
    page = open_page(browser, serve(DEMO))
    data = {"bytes": list(photo.read_bytes()), "name": "photo.png"}
    page.evaluate(
        """({bytes, name}) => {
            const files = new DataTransfer();
            files.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
            document.querySelector("h1").dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true}));
        }""",
        data,
    )
    page.locator("#result img").nth(1).wait_for()
    size = "all => all.map(each => [each.naturalWidth, each.naturalHeight])"
    assert page.locator("#result img").evaluate_all(size) == [[96, 64], [96, 64]]
    assert "encoded to 1x4x8x12" in page.inner_text("figcaption")
    assert page.problems == []


def test_a_decode_shows_its_progress_and_can_be_cancelled(
    browser: Any, serve: Serve, vaes: dict[str, LocalVae], tmp_path: Path, held_video: threading.Event
) -> None:
    page = open_page(browser, serve({"hunyuan": {"repo": str(vaes["hunyuan"].folder)}}))
    save_file({"latents": vaes["hunyuan"].latents(5, 4, 6)}, tmp_path / "clip.safetensors")
    page.set_input_files("#file", tmp_path / "clip.safetensors")
    until(lambda: page.evaluate("document.getElementById('progress').value >= 9 / 17"), "half of the progress")
    until(lambda: page.evaluate("document.querySelector('#result video')?.videoWidth > 0"), "the first frames")
    page.get_by_role("button", name="Cancel").click()
    page.locator("#said", has_text="Cancelled").wait_for()
    assert page.locator("#progress").is_hidden()
    assert page.locator("figure").count() == 0
    held_video.set()


def test_the_other_snippets_run(browser: Any, serve: Serve, tmp_path: Path) -> None:
    page = open_page(browser, serve(DEMO), permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("tab", name="Python").press("ArrowRight")
    assert page.get_by_role("tab", name="curl").get_attribute("aria-selected") == "true"
    page.get_by_role("button", name="Copy").click()
    page.locator("#said", has_text="Copied").wait_for()
    command = page.evaluate("navigator.clipboard.readText()")
    assert command == page.inner_text("#curl")
    latents = REPOSITORY / "server" / "demo" / "latents" / "china.safetensors"
    shutil.copy(latents, tmp_path / "latents.safetensors")
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    with Image.open(tmp_path / "image.png") as image:
        assert (image.format, image.size) == ("PNG", (640, 424))
    page.get_by_role("tab", name="JavaScript").click()
    script = page.inner_text("#javascript")
    ask = f"async (bytes) => {{ const latents = new Uint8Array(bytes);\n{script}\nreturn [image.type, image.size > 10000]; }}"
    assert page.evaluate(ask, list(latents.read_bytes())) == ["image/png", True]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_every_control_has_a_name(browser: Any, serve: Serve, scheme: str) -> None:
    page = open_page(browser, serve(DEMO), viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.get_by_role("button", name="coffee").click()
    page.wait_for_selector("#result img")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    unnamed = """() => [...document.querySelectorAll("button, select, input, progress, [role=tabpanel]")].filter((each) =>
        !(each.textContent.trim() || each.ariaLabel || each.labels?.length || each.getAttribute("aria-labelledby"))).length"""
    assert page.evaluate(unnamed) == 0
    assert page.problems == []


def test_a_stream_plays_in_a_media_source(browser: Any, serve: Serve, vaes: dict[str, LocalVae]) -> None:
    """Piece by piece, as they come, long before the end."""
    url = serve({"hunyuan": {"repo": str(vaes["hunyuan"].folder)}})
    latents = vaes["hunyuan"].latents(5, 4, 6)
    page = open_page(browser, url)
    query = "&".join(f"shape={size}" for size in latents.shape) + "&dtype=float32&output_type=mp4&stream=True"
    script = """async ([query, bytes]) => {
        const source = new MediaSource(), video = document.createElement("video");
        const opened = new Promise(done => source.addEventListener("sourceopen", done));
        video.src = URL.createObjectURL(source);
        await opened;
        const buffer = source.addSourceBuffer('video/mp4; codecs="avc1.640028"');
        const answer = await fetch("/?" + query, {method: "POST", body: new Uint8Array(bytes)});
        const reader = answer.body.getReader();
        for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
            const appended = new Promise(done => buffer.addEventListener("updateend", done, {once: true}));
            buffer.appendBuffer(piece.value);
            await appended;
        }
        source.endOfStream();
        await new Promise(done => setTimeout(done, 0));
        return [source.duration, buffer.buffered.length && buffer.buffered.end(0), video.error];
    }"""
    duration, buffered, error = page.evaluate(script, [query, list(latents.numpy().tobytes())])
    assert error is None
    assert duration == pytest.approx(1.7, abs=0.01)
    assert buffered == pytest.approx(1.7, abs=0.11)
