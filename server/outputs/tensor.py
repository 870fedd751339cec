"""Render tensors: raw bytes with `shape` and `dtype` headers, base64 in JSON, or a .safetensors file."""

from __future__ import annotations

import base64
import json

from ..values import RawTensor, Rendered, RenderOptions

SAFETENSORS_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "uint8": "U8"}


def render_binary(tensor: RawTensor, options: RenderOptions) -> Rendered:
    """Render the tensor's own bytes. Its shape and dtype are in the headers."""
    headers = {"shape": json.dumps(list(tensor.shape)), "dtype": tensor.dtype}
    return Rendered(tensor.data, options.media_type, headers)


def render_base64(tensor: RawTensor, options: RenderOptions) -> Rendered:
    """Render the JSON object of `as_json`."""
    return Rendered(memoryview(json.dumps(as_json(tensor)).encode()), options.media_type)


def as_json(tensor: RawTensor) -> dict[str, object]:
    """Return the tensor as the first published client and Hugging Face's toolkit write it in JSON."""
    parameters = {"shape": list(tensor.shape), "dtype": tensor.dtype}
    return {"inputs": base64.b64encode(tensor.data).decode("ascii"), "parameters": parameters}


def as_safetensors(latents: RawTensor) -> bytes:
    """Return the bytes of a .safetensors file with the tensor `latents`.

    Written here because safetensors' functions that return bytes differ between its versions.
    """
    entry = {
        "dtype": SAFETENSORS_DTYPES[latents.dtype],
        "shape": latents.shape,
        "data_offsets": (0, latents.data.nbytes),
    }
    header = json.dumps({"latents": entry}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + latents.data
