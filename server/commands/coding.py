"""Decode or encode one file, at a server or in this process, for the commands `decode` and `encode`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import requests

from ..config import Settings, load_settings
from ..config.options import read_options
from ..errors import ConfigError, ServerError
from ..inputs import media_type_of, read_header
from ..model_info import Direction
from ..outputs.tensor import as_safetensors
from ..values import ITEM_BYTES, RawTensor
from .local_files import write
from .servers import NO_SERVER, Place, find, place_of
from .status_line import StatusLine

if TYPE_CHECKING:
    from ..inprocess.direct import Direct
    from ..values import Request

ENOUGH_FRAMES = 1 << 20  # more than any video that a model decodes to


@dataclass(frozen=True)
class Coded:
    """What a decode or an encode brought.

    body: the content of the file to write. shape, dtype: of latents; None for an image or a video.
    seconds: from the request to its answer, without the time to start torch and to load a model in this process.
    model: the name of the model; None if the server did not tell it. server: its address; None for this process.
    """

    body: bytes
    seconds: float
    model: str | None
    server: str | None
    shape: tuple[int, ...] | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Where:
    """Where to run a request, as the options of the command say.

    server: the address of a server; None to look for one on this machine. is_here: run it in this process.
    flags: options of `serve` for this process. If one is given, no server is looked for.
    """

    server: str | None
    is_here: bool
    model: str | None
    flags: Mapping[str, Any]

    def place(self) -> Place | None:
        """Return the server to send the request to; None for this process. Raises ConfigError."""
        if self.server:
            if self.is_here:
                raise ConfigError("--server and --no-server exclude each other; leave one of them out")
            return place_of(self.server, self.model)
        if self.is_here or any(value is not None for value in self.flags.values()):
            return None
        return find(read_options({}).port, self.model)


def decode(where: Where, parameters: Mapping[str, Any], data: bytes, accept: str, line: StatusLine) -> Coded:
    """Decode latents. Raises ConfigError, ServerError.

    parameters: those of the HTTP contract. accept: the `Accept` header. line: shows what is done.
    """
    if place := where.place():
        headers = {"Content-Type": "tensor/binary", "Accept": accept}
        started = time.perf_counter()
        answer = place.ask("", parameters, data, headers, line)
        if answer.headers.get("Content-Type", "").partition(";")[0] != accept:
            raise ConfigError(f"{place.shown}: it did not answer with {accept}; {NO_SERVER}")
        return Coded(answer.content, time.perf_counter() - started, place.model, place.shown)
    direct, request = _prepared(where, parameters, data, accept, Direction.DECODE, line)
    started = time.perf_counter()
    with line.doing(f"decoding with {request.job.model}"):
        body = bytes(direct.render(request, direct.run(request)).body)
    return Coded(body, time.perf_counter() - started, request.job.model, None)


def encode(where: Where, parameters: Mapping[str, Any], data: bytes, line: StatusLine) -> Coded:
    """Encode an image or a video. Parameters and errors as for `decode`."""
    if place := where.place():
        started = time.perf_counter()
        answer = place.ask("/encode", parameters, data, {}, line)
        latents, name, server = _tensor(answer, place), place.model, place.shown
    else:
        direct, request = _prepared(where, parameters, data, "*/*", Direction.ENCODE, line)
        started, name, server = time.perf_counter(), request.job.model, None
        with line.doing(f"encoding with {name}"):
            latents = direct.run(request).body
    seconds = time.perf_counter() - started
    return Coded(as_safetensors(latents), seconds, name, server, latents.shape, latents.dtype)


def _tensor(answer: requests.Response, place: Place) -> RawTensor:
    """Return the latents that a server answered. Raises ConfigError if they are none."""
    try:
        shape, dtype = tuple(map(int, json.loads(answer.headers["shape"]))), answer.headers["dtype"]
        if len(answer.content) != math.prod(shape) * ITEM_BYTES[dtype]:
            raise ValueError
    except (KeyError, ValueError, TypeError):
        raise ConfigError(f"{place.shown}: it did not answer with a tensor; {NO_SERVER}") from None
    return RawTensor(shape, dtype, memoryview(answer.content))


def _prepared(
    where: Where, parameters: Mapping[str, Any], data: bytes, accept: str, direction: Direction, line: StatusLine
) -> tuple[Direct, Request]:
    """Return what runs requests in this process, and the request, whose model is loaded."""
    settings = load_settings(**where.flags)
    name = _name_of(settings, where.model)
    with line.doing("starting torch"):
        from ..engine.weights.config_json import components
        from ..engine.weights.hub import source_of
        from ..inprocess.direct import Direct
    direct = Direct(settings)
    request = direct.parse(name, parameters, data, accept, direction)
    for part in components(source_of(settings, name)):
        if not part.is_here():
            part.files()  # with the progress bar of the hub's client
    with line.doing(f"loading {name}"):
        direct.models.load(name, request.job.direction)
    return direct, request


def _name_of(settings: Settings, model: str | None) -> str:
    """Return the name of the model. Raises ConfigError for an unknown one."""
    name = settings.name_of(model) if model else settings.default
    if name is None:
        raise ConfigError(f"there is no model '{model}' in {settings.source}; known: {', '.join(settings.models)}")
    return name


def report(out: Path, coded: Coded, *, as_json: bool) -> None:
    """Write the file, and print what it contains and how long it took. Raises ConfigError if it cannot be written."""
    write(out, coded.body)
    if coded.shape is None:
        known, size = _size(coded.body)
    else:
        known = {"shape": list(coded.shape), "dtype": coded.dtype}
        size = f"latents {'x'.join(map(str, coded.shape))} {coded.dtype}, "
    if as_json:
        told = {"file": str(out), "bytes": len(coded.body), **known, "seconds": round(coded.seconds, 3)}
        click.echo(json.dumps({**told, "model": coded.model, "server": coded.server}))
        return
    by = f" by {coded.model}" if coded.model else ""
    at = f" at {coded.server}" if coded.server else ""
    click.echo(f"{out}: {size}{len(coded.body)} bytes, {coded.seconds:.2f} s{by}{at}")


def _size(body: bytes) -> tuple[dict[str, object], str]:
    """Return the size of an image or a video, as a part of the JSON object and as text."""
    with suppress(ServerError):  # it is only a description
        header = read_header(body, str(media_type_of(body)), ENOUGH_FRAMES)
        known: dict[str, object] = {"width": header.width, "height": header.height, "frames": header.frames}
        frames = f"{header.frames} frames of " if header.video else ""
        return known, f"{frames}{header.width}x{header.height} pixels, "
    return {}, ""
