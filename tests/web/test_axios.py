"""axios as JavaScript programs use it: its own spelling of lists, its own Accept, base64 as browsers make it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.vaes import LocalVae

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("npm") is None, reason="no npm: apt-get install npm"),
]

SCRIPT = """
const axios = require('axios');
const [url, spelling] = process.argv.slice(2);
const body = Buffer.alloc(1024);
const shape = [1, 4, 8, 8];
const bytes = { responseType: 'arraybuffer', validateStatus: () => true };
const binary = { 'Content-Type': 'application/octet-stream' };
const asks = {
  brackets: () => axios.post(url, body, { ...bytes, params: { shape, dtype: 'float32' }, headers: binary }),
  indexes: () => axios.post(url, body, { ...bytes, params: { shape, dtype: 'float32' }, headers: binary,
                                         paramsSerializer: { indexes: true } }),
  repeated: () => axios.post(url, body, { ...bytes, params: { shape, dtype: 'float32' }, headers: binary,
                                          paramsSerializer: { indexes: null } }),
  json: () => axios.post(url, { inputs: body.toString('base64url'), parameters: { shape, dtype: 'float32' } }, bytes),
  dataUrl: () => axios.post(url, { inputs: 'data:;base64,' + body.toString('base64'),
                                   parameters: { shape, dtype: 'float32' } }, bytes),
  tensor: () => axios.post(url, body, { ...bytes, params: { shape, dtype: 'float32', output_type: 'pt' }, headers: binary }),
};
asks[spelling]().then(({ status, headers, data }) => console.log(JSON.stringify(
  { status, type: headers['content-type'], shape: headers.shape, start: Buffer.from(data).subarray(0, 300).toString('latin1') })));
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with axios in it."""
    made = tmp_path_factory.mktemp("axios")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock", "axios@1"]
    try:
        installed = subprocess.run(command, cwd=made, capture_output=True, text=True, check=False, timeout=100)
    except subprocess.TimeoutExpired:
        pytest.skip("npm did not install axios in time")
    if installed.returncode != 0:
        pytest.skip(f"npm cannot install axios: {installed.stderr[-200:]}")
    (made / "ask.js").write_text(SCRIPT)
    return made


def ask(folder: Path, url: str, spelling: str) -> dict[str, Any]:
    ran = subprocess.run(
        ["node", "ask.js", url, spelling], cwd=folder, capture_output=True, text=True, check=True, timeout=60
    )
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


@pytest.mark.parametrize("spelling", ["brackets", "indexes", "repeated", "json", "dataUrl"])
def test_axios_gets_the_usual_image(folder: Path, url: str, vaes: dict[str, LocalVae], spelling: str) -> None:
    answer = ask(folder, url, spelling)
    assert (answer["status"], answer["type"]) == (200, "image/jpeg"), answer["start"]
    assert answer["start"].startswith("\xff\xd8")


def test_axios_gets_a_tensors_bytes(folder: Path, url: str, vaes: dict[str, LocalVae]) -> None:
    answer = ask(folder, url, "tensor")
    assert (answer["status"], answer["type"], answer["shape"]) == (200, "tensor/binary", "[1, 3, 64, 64]")
