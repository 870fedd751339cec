"""The entry point of Hugging Face Inference Endpoints, which uses the same engine and the same parsing as `serve`."""

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
    """Decodes and encodes requests. It is made once, when the endpoint starts.

    Inside the toolkit's app, the whole server replaces the app's routes. Anywhere else, `__call__` runs one request.
    """

    def __init__(self, path: str = "") -> None:
        """Load the default model, or start the server inside the toolkit's app.

        path: a folder. If it contains a VAE, itself or in its subfolder vae/, this VAE is served; otherwise the models
            of its models.yaml. If empty, the handler finds the models as `serve` does. VAE_SERVER_* variables apply.

        Raises ConfigError, ModelUnavailable.
        """
        settings = load_settings(config=path or None)
        if app := toolkit.running_app():
            self.direct = Direct(settings, toolkit.take_over(app, settings))
        else:
            self.direct = Direct(settings)
            self.direct.models.load(settings.default, self.direct.models.describe(settings.default).usual_direction)

    def __call__(self, data: dict[str, Any]) -> Image.Image | dict[str, object]:
        """Decode one request, or encode an image or video file.

        data: `{"inputs": …, "parameters": {…}}`. `inputs` is base64 text, bytes, or a torch tensor, which includes its
            shape and dtype. `parameters` are those of the HTTP contract; `accept` replaces the `Accept` header.

        Returns a PIL image if the answer is an image. Otherwise returns `{"inputs": base64, "parameters": {…}}`, with
        the shape and dtype of a tensor, or the content_type of an MP4 as parameters.

        Raises ServerError with the sentence that the HTTP server would send.
        """
        sent = data.get("parameters") or {}
        if not isinstance(sent, dict):
            raise BadRequest("'parameters' must be an object of the HTTP contract's parameters")
        parameters = dict(sent)
        content = _bytes(data.get("inputs"), parameters)
        name = self.direct.settings.name_of(str(parameters.get("model") or self.direct.settings.default))
        if name is None:
            raise BadRequest(f"there is no such model; known: {', '.join(self.direct.settings.models)}")
        request = self.direct.parse(name, parameters, content, str(parameters.pop("accept", "*/*")))
        result = self.direct.run(request)
        chosen = format_named(request.job.format)
        if not chosen.is_encoded:
            return as_json(result.body)
        if chosen.kinds == IMAGE:
            return as_image(result.body)  # the toolkit encodes the image
        body = self.direct.render(request, result).body
        encoded = as_json(RawTensor((len(body),), "uint8", body))
        return {**encoded, "parameters": {"content_type": chosen.media_types[0]}}


def _bytes(inputs: Any, parameters: dict[str, Any]) -> bytes | bytearray:
    """Return the bytes of `inputs`. For a torch tensor, also set `shape` and `dtype` in `parameters`."""
    if isinstance(inputs, str):
        return read_base64(inputs)
    if isinstance(inputs, bytes | bytearray | memoryview):
        return bytes(inputs)
    if hasattr(inputs, "numpy") and hasattr(inputs, "dtype"):
        from server.engine.tensors import NAMES, to_host

        if inputs.dtype not in NAMES:
            raise BadRequest(f"the dtype of 'inputs' is {inputs.dtype}; send float16, bfloat16 or float32")
        raw = to_host(inputs)
        parameters |= {"shape": list(raw.shape), "dtype": raw.dtype}
        return bytes(raw.data)
    raise BadRequest("'inputs' must be latents or a file: base64 text, bytes, or a torch tensor")
