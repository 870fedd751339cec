"""The page in a real browser: what it tells, what it takes, and what its snippets ask for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file

from tests.conftest import REPOSITORY, Serve
from tests.pipelines.sounds import oobleck
from tests.vaes import LocalVae
from tests.waiting import until
from tests.web.browser import DEMO, needs_chromium, open_page

pytestmark = needs_chromium
Vaes = dict[str, LocalVae]
KEY = "se/cr?et"
CHINA = REPOSITORY / "server" / "demo" / "latents" / "china.safetensors"
# As in models.yaml.
WAN = {
    "taew2_1": {"repo": "Kijai/WanVideo_comfy", "file": "taew2_1.safetensors", "config": "taew2_1"},
    "wan": {"repo": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "subfolder": "vae"},
}


def drop(page: Any, *files: Path, media_type: str = "") -> None:
    data = [{"name": file.name, "bytes": list(file.read_bytes())} for file in files]
    page.evaluate(
        """([data, type]) => {
            const files = new DataTransfer();
            for (const {name, bytes} of data) files.items.add(new File([new Uint8Array(bytes)], name, {type}));
            document.querySelector("h1").dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true}));
        }""",
        [data, media_type],
    )


def remember_what_is_said(page: Any) -> None:
    """Collect every text of the status line in `window.told`."""
    page.evaluate(
        """() => {
            const said = document.getElementById("said");
            window.told = [];
            new MutationObserver(() => window.told.push(said.textContent)).observe(said, {childList: true});
        }"""
    )


def posts(page: Any) -> list[str]:
    """Return the list to which the address of each POST is added."""
    sent: list[str] = []
    page.on("request", lambda request: request.method == "POST" and sent.append(request.url))
    return sent


def latents_file(folder: Path, name: str, vae: LocalVae, *size: int) -> Path:
    save_file({"latents": vae.latents(*size)}, folder / name)
    return folder / name


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model of the Hub is on this machine."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


# ---- the same request in your program ----


@pytest.mark.parametrize("unscale", ["True", "False"])
@pytest.mark.parametrize("output", ["PNG", "JPEG"])
def test_every_snippet_asks_for_what_the_form_says(browser: Any, url: str, unscale: str, output: str) -> None:
    page = open_page(browser, url, "sd")
    page.select_option("#answer", label=output)
    page.select_option("#scaling", unscale)
    python, curl, javascript = (page.text_content(f"#{name}") for name in ("python", "curl", "javascript"))
    suffix = {"PNG": "png", "JPEG": "jpg"}[output]
    for snippet in (curl, javascript):
        assert f"do_scaling={unscale}" in snippet
        assert f"image_format={suffix}" in snippet
    assert f"-o image.{suffix}" in curl
    assert f'image_format="{suffix}"' in python
    assert ("scaling_factor=" in python) is (unscale == "True")
    assert ("do_scaling=False" in python) is (unscale == "False")
    assert "do_scaling=True" not in python


@pytest.mark.parametrize("model", ["sd", "sdxl"])  # with a factor, and with means and standard deviations
def test_the_python_snippet_for_unscaled_latents_gives_what_the_page_shows(
    browser: Any, url: str, vaes: Vaes, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page(browser, url, model)
    page.select_option("#scaling", "False")
    page.set_input_files("#file", latents_file(tmp_path, "latents.safetensors", vaes[model], 8, 12))
    with page.expect_download() as downloading:
        page.get_by_role("link", name="Download").click()
    monkeypatch.chdir(tmp_path)
    exec(page.inner_text("#python"), {"latents": vaes[model].latents(8, 12)})
    with Image.open(downloading.value.path()) as shown, Image.open(tmp_path / "image.png") as made:
        assert np.abs(np.asarray(shown).astype(int) - np.asarray(made).astype(int)).max() <= 1


def test_the_snippets_of_a_server_with_keys_send_one_and_do_not_contain_it(
    browser: Any, serve: Serve, vaes: Vaes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAE_SERVER_API_KEY", KEY)
    oobleck(sampling_rate=16000).save_pretrained(tmp_path / "oobleck")
    address = serve({**DEMO, "music": {"repo": str(tmp_path / "oobleck")}})
    page = open_page(browser, address, http_credentials={"username": "any", "password": KEY})
    monkeypatch.chdir(tmp_path)
    shutil.copy(CHINA, tmp_path / "latents.safetensors")
    monkeypatch.setenv("VAE_SERVER_KEY", KEY)
    subprocess.run(["sh", "-c", page.text_content("#curl")], check=True)
    exec(page.text_content("#python"), {"latents": torch.zeros(1, 4, 8, 8)})
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (64, 64)
    with page.expect_request(lambda request: request.method == "POST") as sent:
        script = f"const latents = new Uint8Array(bytes);\n{page.text_content('#javascript')}\n"
        page.evaluate(f"async ([key, bytes]) => {{ {script} }}", [KEY, list(CHINA.read_bytes())])
    assert sent.value.headers["x-api-key"] == KEY
    page.select_option("#model", "music")
    page.wait_for_selector("#python:has-text('/music')")
    page.select_option("#answer", label="FLAC")
    save_file({"latents": torch.randn(1, 6, 2000)}, tmp_path / "latents.safetensors")
    subprocess.run([sys.executable, "-c", page.inner_text("#python")], check=True)
    assert (tmp_path / "audio.flac").read_bytes()[:4] == b"fLaC"
    assert KEY not in page.content()


def test_the_snippets_of_a_server_without_keys_name_none(browser: Any, url: str) -> None:
    page = open_page(browser, url, "sd")
    for name in ("python", "curl", "javascript"):
        assert "key" not in page.text_content(f"#{name}").lower()


# ---- files ----


def test_files_that_are_dropped_together_are_taken_one_after_the_other(
    browser: Any, serve: Serve, vaes: Vaes, tmp_path: Path
) -> None:
    """A question is asked once, and a file that fails is named and stops nothing."""
    page = open_page(browser, serve({name: {"repo": str(vaes[name].folder)} for name in ("sd", "sdxl")}))
    wrong = tmp_path / "wrong.safetensors"
    save_file({"latents": torch.zeros(1, 5, 8, 8)}, wrong)
    first, last = (latents_file(tmp_path, f"{name}.safetensors", vaes["sd"], 4, 4) for name in ("first", "last"))
    drop(page, first, wrong, last)
    page.locator("#choice h2", has_text="first.safetensors (1 of 3) fits 2 models").wait_for()
    page.locator("#choice button", has_text="sdxl").click()
    page.locator("#said.failed", has_text="2 of 3 files are done.").wait_for()
    assert "Cannot decode wrong.safetensors: " in page.inner_text("#said")
    captions = page.locator("figcaption").all_inner_texts()
    assert [caption.split(": ")[0] for caption in captions] == ["last.safetensors, sdxl", "first.safetensors, sdxl"]
    page.set_input_files("#file", [first, last])
    page.locator("#choice button").first.click()
    page.locator("#said", has_text="2 of 2 files are done.").wait_for()
    assert page.locator("#said.failed").count() == 0
    assert page.problems == []


def test_cancelling_names_the_files_that_are_not_taken(
    browser: Any, serve: Serve, vaes: Vaes, tmp_path: Path, held_device: threading.Event
) -> None:
    page = open_page(browser, serve({"sd3": {"repo": str(vaes["sd3"].folder)}}))
    sent = posts(page)
    drop(page, *(latents_file(tmp_path, f"{name}.safetensors", vaes["sd3"], 4, 4) for name in "abc"))
    page.locator("#said", has_text="Decoding a.safetensors (1 of 3)").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.locator("#said", has_text="Cancelled. Not taken: b.safetensors, c.safetensors.").wait_for()
    assert len(sent) == 1


@pytest.mark.parametrize("clicked", ["a sample", "a file"])
def test_a_question_without_an_answer_gives_way(
    browser: Any, serve: Serve, vaes: Vaes, tmp_path: Path, clicked: str
) -> None:
    page = open_page(browser, serve({**DEMO, "sd": {"repo": str(vaes["sd"].folder)}}))
    page.set_input_files("#file", latents_file(tmp_path, "first.safetensors", vaes["sd"], 4, 4))
    page.locator("#choice", has_text="first.safetensors fits 2 models").wait_for()
    if clicked == "a sample":
        page.get_by_role("button", name="coffee").click()
    else:
        page.set_input_files("#file", latents_file(tmp_path, "second.safetensors", vaes["sd"], 4, 4))
        page.locator("#choice", has_text="second.safetensors fits 2 models").wait_for()
        page.locator("#choice button").first.click()
    page.locator("#said", has_text="Done in").wait_for()
    assert page.locator("figure").count() == 1
    assert page.locator("#choice").is_hidden()
    assert page.problems == []


def test_a_question_removes_the_error_of_the_file_before(browser: Any, url: str, vaes: Vaes, tmp_path: Path) -> None:
    page = open_page(browser, url)
    save_file({"latents": torch.zeros(1, 5, 8, 8)}, tmp_path / "wrong.safetensors")
    page.set_input_files("#file", tmp_path / "wrong.safetensors")
    page.locator("#said.failed", has_text="5 channels").wait_for()
    page.set_input_files("#file", latents_file(tmp_path, "latents.safetensors", vaes["sd"], 4, 4))
    page.locator("#choice", has_text="Which one made it?").wait_for()
    assert page.inner_text("#said") == ""


@pytest.mark.parametrize(
    ("name", "media_type"), [("notes.md", "text/markdown"), ("LICENSE", ""), ("a.gif", "image/gif")]
)
def test_a_file_of_another_kind_is_told_which_kinds_there_are(
    browser: Any, url: str, tmp_path: Path, name: str, media_type: str
) -> None:
    file = tmp_path / name
    if name == "a.gif":
        Image.new("RGB", (16, 16)).save(file)
    else:
        file.write_text("# Nothing that can be decoded")
    page = open_page(browser, url)
    sent = posts(page)
    drop(page, file, media_type=media_type)
    page.locator("#said.failed", has_text=f"{name} is none of the files that this page takes").wait_for()
    said = page.inner_text("#said")
    for kind in (".safetensors", ".latent", "PNG", "JPEG", "WebP", "MP4"):
        assert kind in said
    assert "Content-Type" not in said
    assert sent == [], "nothing is uploaded in vain"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WebP"])
def test_a_photo_is_known_by_its_first_bytes(browser: Any, serve: Serve, tmp_path: Path, form: str) -> None:
    photo = tmp_path / "photo"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), "uint8")).save(photo, form)
    page = open_page(browser, serve(DEMO))
    drop(page, photo)
    page.locator("#result img").nth(1).wait_for()
    sizes = "all => Promise.all(all.map(async each => { await each.decode(); return [each.naturalWidth, each.naturalHeight]; }))"
    assert page.locator("#result img").evaluate_all(sizes) == [[96, 64], [96, 64]]
    assert page.problems == []


# ---- which model encodes ----


def movie(tmp_path: Path, url: str, vae: LocalVae) -> Path:
    """A video of 17 frames that the server itself made."""
    latents = vae.latents(5, 8, 8)
    query = {"shape": list(latents.shape), "dtype": "float32", "output_type": "mp4"}
    answer = requests.post(f"{url}hunyuan", latents.numpy().tobytes(), params=query, timeout=300)
    answer.raise_for_status()
    (tmp_path / "movie.mp4").write_bytes(answer.content)
    return tmp_path / "movie.mp4"


def test_a_video_is_encoded_by_a_model_that_is_downloaded(
    browser: Any, serve: Serve, vaes: Vaes, tmp_path: Path, url: str, empty_cache: None
) -> None:
    page = open_page(browser, serve({**DEMO, **WAN, "hunyuan": {"repo": str(vaes["hunyuan"].folder)}}))
    drop(page, movie(tmp_path, url, vaes["hunyuan"]), media_type="video/mp4")
    page.locator("figcaption", has_text="and decoded, hunyuan").wait_for()


def test_a_photo_is_encoded_by_a_loaded_model_before_the_default(
    browser: Any, serve: Serve, vaes: Vaes, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    entries = {name: {"repo": str(vaes[name].folder)} for name in ("sdxl", "sd", "sd3")}
    page = open_page(browser, serve({**entries, "sd3": {**entries["sd3"], "preload": True}}))
    drop(page, tmp_path / "photo.png", media_type="image/png")
    page.locator("figcaption", has_text="and decoded, sd3").wait_for()


def test_the_user_chooses_what_is_downloaded_and_previews_come_last(
    browser: Any, serve: Serve, vaes: Vaes, tmp_path: Path, url: str, empty_cache: None
) -> None:
    page = open_page(browser, serve({**DEMO, **WAN}))
    sent = posts(page)
    drop(page, movie(tmp_path, url, vaes["hunyuan"]), media_type="video/mp4")
    page.locator("#choice button").first.wait_for()
    offered = page.locator("#choice button").all_inner_texts()
    assert offered == ["wan (not downloaded)", "taew2_1 (not downloaded)"]
    assert "shall the server download for movie.mp4?" in page.inner_text("#choice h2")
    assert sent == []


# ---- one request ----


def test_quick_clicks_on_examples_start_one_decode(browser: Any, serve: Serve, held_device: threading.Event) -> None:
    page = open_page(browser, serve(DEMO))
    sent = posts(page)
    page.evaluate("document.querySelectorAll('#samples button').forEach((button) => button.click())")
    page.locator("#said", has_text="Decoding astronaut.safetensors").wait_for()
    page.get_by_role("button", name="coffee").click()
    page.locator("#said.failed", has_text="One request at a time").wait_for()
    held_device.set()
    page.locator("#said", has_text="Done in").wait_for()
    assert len(sent) == 1
    assert page.locator("figure").count() == 1
    assert page.problems == []


def test_the_seconds_left_never_grow(browser: Any, serve: Serve, held_device: threading.Event) -> None:
    page = open_page(browser, serve(DEMO))
    estimates = iter([30.2, 12.4, 26.0, 8.7, 1.2, 6.4, None])
    left: list[float | None] = []

    def answer(route: Any) -> None:
        left.append(next(estimates, None))
        told = {"state": "running", "position": 0, "progress": 0.5, "seconds_left": left[-1]}
        route.fulfill(body=json.dumps(told), content_type="application/json")

    page.route("**/requests/*/progress", answer)
    remember_what_is_said(page)
    page.get_by_role("button", name="coffee").click()

    def has_asked_for_all() -> bool:
        page.wait_for_timeout(50)
        return len(left) > 7

    until(has_asked_for_all, "the last estimate")
    held_device.set()
    page.locator("#said", has_text="Done in").wait_for()
    told = [text.partition(", ")[2] for text in page.evaluate("window.told") if " left" in text]
    assert told == [
        *("about 30 s left …", "about 12 s left …", "about 12 s left …", "about 9 s left …"),
        *("a few seconds left …", "a few seconds left …"),
    ]


# ---- addresses ----


@pytest.mark.parametrize("path", ["", "docs"])
def test_every_page_has_an_icon_that_its_policy_allows(browser: Any, serve: Serve, path: str) -> None:
    page = browser.new_page()
    page.goto(serve(DEMO) + path)
    show = """async () => {
        const icon = new Image();
        icon.src = document.querySelector("link[rel=icon]").href;
        await icon.decode();
        return icon.naturalWidth > 0;
    }"""
    assert page.evaluate(show)


@pytest.mark.parametrize("path", ["docs/", "docs//", "/", "//"])
def test_a_page_works_with_slashes_at_the_end_of_its_address(browser: Any, serve: Serve, path: str) -> None:
    url = serve(DEMO)
    page = browser.new_page()
    page.goto(url + path)
    if "docs" in path:
        page.wait_for_selector("details#decode", state="attached")
        assert page.url == f"{url}docs"
    else:
        page.locator("#model option").first.wait_for(state="attached")
        assert page.url == url
