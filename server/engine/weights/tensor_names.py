"""Read from the names of tensors whose files they are of, and which of them belong to a VAE."""

from __future__ import annotations

import re
from collections.abc import Iterable

PREFIXES = ("first_stage_model.", "vae.", "model.vae.", "model.first_stage_model.")
"""What whole checkpoints write before the names of their VAE's tensors."""

FORMS = {
    r"(encoder|decoder)\.(down|up)\.\d+\.|(encoder|decoder)\.mid\.": "the names of the original Stable Diffusion files",
    r"(encoder|decoder)\.(downsamples|upsamples|middle|head)\.": "the names of the original Wan files",
    r"(encoder|decoder)\.stages\.": "the names of the original DC-AE files",
    r"per_channel_statistics\.|(encoder|decoder)\.\w+\.\d+\.res_blocks\.": "the names of the original LTX files",
    r"(encoder|decoder)\.((down|up)_blocks|mid_block|layers)\.": "the names of diffusers",
}
"""What the names of tensors look like, and whose they are, for messages."""

_LAYER = re.compile(r"\d+\.")
_TINY_VIDEO = re.compile(r"((encoder|decoder)\.)?\d+\.conv\.weight")  # a layer over frames, which TAESD does not have


def form_of(names: Iterable[str]) -> str:
    """Return whose names the tensors of a VAE have, for messages. names: without the prefix of a checkpoint."""
    names = list(names)
    return next(
        (form for pattern, form in FORMS.items() if any(re.match(pattern, name) for name in names)), "no known names"
    )


def vae_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the tensors that belong to the VAE of a checkpoint: their names in it, by their names without its prefix.

    keys: all names in the checkpoint. If it is a VAE and nothing else, all of them are returned.
    The files `taesd_encoder` and `taesd_decoder` number their layers; theirs get the names of AutoencoderTiny.
    """
    keys = list(keys)
    for prefix in PREFIXES:
        if any(key.startswith((prefix + "encoder.", prefix + "decoder.")) for key in keys):
            return _unnumbered({key.removeprefix(prefix): key for key in keys if key.startswith(prefix)})
    return _unnumbered({key: key for key in keys})


def _unnumbered(names: dict[str, str]) -> dict[str, str]:
    """Return the names of AutoencoderTiny if the names are the numbers of its layers, as its original files have them.

    The decoder's first layer is a clamp without weights, which AutoencoderTiny has no layer for. The tiny video VAEs
    keep their names, which are those of this server's class.
    """
    if any(_TINY_VIDEO.fullmatch(name) for name in names):
        return names
    for part in ("taesd_encoder.", "taesd_decoder.", "encoder.", "decoder.", ""):
        layers = [name.removeprefix(part) for name in names if name.startswith(part)]
        if not layers or not all(_LAYER.match(layer) for layer in layers):
            continue
        if part:
            names = {_tiny_name(name, part): key for name, key in names.items()}
        else:
            side = "decoder." if not any(layer.startswith("0.") for layer in layers) else "encoder."
            names = {_tiny_name(side + name, side): key for name, key in names.items()}
    return names


def _tiny_name(name: str, part: str) -> str:
    if not name.startswith(part):
        return name
    number, rest = name.removeprefix(part).split(".", 1)
    side = "decoder" if "decoder" in part else "encoder"
    return f"{side}.layers.{int(number) - (side == 'decoder')}.{rest}"
