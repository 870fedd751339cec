"""Tensors to bytes: raw with `shape` and `dtype` headers, or base64 in JSON."""

from __future__ import annotations

import base64
import json

from server.types import RawTensor, Rendered, RenderOptions


def render_binary(tensor: RawTensor, options: RenderOptions) -> Rendered:
    headers = {"shape": json.dumps(list(tensor.shape)), "dtype": tensor.dtype}
    return Rendered(tensor.data, options.media_type, headers)


def render_base64(tensor: RawTensor, options: RenderOptions) -> Rendered:
    return Rendered(memoryview(json.dumps(as_json(tensor)).encode()), options.media_type)


def as_json(tensor: RawTensor) -> dict[str, object]:
    """What the first published client and the toolkit's JSON hold of a tensor."""
    parameters = {"shape": list(tensor.shape), "dtype": tensor.dtype}
    return {"inputs": base64.b64encode(tensor.data).decode("ascii"), "parameters": parameters}
