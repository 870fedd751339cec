"""Describe models, for `GET /models` and the command `models`, and for the tables in README.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, get_args

from .config import Settings
from .model_info import LatentSpec, ModelInfo
from .outputs import FORMATS
from .values import LATENT_DTYPES

ListedKind = Literal["image", "video", "audio", "preview"]
KINDS: tuple[ListedKind, ...] = get_args(ListedKind)
HEADINGS: dict[ListedKind, str] = {"image": "images", "video": "videos", "audio": "audio", "preview": "previews"}
INPUTS = {
    "image": ["image/png", "image/jpeg", "image/webp", "tensor/binary"],
    "video": ["video/mp4", "image/png", "image/jpeg", "image/webp", "tensor/binary"],
    "audio": [],
}


def listed(settings: Settings, name: str, info: ModelInfo | None) -> dict[str, Any]:
    """Return the entry of a model in `GET /models`, without what only a running server knows.

    name: the name of the model. info: what its config.json says; None if it has not been read.
    """
    entry = settings.models[name]
    known: dict[str, Any] = {
        "name": name,
        "repo": _repo(settings, name),
        "subfolder": entry.subfolder,
        "file": entry.file,
        "revision": entry.revision,
        "aliases": list(entry.aliases),
        "limits": asdict(entry.limits),
        "dtypes": list(LATENT_DTYPES),
    }
    if info is None:
        return known
    kind = info.latents.kind
    outputs = list(dict.fromkeys(name for form in FORMATS if kind in form.kinds for name in form.media_types))
    return known | {
        "kind": kind_of(info),
        "class": info.class_name,
        "latents": asdict(info.latents),
        "config": info.config,
        "fps": settings.fps_of(name) if kind == "video" else None,
        "outputs": outputs,
        "inputs": INPUTS[kind],
        "licence": info.licence,
        "is_gated": info.is_gated,
        "directions": list(info.directions),
        "weights": info.weights and asdict(info.weights),
    }


def _repo(settings: Settings, name: str) -> str:
    """Return the repository of a model, without paths of this machine."""
    path = settings.path_of(name)
    return settings.models[name].repo if path is None else f"a local {'file' if path.is_file() else 'folder'}"


def families_table(settings: Settings, infos: dict[str, ModelInfo]) -> str:
    """Return Markdown tables of models, one for each kind. Models with the same class and latents share a row."""
    tables = []
    for kind in KINDS:
        rows: dict[tuple[str, str, str], list[str]] = {}
        for name in chosen(settings, infos, kind):
            spec = infos[name].latents
            alike = latents_text(spec), ratios_text(spec), infos[name].class_name
            rows.setdefault(alike, []).append(f"`{name}`" + (" (gated)" if infos[name].is_gated else ""))
        if rows:
            lines = [f"| {', '.join(names)} | {' | '.join(alike)} |" for alike, names in rows.items()]
            what = "step" if kind == "audio" else "pixel"
            head = f"| {HEADINGS[kind]} | latents | a latent {what} is | class |\n| --- | --- | --- | --- |\n"
            tables.append(head + "\n".join(lines) + "\n")
    return "\n".join(tables)


def kind_of(info: ModelInfo) -> ListedKind:
    """Return the kind by which a list of models is filtered: what the model decodes to, or `preview`."""
    return "preview" if info.latents.is_preview else info.latents.kind


def chosen(
    settings: Settings, infos: Mapping[str, ModelInfo], kind: str | None = None, part: str | None = None
) -> list[str]:
    """Return the names of the models to list, in the order of models.yaml.

    kind: one of KINDS; None for all. Models without a description have no kind.
    part: a part of the name or of an alias, in any case; None for all.
    """
    return [
        name
        for name, entry in settings.models.items()
        if (part is None or any(part.lower() in each.lower() for each in (name, *entry.aliases)))
        and (kind is None or (name in infos and kind_of(infos[name]) == kind))
    ]


def latents_text(spec: LatentSpec) -> str:
    """Return how many channels the latents have, and whether they are usually packed."""
    return f"{spec.channels} channels{', packed' * spec.is_usually_packed}"


def ratios_text(spec: LatentSpec) -> str:
    """Return how many pixels and frames a latent pixel stands for, or how many samples a step of audio latents."""
    if spec.kind == "audio":
        channels = "stereo" if spec.image_channels > 1 else "mono"
        return f"{spec.temporal_compression_ratio} samples, {channels}, {spec.sampling_rate} Hz"
    space = f"{spec.vae_scale_factor}x{spec.vae_scale_factor}"
    return f"{space}, {spec.temporal_compression_ratio} frames" if spec.temporal_compression_ratio > 1 else space
