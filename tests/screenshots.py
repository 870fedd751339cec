"""Take the picture of the web page that README shows, with a real server and a real browser.

python -m tests.screenshots [FOLDER]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import yaml
from playwright.sync_api import sync_playwright

from tests.conftest import REPOSITORY
from tests.load import process

FOLDER = REPOSITORY / "docs" / "images"
PHOTO = "china"


def main() -> None:
    """Write page.png to a folder."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or sys.exit("no chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        config = Path(name) / "models.yaml"
        config.write_text(yaml.safe_dump({"models": {"demo": {"repo": str(REPOSITORY / "server" / "demo")}}}))
        with process(config) as (url, _):
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 960, "height": 1060})
            page.goto(url)
            page.get_by_role("button", name=PHOTO).click()
            page.locator("#said", has_text="Done in").wait_for()
            page.locator("#result img").evaluate("image => image.decode()")
            page.screenshot(path=folder / "page.png")
            browser.close()


if __name__ == "__main__":
    main()
