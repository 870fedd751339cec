"""Describe models without torch, for the command `models`: all of them in a table, or one in full."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from .. import COMMAND
from ..config import Settings
from ..engine.weights.config_json import directions_of, read_info, weigh
from ..engine.weights.hub import source_of
from ..errors import ModelUnavailable
from ..listing import kind_of, latents_text, ratios_text
from ..model_info import LatentSpec, ModelInfo, Weights

HEADINGS = ("", "NAME", "KIND", "LATENTS", "ONE LATENT IS", "WEIGHTS", "LICENCE")
GAP = "  "


def describe_all(settings: Settings, names: Sequence[str] | None = None) -> dict[str, ModelInfo]:
    """Return the descriptions of models, by name, without using the network.

    The result lacks the models that nothing on this machine describes. names: the models; None for all.
    """
    infos = {}
    for name in settings.models if names is None else names:
        if settings.refusal_of(name):
            continue
        source, dtype = source_of(settings, name), settings.models[name].dtype or settings.options.dtype
        with suppress(ModelUnavailable):
            info = read_info(source, is_local_only=True)
            weights = weigh(source, None if dtype == "auto" else dtype)
            directions = tuple(each for each in directions_of(source) if each in info.directions)
            infos[name] = replace(info, weights=weights, directions=directions)
    return infos


def table(settings: Settings, names: Sequence[str], infos: Mapping[str, ModelInfo]) -> str:
    """Return a table with one line for each model. The default model is marked with `*`.

    names: the models to show. infos: what is known of them, by name.
    """
    rows = [HEADINGS, *(_row(settings, name, infos.get(name)) for name in names)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _row(settings: Settings, name: str, info: ModelInfo | None) -> tuple[str, ...]:
    mark = "*" if name == settings.default else ""
    if info is None:
        return mark, name, "?", "?", "?", (settings.refusal_of(name) and "not allowed") or "not downloaded", "?"
    licence = (info.licence or "") + (", gated" if info.is_gated else "")
    spec = info.latents
    return mark, name, kind_of(info), latents_text(spec), ratios_text(spec), _on_disk(info.weights), licence


def details(settings: Settings, name: str, info: ModelInfo | None) -> str:
    """Return everything about one model, a line for each fact. info: its description; None if there is none."""
    entry = settings.models[name]
    parts = {"subfolder": entry.subfolder, "file": entry.file, "revision": entry.revision}
    facts = {"repository": ", ".join([entry.repo, *(f"{key} {value}" for key, value in parts.items() if value)])}
    if entry.aliases:
        facts["also called"] = ", ".join(entry.aliases)
    if name == settings.default:
        facts["default"] = "yes, it answers POST /"
    if refusal := settings.refusal_of(name):
        facts["not allowed"] = refusal
    elif info is None:
        facts["unknown"] = f"its config.json is not on this machine; run `{COMMAND} download {name}`"
    else:
        facts |= dict(_facts(settings, name, info))
    width = max(map(len, facts))
    return "\n".join([name, *(f"  {key:{width}}{GAP}{text}" for key, text in facts.items())])


def _facts(settings: Settings, name: str, info: ModelInfo) -> Iterator[tuple[str, str]]:
    spec, limits, is_video = info.latents, settings.models[name].limits, info.latents.kind == "video"
    is_audio, preview = spec.kind == "audio", ", as a preview" if spec.is_preview else ""
    kinds = "audio" if is_audio else f"{spec.kind}s"
    yield "decodes to", f"{kinds}{preview}" + f", {settings.fps_of(name):g} frames per second" * is_video
    if len(info.directions) == 1:
        yield "only to", str(info.directions[0])
    yield "latents", f"{latents_text(spec)}; a latent {'step' if is_audio else 'pixel'} is {ratios_text(spec)}"
    yield "scaling", _scaling(spec)
    yield "class", info.class_name
    frames = f", {limits.max_frames} frames" * is_video
    most = f"{limits.max_seconds} seconds" if is_audio else f"{limits.max_pixels} pixels an image or frame{frames}"
    yield "limits", f"{most}, batches of {limits.max_batch}"
    if info.licence:
        gate = "; gated: accept it on the Hub, then set HF_TOKEN" if info.is_gated else ""
        yield "licence", info.licence + gate
    weights = info.weights
    assert weights is not None
    yield "weights", _on_disk(weights) + ("" if weights.is_here else f"; run `{COMMAND} download {name}`")
    if weights.decoder_mb is not None:
        half = "" if weights.dtype else ", half of it in half precision"
        encoder = f", {weights.encoder_mb} MiB to encode" if spec.has_encoder else ""
        sizes = f"{weights.decoder_mb} MiB to decode{encoder}"
        yield "memory", f"{sizes}, in {weights.dtype or 'float32'}{half}"


def _scaling(spec: LatentSpec) -> str:
    numbers = {"scaling_factor": spec.scaling_factor, "shift_factor": spec.shift_factor}
    said = [f"{name} {value:g}" for name, value in numbers.items() if value is not None]
    if spec.latents_mean is not None:
        said.append("a mean and a standard deviation for each channel")
    return ", ".join(said) or ("none" if spec.is_preview else "no statistics in its config")


def _on_disk(weights: Weights | None) -> str:
    if weights is None or weights.disk_mb is None:
        return "on disk" if weights and weights.is_here else "not downloaded"
    return f"on disk, {weights.disk_mb} MiB" if weights.is_here else f"at most {weights.disk_mb} MiB to download"
