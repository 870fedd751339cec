"""Whole files as bodies, and images at the decode address: the request that the bytes and the shape make sense of."""

from __future__ import annotations

import base64
import io
import pickle
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from diffusers.utils.remote_utils import remote_encode
from safetensors.torch import save

from server.families.flux2_relatives import channels_first
from tests.clients.test_comfyui_nodes import FAMILIES
from tests.conftest import Serve
from tests.pipelines import vaes as small
from tests.vaes import LocalVae
from tests.web.test_errors import assert_refused
from tests.web.test_remote_encode import picture

Vaes = dict[str, LocalVae]
RAW = {"output_type": "pt"}


def tensor_of(answer: requests.Response) -> torch.Tensor:
    assert answer.ok, answer.text
    shape = [int(n) for n in answer.headers["shape"].strip("[]").split(",")]
    return torch.frombuffer(bytearray(answer.content), dtype=getattr(torch, answer.headers["dtype"])).reshape(shape)


def post(url: str, body: bytes, headers: dict[str, str] | None = None, **params: Any) -> requests.Response:
    return requests.post(url, body, params=params, headers=headers, timeout=60)


@pytest.mark.parametrize(
    "content_type", [None, "application/x-www-form-urlencoded", "application/octet-stream", "tensor/binary"]
)
@pytest.mark.parametrize("name", ["latents", "z"])
def test_a_safetensors_file_is_decoded(url: str, vaes: Vaes, name: str, content_type: str | None) -> None:
    latents = vaes["sd"].latents(8, 12)
    headers = {"Content-Type": content_type} if content_type else {}
    other = {"other": torch.zeros(3)} if name == "latents" else {}
    sample = tensor_of(post(url, save({name: latents, **other}), headers, **RAW, do_scaling=True))
    torch.testing.assert_close(sample, vaes["sd"].decode(latents / 0.18215), atol=1e-4, rtol=0)


def test_curl_needs_no_more_than_the_file(url: str, vaes: Vaes, tmp_path: Path) -> None:
    latents = vaes["sd"].latents(8, 12)
    (tmp_path / "latents.safetensors").write_bytes(save({"latents": latents.half()}))
    command = ["curl", "-sf", "--data-binary", "@latents.safetensors", url, "-o", "image.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "image.jpg").read_bytes().startswith(b"\xff\xd8")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_file_says_the_dtype(url: str, vaes: Vaes, dtype: torch.dtype) -> None:
    latents = vaes["sd"].latents(8, 12)
    sample = tensor_of(post(url, save({"latents": latents.to(dtype)}), **RAW))
    torch.testing.assert_close(sample, vaes["sd"].decode(latents.to(dtype)), atol=1e-4, rtol=0)


def test_packed_latents_in_a_file_need_their_size_still(url: str, vaes: Vaes) -> None:
    packed = save({"latents": torch.zeros(1, 24, 64)})
    assert_refused(post(url + "flux", packed), 400, "wrong_shape", "need height and width")
    assert tensor_of(post(url + "flux", packed, **RAW, height=64, width=96)).shape == (1, 3, 64, 96)


@pytest.mark.parametrize("query", [{}, {"do_scaling": "True"}, {"do_scaling": "False"}])
def test_a_comfyui_latent_of_most_models_is_unscaled_already(url: str, vaes: Vaes, query: dict[str, str]) -> None:
    """What ComfyUI's SaveLatent writes."""
    latents = vaes["sd"].latents(8, 12)
    file = save({"latent_tensor": latents, "latent_format_version_0": torch.tensor([])}, {"prompt": "x" * 100_000})
    sample = tensor_of(post(url, file, **RAW, **query))
    torch.testing.assert_close(sample, vaes["sd"].decode(latents), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [*FAMILIES, "ideogram4", "ernie_image"])
def test_a_comfyui_latent_is_scaled_as_in_comfyui(serve: Serve, tmp_path: Path, name: str) -> None:
    """For some VAEs the scaling is a part of the VAE in ComfyUI, and its files hold scaled latents."""
    make, shape, in_comfyui = FAMILIES.get(name, FAMILIES["flux-2"])
    vae = make()
    vae.save_pretrained(tmp_path / "vae")
    if name == "ideogram4":  # the statistics of its VAE are for patches whose channels come last
        for buffer in (vae.bn.running_mean, vae.bn.running_var):
            buffer.copy_(channels_first(buffer.clone(), 32))
    family = {} if name in FAMILIES else {"family": name}
    url = serve({name: {"repo": str(tmp_path / "vae"), "dtype": "float32", **family}})
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents, return_dict=False)[0]
    saved = in_comfyui(vae, latents).contiguous()
    file = save({"latent_tensor": saved, "latent_format_version_0": torch.tensor([])})
    for query in ({}, {"do_scaling": "True"}):
        found = tensor_of(post(url, file, **RAW, **query))
        atol = 1e-3 if name == "ernie_image" else 1e-4  # its pipeline has another epsilon than the VAE
        torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def test_a_comfyui_latent_of_minimax_h3_is_scaled(serve: Serve, tmp_path: Path) -> None:
    small.minimax_h3().save_pretrained(tmp_path / "vae")
    url = serve({"h3": {"repo": str(tmp_path / "vae"), "dtype": "float32"}})
    latents = torch.randn(1, 8, 7, 4, 6, generator=torch.Generator().manual_seed(0))
    file = save({"latent_tensor": latents, "latent_format_version_0": torch.tensor([])})
    scaled = tensor_of(post(url, save({"latents": latents}), **RAW, do_scaling=True))
    assert torch.equal(tensor_of(post(url, file, **RAW)), scaled)
    assert not torch.equal(tensor_of(post(url, save({"latents": latents}), **RAW)), scaled)


def test_factors_for_a_comfyui_latent_are_refused(url: str, vaes: Vaes) -> None:
    latents = vaes["sd"].latents(8, 12)
    file = save({"latent_tensor": latents, "latent_format_version_0": torch.tensor([])})
    assert_refused(
        post(url, file, scaling_factor=0.18215),
        400,
        "bad_request",
        "a ComfyUI .latent file are scaled; leave scaling_factor",
    )


def test_a_file_in_base64_is_decoded_too(url: str, vaes: Vaes) -> None:
    latents = vaes["sd"].latents(8, 12)
    body = {"inputs": base64.b64encode(save({"latents": latents})).decode(), "parameters": RAW}
    sample = tensor_of(requests.post(url, json=body, headers={"Accept": "tensor/binary"}, timeout=60))
    torch.testing.assert_close(sample, vaes["sd"].decode(latents), atol=1e-4, rtol=0)


def torch_saved(legacy: bool) -> bytes:
    file = io.BytesIO()
    torch.save(torch.zeros(1, 4, 8, 8), file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((1, 4, 8, 8), "float32"))
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", npy())
    return file.getvalue()


NOT_READ = {
    ".npy": (npy(), "a NumPy file"),
    "npz": (zipped(), "a zip archive"),
    "torch.save": (torch_saved(False), "a zip archive"),
    "torch.save, old": (torch_saved(True), "a Python pickle"),
    **{f"pickle {n}": (pickle.dumps(np.zeros(9), n), "a Python pickle") for n in (2, 3, 4, 5)},
}


@pytest.mark.parametrize("path", ["", "sd", "encode"])
@pytest.mark.parametrize("kind", NOT_READ)
def test_a_file_that_is_not_read_is_named(url: str, kind: str, path: str) -> None:
    body, name = NOT_READ[kind]
    assert_refused(post(url + path, body), 415, "unsupported_body", f"the body is {name}.*send a .safetensors file")


def header(text: str, body: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + body


NOT_UTF8 = b'{"\xff":1}'
ENTRY = '{"latents":{"dtype":"F32","shape":[1,4,8,8],"data_offsets":[0,1024]}}'
DAMAGED = {
    "cut short": (header(ENTRY, bytes(1000)), "is cut short: 'latents' ends at byte 1024, and there are 1000"),
    "no header": (header("{nonsense}"), "a header that is not a safetensors header"),
    "a header that is cut": (header(ENTRY)[:40], "a header that is not a safetensors header"),
    "an entry that is none": (header('{"latents":[1]}'), "a shape that latents cannot have"),
    "nested": (header('{"latents":' + "[" * 9999 + "]" * 9999 + "}"), "a header that is not a safetensors header"),
    "offsets that lie": (header(ENTRY.replace("[0,1024]", "[0,9]"), bytes(1024)), "shape and offsets disagree"),
    "negative offsets": (header(ENTRY.replace("[0,1024]", "[-1024,0]"), bytes(1024)), "a shape that latents cannot have"),
    "negative sizes": (header(ENTRY.replace("[1,4,8,8]", "[-1,-4,8,8]"), bytes(1024)), "a shape that latents cannot have"),
    "not UTF-8": (len(NOT_UTF8).to_bytes(8, "little") + NOT_UTF8, "a header that is not a safetensors header"),
    "a shape that takes seconds to multiply": (
        header(ENTRY.replace("[1,4,8,8]", "[" + "9223372036854775807," * 50_000 + "1]")), "a shape that latents cannot have"
    ),
    "a number that takes seconds to read": (
        header(ENTRY.replace("[1,4,8,8]", "[" + "9" * 1_000_000 + "]")), "a header that is not a safetensors header|a shape"
    ),
    "doubles": (save({"latents": torch.zeros(1, 4, 8, 8).double()}), "has 'latents' as 'F64'; send float16"),
    "many tensors": (save({n: torch.zeros(1) for n in "abcdefg"}), "no tensor 'latents'; it has 'a', 'b', 'c', 'd', 'e' …; send one with a single"),
    "no tensor": (header("{}"), "no tensor 'latents'; it has none"),
    "six axes": (save({"latents": torch.zeros(1, 1, 1, 4, 8, 8)}), "a shape that latents cannot have; send 1 to 5 dimensions"),
    "a number": (save({"latents": torch.tensor(1.0)}), "a shape that latents cannot have"),
    "no values": (save({"latents": torch.zeros(1, 4, 0, 8)}), "whole numbers from 1"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_says_what_is_wrong(url: str, kind: str) -> None:
    body, words = DAMAGED[kind]
    assert_refused(post(url, body), 400, "bad_request", words)


def test_a_dtype_that_is_not_the_files_is_refused(url: str, vaes: Vaes) -> None:
    latents = vaes["sd"].latents(8, 12)
    refused = post(url, save({"latents": latents.half()}), dtype="float32")
    assert_refused(
        refused, 400, "bad_request", "dtype='float32' was sent, but the file's tensor is float16; leave dtype out"
    )
    assert post(url, save({"latents": latents.half()}), dtype="torch.float16").ok


def test_a_file_beside_its_shape_is_told_to_leave_it_out(url: str, vaes: Vaes) -> None:
    latents = vaes["sd"].latents(8, 12)
    refused = post(url, save({"latents": latents}), shape="1,4,8,12", dtype="float32")
    assert_refused(refused, 400, "wrong_length", "if the body is a .safetensors file, leave shape and dtype out")


# Images at the decode address.


@pytest.mark.parametrize("path", ["", "sd", "sd/"])
def test_diffusers_own_guide_encodes_an_image_at_the_decode_address(url: str, path: str) -> None:
    image = picture(64, 64)
    expected = remote_encode(url + "encode", image, scaling_factor=0.5)
    assert torch.equal(remote_encode(url + path, image, scaling_factor=0.5), expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("content_type", [None, "image/*", "application/x-www-form-urlencoded"])
def test_an_image_file_is_encoded_whatever_its_type(url: str, kind: str, content_type: str | None) -> None:
    file = io.BytesIO()
    picture(64, 64).save(file, kind)
    headers = {"Content-Type": content_type.replace("*", kind.lower())} if content_type else {}
    answer = post(url, file.getvalue(), headers, sample=True, seed=3)
    assert torch.equal(tensor_of(answer), tensor_of(post(url + "encode", file.getvalue(), sample=True, seed=3)))
    assert "encode;dur=" in answer.headers["server-timing"]
    in_json = {"inputs": base64.b64encode(file.getvalue()).decode(), "parameters": {"sample": True, "seed": 3}}
    encoded = requests.post(url, json=in_json, headers={"Accept": "tensor/binary"}, timeout=60)
    assert encoded.content == answer.content


TENSORS = [
    ("sd", (1, 3, 64, 64)),
    ("sd", (3, 64, 64)),
    ("sd", (1, 64, 64, 3)),
    ("sd", (64, 64, 3)),
    ("flux", (2, 3, 64, 64)),
    ("hunyuan", (1, 3, 5, 32, 32)),
    ("hunyuan", (5, 3, 32, 32)),
]


@pytest.mark.parametrize(("model", "shape"), TENSORS)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_tensor_of_pixels_is_encoded_at_the_decode_address(
    url: str, model: str, shape: tuple[int, ...], dtype: str
) -> None:
    pixels = np.random.default_rng(0).uniform(0, 1 if dtype == "float32" else 255, shape).astype(dtype).tobytes()
    params = {"shape": list(shape), "dtype": dtype}
    expected = tensor_of(post(url + model + "/encode", pixels, **params))
    assert torch.equal(tensor_of(post(url + model, pixels, **params)), expected)


def test_remote_encode_sends_a_tensor_to_the_decode_address(url: str) -> None:
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(remote_encode(url, pixels), remote_encode(url + "encode", pixels))
    assert torch.equal(tensor_of(post(url, save({"image": pixels}))), remote_encode(url + "encode", pixels))


def test_an_mp4_is_encoded_at_the_decode_address(url: str, vaes: Vaes) -> None:
    clip = save({"latents": vaes["hunyuan"].latents(2, 4, 4)})
    mp4 = post(url + "hunyuan", clip, output_type="mp4").content
    assert tensor_of(post(url + "hunyuan", mp4)).shape == (1, 16, 2, 4, 4)


def test_latents_are_decoded_where_both_could_be_meant(url: str, vaes: Vaes) -> None:
    """Also the batch of three packed latents, whose shape is that of an image of 3 channels."""
    packed = torch.zeros(3, 16, 64)
    params = {"shape": [3, 16, 64], "dtype": "float32", **RAW}
    assert_refused(post(url + "flux", packed.numpy().tobytes(), **params), 400, "wrong_shape", "need height and width")
    sample = tensor_of(post(url + "flux", packed.numpy().tobytes(), **params, height=64, width=16 * 4))
    assert sample.shape == (3, 3, 64, 64)


def test_what_fits_neither_direction_names_both_routes(url: str) -> None:
    both = r"latents are decoded at POST / or /{model}, images encoded there and at POST /encode or /{model}/encode"
    refused = post(url, bytes(1280), shape="1,5,8,8", dtype="float32")
    assert_refused(refused, 400, "wrong_shape", both)
    assert_refused(
        post(url, b"neither"),
        400,
        "bad_request",
        "or send a whole .safetensors file; a PNG.*encoded, here and at /encode",
    )
    at_encode = post(url + "encode", bytes(1024), shape="1,4,8,8", dtype="float32")
    assert_refused(
        at_encode,
        400,
        "wrong_shape",
        r"not a shape of pixels that this model encodes.*latents are decoded at POST / or /{model}",
    )


def test_the_type_of_an_unknown_body_is_still_named(url: str) -> None:
    assert_refused(post(url, b"a,b", {"Content-Type": "text/csv"}), 415, "unsupported_body", "tensor/binary")
    form = post(url, b"x", {"Content-Type": "multipart/form-data; boundary=x"})
    assert_refused(form, 415, "unsupported_body", "does not read forms")


def test_the_handler_reads_whole_files_too(vaes: Vaes, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = vaes["sd"].latents(8, 12)
    from handler import EndpointHandler

    monkeypatch.setenv("VAE_SERVER_DTYPE", "float32")
    handler = EndpointHandler(str(vaes["sd"].folder))
    from_file = handler({"inputs": save({"latents": latents}), "parameters": RAW})
    assert from_file == handler({"inputs": latents, "parameters": RAW})
    file = io.BytesIO()
    picture(64, 64).save(file, "PNG")
    encoded = handler({"inputs": base64.b64encode(file.getvalue()).decode()})
    assert isinstance(encoded, dict)
    assert encoded["parameters"] == {"shape": [1, 4, 8, 8], "dtype": "float32"}
