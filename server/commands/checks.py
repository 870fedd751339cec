"""Check the configuration, the device, the weights and the codecs, and decode once, for the command `check`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import imageio_ffmpeg
from PIL import features

from .. import COMMAND
from ..config import Settings
from ..engine.tensors import is_finite
from ..engine.weights.config_json import read_info
from ..engine.weights.hub import source_of
from ..engine.weights.loading import check_weights
from ..engine.weights.placement import choose_device
from ..errors import ConfigError, ModelUnavailable, ServerError
from ..families import FAMILIES
from ..inprocess.direct import Direct
from ..model_info import Direction, ModelInfo
from ..values import RawTensor


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `check`. is_problem: the server cannot work as configured. text: what was found."""

    is_problem: bool
    text: str

    def __str__(self) -> str:
        return f"{'PROBLEM' if self.is_problem else 'ok     '}  {self.text}"


def ok(text: str) -> Finding:
    """Return a finding that is no problem."""
    return Finding(False, text)


def problem(text: str) -> Finding:
    """Return a finding that is a problem."""
    return Finding(True, text)


def check_all(settings: Settings) -> Iterator[Finding]:
    """Yield all findings that need no network, in the order in which the server needs them when it starts."""
    yield ok(f"configuration: {settings.source}, {len(settings.models)} models, default '{settings.default}'")
    yield _device(settings)
    yield from _codecs()
    for name in settings.models:
        finding = _weights(settings, name)
        yield finding
        if not finding.is_problem and source_of(settings, name).is_here():
            yield _runs(settings, name)


def _device(settings: Settings) -> Finding:
    try:
        return ok(f"device: {choose_device(settings.options.device)}")
    except ValueError as error:
        return problem(str(error))


def _codecs() -> Iterator[Finding]:
    for codec in ("jpg", "zlib"):
        found = features.check_codec(codec)
        yield (
            ok(f"codec: Pillow has {codec}")
            if found
            else problem(f"codec: Pillow does not have {codec}; run: pip install --force-reinstall pillow")
        )
    try:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-encoders"]
        has_x264 = "libx264" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (RuntimeError, OSError, subprocess.CalledProcessError):
        yield problem("codec: ffmpeg cannot be run; run: pip install --force-reinstall imageio-ffmpeg")
        return
    if has_x264:
        yield ok("codec: ffmpeg has libx264")
    else:
        yield problem("codec: ffmpeg does not have libx264; unset IMAGEIO_FFMPEG_EXE to use the bundled ffmpeg")


def _weights(settings: Settings, name: str) -> Finding:
    entry = settings.models[name]
    if entry.family is not None and entry.family not in FAMILIES:
        return problem(f"{name}: unknown family '{entry.family}'; known: {', '.join(FAMILIES)}")
    if refusal := settings.refusal_of(name):
        return problem(f"{name}: {refusal}")
    try:
        choose_device(entry.device or settings.options.device)
    except ValueError as error:
        return problem(f"{name}: {error}")
    source = source_of(settings, name)
    is_needed = name == settings.default or settings.models[name].preload
    if source.local is None and not source.is_here() and not is_needed:
        return ok(f"{name}: not downloaded; the first request downloads it, or run `{COMMAND} download {name}`")
    try:
        info = read_info(source, is_local_only=True)
        directions = check_weights(source)
    except ModelUnavailable as error:
        return problem(error.detail)
    if entry.audio and (kind := _kind_of(settings, entry.audio)) not in ("audio", None):
        return problem(f"{name}: audio: '{entry.audio}' is a model of {kind}s; name an audio model")
    only = f", only to {directions[0]}" if len(directions) == 1 else ""
    return ok(
        f"{name}: weights are on disk, {info.class_name}, family {info.latents.family}, "
        f"{info.latents.channels} channels{only}"
    )


def _kind_of(settings: Settings, name: str) -> str | None:
    """Return what a model decodes to; None if that is not known here yet."""
    try:
        return read_info(source_of(settings, name), is_local_only=True).latents.kind
    except ModelUnavailable:
        return None


def _runs(settings: Settings, name: str) -> Finding:
    """Decode a small tensor of zeros, or encode one with a model that cannot decode, and render the result."""
    direct = Direct(settings)
    direction = Direction.DECODE
    try:
        info = direct.models.describe(name)
        direction = info.usual_direction
        if direction is Direction.ENCODE:
            return _encodes(direct, info)
        return _decodes(direct, info)
    except (ServerError, ConfigError) as error:
        return problem(f"'{name}' does not {direction}: {getattr(error, 'detail', error)}")
    except RuntimeError as error:  # of a codec
        return problem(f"'{name}' decodes, but the result cannot be rendered: {error}")


def _decodes(direct: Direct, info: ModelInfo) -> Finding:
    """Decode small latents of zeros, unscaled with the model's statistics, and render the result.

    Weights that are NaN show as a sample that is NaN.
    """
    spec, name = info.latents, info.name
    side = 8 * spec.vae_scale_factor
    shape = FAMILIES[spec.family].latent_shape(spec, side, side)
    parameters = {"shape": list(shape), "dtype": "float32", "do_scaling": True, "output_type": "pt"}
    latents = bytes(RawTensor.bytes_needed(shape, "float32"))
    sample = direct.run(direct.parse(name, parameters, latents, "*/*")).body
    if not is_finite(sample):
        return problem(
            f"'{name}' decodes to NaN; download its weights again, or set dtype: float32 in case they overflow"
        )
    parameters |= {"output_type": {"image": "pil", "video": "mp4", "audio": "wav"}[spec.kind]}
    request = direct.parse(name, parameters, latents, "*/*")
    result = direct.run(request)
    body = direct.render(request, result).body
    return ok(f"'{name}' decodes in {result.device_ms:.0f} ms; the answer has {len(body)} bytes")


def _encodes(direct: Direct, info: ModelInfo) -> Finding:
    """Encode a small black image, or a video of one frame."""
    side = 8 * info.latents.vae_scale_factor
    shape = [1, info.latents.image_channels, *([1] if info.latents.kind == "video" else []), side, side]
    pixels = bytes(RawTensor.bytes_needed(tuple(shape), "uint8"))
    request = direct.parse(info.name, {"shape": shape, "dtype": "uint8"}, pixels, "*/*", Direction.ENCODE)
    result = direct.run(request)
    if not is_finite(result.body):
        return problem(f"'{info.name}' encodes to NaN; download its weights again, or set dtype: float32")
    return ok(f"'{info.name}' encodes in {result.device_ms:.0f} ms; its file has no decoder")
