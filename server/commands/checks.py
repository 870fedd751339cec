"""What `python -m server check` and `models` find out: configuration, device, weights, codecs, one real decode."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import imageio_ffmpeg
from PIL import features

from ..config import Settings
from ..engine.models import LoadedModels
from ..engine.tensors import is_finite
from ..engine.weights.config_json import read_info
from ..engine.weights.hub import source_of
from ..engine.weights.placement import choose_device
from ..errors import ConfigError, ModelUnavailable, ServerError
from ..families import FAMILIES
from ..inprocess.direct import Direct
from ..model_info import ModelInfo
from ..values import RawTensor


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `check`."""

    is_problem: bool
    text: str

    def __str__(self) -> str:
        return f"{'PROBLEM' if self.is_problem else 'ok     '}  {self.text}"


def ok(text: str) -> Finding:
    return Finding(False, text)


def problem(text: str) -> Finding:
    return Finding(True, text)


def describe_all(settings: Settings) -> dict[str, ModelInfo]:
    """What is known of each model without the network; those of which nothing is are left out."""
    models, infos = LoadedModels(settings), {}
    for name in settings.models:
        with suppress(ModelUnavailable):
            infos[name] = models.describe(name, is_local_only=True)
    return infos


def check_all(settings: Settings) -> Iterator[Finding]:
    """Everything that can be known without the network, in the order in which a start needs it."""
    yield ok(f"configuration: {settings.source}, {len(settings.models)} models, default '{settings.default}'")
    yield _device(settings)
    yield from _codecs()
    for name in settings.models:
        finding = _weights(settings, name)
        yield finding
        if not finding.is_problem and source_of(settings, name).is_here():
            yield _decodes(settings, name)


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
            else problem(f"Pillow lacks {codec}: pip install --force-reinstall pillow")
        )
    try:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-encoders"]
        has_x264 = "libx264" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (RuntimeError, OSError, subprocess.CalledProcessError):
        yield problem("no ffmpeg runs: pip install --force-reinstall imageio-ffmpeg")
        return
    yield ok("codec: ffmpeg has libx264") if has_x264 else problem("ffmpeg lacks libx264: unset IMAGEIO_FFMPEG_EXE")


def _weights(settings: Settings, name: str) -> Finding:
    entry = settings.models[name]
    if entry.family is not None and entry.family not in FAMILIES:
        return problem(f"{name}: unknown family '{entry.family}'; known: {', '.join(FAMILIES)}")
    try:
        choose_device(entry.device or settings.options.device)
    except ValueError as error:
        return problem(f"{name}: {error}")
    source = source_of(settings, name)
    is_needed = name == settings.default or settings.models[name].preload
    if source.local is None and not source.is_here() and not is_needed:
        return ok(f"{name}: not downloaded yet; the first request will, or run `python -m server download {name}`")
    try:
        info = read_info(source, is_local_only=True)
        source.folder(is_local_only=True)
    except ModelUnavailable as error:
        return problem(error.detail)
    return ok(
        f"{name}: weights here, {info.class_name}, family {info.latents.family}, {info.latents.channels} channels"
    )


def _decodes(settings: Settings, name: str) -> Finding:
    """A small latent through the whole path, unscaled with the model's own statistics; NaN weights show as NaN."""
    direct = Direct(settings)
    try:
        spec = direct.models.describe(name).latents
        side = 8 * spec.vae_scale_factor
        shape = FAMILIES[spec.family].latent_shape(spec, side, side)
        parameters = {"shape": list(shape), "dtype": "float32", "do_scaling": True, "output_type": "pt"}
        latents = bytes(RawTensor.bytes_needed(shape, "float32"))
        sample = direct.run(direct.parse(name, parameters, latents, "*/*")).body
        if not is_finite(sample):
            return problem(f"'{name}' decodes to NaN; are its weights damaged, or do they overflow its dtype?")
        parameters |= {"output_type": "pil" if spec.kind == "image" else "mp4"}
        request = direct.parse(name, parameters, latents, "*/*")
        result = direct.run(request)
        body = direct.render(request, result).body
    except (ServerError, ConfigError) as error:
        return problem(f"'{name}' does not decode: {getattr(error, 'detail', error)}")
    except RuntimeError as error:  # a codec's
        return problem(f"'{name}' decodes, but its answer does not render: {error}")
    return ok(f"'{name}' decodes: {result.device_ms:.0f} ms to {len(body)} bytes")
