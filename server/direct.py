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
        options = settings.options
        self._defaults = wire.RenderDefaults(options.fps, options.jpeg_quality, options.video_quality)

    def parse(self, model: str, parameters: Mapping[str, Any], data: bytes, accept: str) -> VAERequest:
        """parameters: as the query of a request would hold them. data: the tensor's bytes."""
        prepared = wire.prepare(wire.Parameters([], parameters), accept, self._describe(model), self._defaults)
        return prepared.with_data(data)

    def parse_pixels(self, model: str, parameters: Mapping[str, Any], data: bytes, accept: str) -> VAERequest:
        """data: a picture's or a clip's file, or with `shape` and `dtype` a tensor's bytes."""
        sent, info = wire.Parameters([], parameters), self._describe(model)
        if sent.has("shape"):
            return wire.prepare_pixels(sent, accept, info).with_data(data)
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
