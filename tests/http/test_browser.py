"""A real browser: the page decodes a dropped file, and plays and seeks the MP4."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from tests.vaes import LocalVae

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=[*quiet, "--disable-component-update"])
        yield opened
        opened.close()


def open_page(browser: Any, url: str) -> Any:
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(request.url))
    page.goto(url)
    page.locator("#model option").first.wait_for(state="attached")
    page.problems = problems
    return page


def test_the_page_decodes_a_picture(browser: Any, url: str, vaes: dict[str, LocalVae], tmp_path: Path) -> None:
    latents = tmp_path / "latents.safetensors"
    save_file({"latents": vaes["sd"].latents(8, 12).half()}, latents)
    page = open_page(browser, url)
    page.set_input_files("#file", latents)
    page.wait_for_selector("#result img")
    size = page.evaluate(
        "async () => { const i = document.querySelector('#result img'); await i.decode(); return [i.naturalWidth, i.naturalHeight]; }"
    )
    assert size == [96, 64]
    assert "decode;dur=" in page.inner_text("#said")
    assert page.problems == []
    assert page.locator("#height").is_visible(), "any AutoencoderKL takes packed latents"
    page.select_option("#model", "flux")
    page.wait_for_selector("#python:has-text('/flux')")


def test_the_page_says_why_a_file_is_wrong(browser: Any, url: str, vaes: dict[str, LocalVae], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.safetensors"
    page = open_page(browser, url)
    for tensor, words in [(vaes["flux"].latents(8, 8), "have 16 channels"), (None, "it is not a safetensors file")]:
        if tensor is None:
            wrong.write_bytes(b"not safetensors at all")
        else:
            save_file({"latents": tensor}, wrong)
        page.set_input_files("#file", wrong)
        page.locator("#said.failed", has_text=words).wait_for()


def test_an_mp4_plays_and_seeks(browser: Any, url: str, vaes: dict[str, LocalVae], tmp_path: Path) -> None:
    latents = tmp_path / "clip.safetensors"
    save_file({"latents": vaes["hunyuan"].latents(5, 8, 8)}, latents)
    page = open_page(browser, url)
    page.select_option("#model", "hunyuan")
    page.evaluate("document.getElementById('answer').replaceChildren(new Option('MP4', 'mp4 video/mp4'))")
    page.set_input_files("#file", latents)
    page.wait_for_selector("#result video")
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
