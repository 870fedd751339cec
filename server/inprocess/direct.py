"""Run one request by a function call, with the same parsing as over HTTP. Used by handler.py and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import contract
from ..config import Settings
from ..engine.models import LoadedModels
from ..errors import Impossible
from ..model_info import Direction, ModelInfo
from ..outputs import format_named
from ..values import Rendered, Request, TensorResult


class Direct:
    """Parses, runs and renders requests in this process.

    Every method may be called from any thread, and raises the ServerError that a client would get.
    """

    def __init__(self, settings: Settings, models: LoadedModels | None = None) -> None:
        """Prepare to run requests. models: the loaded models to use; None for new ones, of which none is loaded."""
        self.settings = settings
        self.models = models or LoadedModels(settings)
        self._infos: dict[str, ModelInfo] = {}

    def parse(
        self,
        model: str,
        parameters: Mapping[str, Any],
        data: bytes | bytearray,
        accept: str,
        direction: Direction = Direction.DECODE,
    ) -> Request:
        """Return the request that the server would make of these parameters and this body.

        model: the name of the model.
        parameters: those of the HTTP contract.
        data: the bytes of a tensor, or a whole file.
        accept: the `Accept` header.
        direction: the direction of the route that the request would be sent to. As over HTTP, a decode that makes sense
            only as an encode becomes an encode.
        """
        sent = contract.Parameters([], parameters)
        body: contract.Bytes = data
        if not sent.has("shape"):
            sent, body = contract.opened(sent, data)
        info = self._describe(model)
        if info.latents.kind == "video" and body is not data and contract.sound_in(data) is not None:
            raise Impossible("a file with audio_latents is decoded by a running server only; send it there")
        if contract.direction_of(sent, info, body, direction) is Direction.DECODE:
            defaults = contract.RenderDefaults.of(self.settings, model)
            return contract.with_data(contract.decode_job(sent, accept, info, defaults), body)
        if sent.has("shape"):
            return contract.with_data(contract.encode_job(sent, accept, info), body)
        return contract.read_pixels(sent, accept, info, data, contract.header_of(sent, info, data))

    def run(self, request: Request) -> TensorResult:
        """Decode or encode, and return the tensor. Loads the model first if it is not loaded."""
        outcome = self.models.run([request])[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def render(self, request: Request, result: TensorResult) -> Rendered:
        """Render the tensor in the format of the request."""
        return format_named(request.job.format).render(result.body, request.job.render)

    def _describe(self, model: str) -> ModelInfo:
        known = self._infos.get(model)
        if known is None or known.is_assumed:
            self._infos[model] = self.models.describe(model)
        return self._infos[model]
