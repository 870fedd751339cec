"""The entry point of Hugging Face Inference Endpoints: `EndpointHandler`, over the same engine and the same parsing."""

from __future__ import annotations

from typing import Any

from PIL import Image

from server.config import load_settings
from server.contract import read_base64
from server.errors import BadRequest
from server.inprocess import toolkit
from server.inprocess.direct import Direct
from server.outputs import IMAGE, format_named
from server.outputs.image import as_image
from server.outputs.tensor import as_json
from server.values import RawTensor


class EndpointHandler:
    """Built once with the model folder. Inside the toolkit's app the whole server answers; else `__call__` does.

    path: a folder. A VAE in it, or in its subfolder vae/, is served; else the default of its models.yaml. Without a
    path: what `serve` finds. VAE_SERVER_* settings apply. Raises ConfigError, ModelUnavailable.
    """

    def __init__(self, path: str = "") -> None:
        settings = load_settings(config=path or None)
        if app := toolkit.running_app():
            self.direct = Direct(settings, toolkit.take_over(app, settings))
        else:
            self.direct = Direct(settings)
            self.direct.models.load(settings.default)

    def __call__(self, data: dict[str, Any]) -> Image.Image | dict[str, object]:
        """Decode one request.

        data: `{"inputs": base64 text, the tensor's bytes, or a torch tensor, "parameters": {…}}` with the parameters of
        the HTTP contract; a torch tensor brings its own shape and dtype. `parameters.accept` stands for the header.

        Returns a PIL image for a picture, else `{"inputs": base64, "parameters": {…}}`: a tensor's shape and dtype, or
        an MP4's content_type. Raises ServerError with the sentence that the HTTP server would send.
        """
        sent = data.get("parameters") or {}
        if not isinstance(sent, dict):
            raise BadRequest("'parameters' must be an object of the HTTP contract's parameters")
        parameters = dict(sent)
        content = _bytes(data.get("inputs"), parameters)
        name = self.direct.settings.name_of(str(parameters.get("model") or self.direct.settings.default))
        if name is None:
            raise BadRequest(f"no such model; known: {', '.join(self.direct.settings.models)}")
        request = self.direct.parse(name, parameters, content, str(parameters.pop("accept", "*/*")))
        result = self.direct.run(request)
        chosen = format_named(request.job.format)
        if not chosen.is_encoded:
            return as_json(result.body)
        if chosen.kinds == IMAGE:
            return as_image(result.body)  # the toolkit encodes it, once
        body = self.direct.render(request, result).body
        encoded = as_json(RawTensor((len(body),), "uint8", body))
        return {**encoded, "parameters": {"content_type": chosen.media_types[0]}}


def _bytes(inputs: Any, parameters: dict[str, Any]) -> bytes | bytearray:
    """The tensor's bytes; a torch tensor also fills `shape` and `dtype`."""
    if isinstance(inputs, str):
        return read_base64(inputs)
    if isinstance(inputs, bytes | bytearray | memoryview):
        return bytes(inputs)
    if hasattr(inputs, "numpy") and hasattr(inputs, "dtype"):
        from server.engine.tensors import NAMES, to_host

        if inputs.dtype not in NAMES:
            raise BadRequest(f"a tensor of {inputs.dtype} is not read; send float16, bfloat16 or float32")
        raw = to_host(inputs)
        parameters |= {"shape": list(raw.shape), "dtype": raw.dtype}
        return bytes(raw.data)
    raise BadRequest("'inputs' must be the latents: base64 text, the tensor's bytes, or a torch tensor")
