"""One request without HTTP, with the same parsing: what handler.py and `python -m server decode` run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.config import Settings
from server.engine.sync import SyncEngine
from server.http import wire
from server.outputs import format_named
from server.types import Computed, ModelInfo, Rendered, VAERequest


class Direct:
    """Parse, run, render; callable from any thread. Every method raises the ServerError a client would get."""

    def __init__(self, settings: Settings, engine: SyncEngine | None = None) -> None:
        self.settings = settings
        self.engine = engine or SyncEngine(settings)
        self._infos: dict[str, ModelInfo] = {}

    def parse(self, model: str, parameters: Mapping[str, Any], data: bytes | bytearray, accept: str) -> VAERequest:
        """Return the request that a decode address would make of it: an encode where only that makes sense.

        parameters: as the query of a request would hold them. data: a tensor's bytes, or a whole file.
        """
        sent, body = _opened(wire.Parameters([], parameters), data)
        info = self._describe(model)
        if wire.is_for_encoding(sent, info, body):
            return self.parse_pixels(model, parameters, data, accept)
        options = self.settings.options
        defaults = wire.RenderDefaults(self.settings.fps_of(model), options.jpeg_quality, options.video_quality)
        return wire.prepare(sent, accept, info, defaults).with_data(body)

    def parse_pixels(
        self, model: str, parameters: Mapping[str, Any], data: bytes | bytearray, accept: str
    ) -> VAERequest:
        """data: a picture's or a clip's file, or with `shape` and `dtype` a tensor's bytes."""
        sent, body = _opened(wire.Parameters([], parameters), data)
        info = self._describe(model)
        if sent.has("shape"):
            return wire.prepare_pixels(sent, accept, info).with_data(body)
        return wire.read_pixels(sent, accept, info, data, wire.header_of(sent, info, data))

    def run(self, request: VAERequest) -> Computed:
        outcome = self.engine.run([request.job])[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def render(self, request: VAERequest, decoded: Computed) -> Rendered:
        return format_named(request.format).render(decoded.tensor, request.render)

    def _describe(self, model: str) -> ModelInfo:
        known = self._infos.get(model)
        if known is None or known.is_assumed:
            self._infos[model] = self.engine.describe(model)
        return self._infos[model]


def _opened(parameters: wire.Parameters, data: bytes | bytearray) -> tuple[wire.Parameters, wire.Bytes]:
    return (parameters, data) if parameters.has("shape") else wire.opened(parameters, data)
