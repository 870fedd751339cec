"""The latents and images of ComfyUI, and the tensors that the server takes and returns.

ComfyUI gives a VAE latents that its model's `latent_format` has unscaled. The server takes them as they are. For a few
VAEs the scaling is a part of the VAE in ComfyUI, and `latent_format` changes nothing: for these, the server is asked to
scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .remote import Connection, Params, RemoteError, Request, Server, Show

PACKED = ("AutoencoderKLLTXVideo", "AutoencoderKLLTX2Video", "LTX2VideoDiffusionDecoderModel")
"""Their scaled latents are sent packed, because the server takes unpacked ones of LTX-2 for unscaled."""
SCALED = (*PACKED, "AutoencoderKLFlux2", "AutoencoderKLCosmos", "AutoencoderKLMiniMaxH3")
FRAMES_FIRST = ("AutoencoderKLCogVideoX", "TAECVX")
CLIPS_OF_17 = ("AutoencoderKLMiniMaxH3", "TAEH3")
CHANNELS_LAST = ("ideogram4",)
"""Families whose patches have their channels last at the server, and as those of FLUX.2 in ComfyUI."""
ONE_VIDEO = ("AutoencoderKLTemporalDecoder",)
"""Their latents are those of images in ComfyUI, and a batch is one video."""
FRAME_AXIS = ("AutoencoderKLQwenImage",)
"""Image models whose latents have an axis of one frame in ComfyUI."""

NOISE, NOISE_TIME = 0.025, 0.05  # what ComfyUI mixes into the latents of LTX-Video's decoder that removes noise
PIXELS = [("output_type", "pt"), ("partial_postprocess", "True")]


@dataclass(frozen=True)
class Model:
    """A model of a server. entry: what `GET /models` says of it."""

    server: Server
    entry: dict[str, Any]

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.entry["name"])

    @property
    def class_name(self) -> str:
        """The class of the VAE in diffusers."""
        return str(self.entry["class"])

    @property
    def kind(self) -> str:
        """What it decodes to: `image`, `video` or `audio`."""
        return str(self.entry["latents"]["kind"])

    @property
    def kind_in_list(self) -> str:
        """The kind by which the server lists it: its kind, or `preview`."""
        return "preview" if self.is_preview else self.kind

    @property
    def is_preview(self) -> bool:
        """Whether it takes latents as the sampler has them, and decodes them to previews."""
        return bool(self.entry["latents"]["is_preview"])

    @property
    def patch(self) -> int:
        """How many latent pixels ComfyUI puts into one, along each side: 2 for the patches of FLUX.2."""
        return 2 if self.class_name == "AutoencoderKLFlux2" else 1

    @property
    def channels(self) -> int:
        """The channels of its latents in ComfyUI."""
        return int(self.entry["latents"]["channels"]) * self.patch**2

    @property
    def ratio(self) -> int:
        """How many pixels a latent pixel covers, along each side."""
        return int(self.entry["latents"]["vae_scale_factor"]) * self.patch

    @property
    def time_ratio(self) -> int:
        """How many frames a latent frame covers."""
        return int(self.entry["latents"]["temporal_compression_ratio"])

    @property
    def has_frame_axis(self) -> bool:
        """Whether its latents have five axes in ComfyUI."""
        return self.class_name in FRAME_AXIS or (self.kind == "video" and self.class_name not in ONE_VIDEO)

    @property
    def max_batch(self) -> int:
        """How many images or sounds a request may hold. Bytes of pixels are sent of one video at a time."""
        return 1 if self.kind == "video" else int(self.entry["limits"]["max_batch"])


def find_model(server: Server, show: Show) -> Model:
    """Return the model that the server's address names, or the server's default model. Raises RemoteError."""
    connection = Connection(server, show)
    entry = _entry(server, connection.models())
    if "latents" not in entry:  # the server has not read its config yet: it does before it refuses this
        try:
            connection.post(Request((entry["name"],), (), torch.zeros(1)))
        except RemoteError as error:
            if error.status != 400:
                raise
        entry = _entry(server, connection.models())
    return Model(server, entry)


def _entry(server: Server, listed: dict[str, Any]) -> dict[str, Any]:
    wanted = (server.model or listed["default"]).lower()
    for entry in listed["models"]:
        if wanted in (entry["name"].lower(), *map(str.lower, entry.get("aliases", ()))):
            return dict(entry)
    names = ", ".join(entry["name"] for entry in listed["models"])
    raise RemoteError(f"{server.base} has no model {wanted!r}; it has {names}", 404, "unknown_model")


def decode(model: Model, samples: torch.Tensor, show: Show) -> torch.Tensor:
    """Decode latents as ComfyUI's `VAE.decode` does. Raises RemoteError.

    samples: `[B, C, h, w]`, `[B, C, F, h, w]` or, of sound, `[B, C, L]`.

    Returns float32 on the CPU: `[B, H, W, 3]` in [0, 1]; `[B, F, H, W, 3]` for latents with frames; `[B, samples, 2]`
    for sound, in about [-1, 1].
    """
    wires = list(_wires(model, samples))
    connection = Connection(model.server, show, len(wires))
    if model.kind == "audio":
        sounds = [connection.post(_request(model, [("output_type", "pt")], *wire)).tensor() for wire in wires]
        return torch.cat(sounds).float().movedim(1, -1)  # [B, channels, samples] -> [B, samples, channels]
    parts = [connection.post(_request(model, PIXELS, *wire)).tensor() for wire in wires]
    pixels = torch.cat(parts).float() / 255  # [B, H, W, C] or [B F, H, W, C]
    if samples.ndim == 5 or (model.kind == "video" and model.has_frame_axis):
        pixels = pixels.unflatten(0, (samples.shape[0], -1))  # [B F, H, W, C] -> [B, F, H, W, C]
    return pixels


def decode_to_file(model: Model, samples: torch.Tensor, params: Params, accept: str, show: Show) -> list[bytearray]:
    """Return a file for each image or video of the batch, as the server encodes it. Raises RemoteError."""
    wires = list(_wires(model, samples, 1))
    connection = Connection(model.server, show, len(wires))
    return [connection.post(_request(model, params, *wire, accept=accept)).body for wire in wires]


def _request(model: Model, params: Params, body: torch.Tensor, extra: Params, accept: str = "tensor/binary") -> Request:
    return Request((model.name,), [*params, *extra], body, accept)


def _wires(model: Model, samples: torch.Tensor, most: int | None = None) -> Iterator[tuple[torch.Tensor, Params]]:
    """Yield the tensors to send, with their parameters. most: how many images or videos one may hold."""
    expected = model.channels
    if model.is_preview and samples.ndim == 4 and samples.shape[1] == 4 * expected:  # FLUX.2's patches
        samples = torch.nn.functional.pixel_shuffle(samples, 2)  # [B, 4 C, h, w] -> [B, C, 2 h, 2 w]
    if model.class_name not in FRAMES_FIRST and samples.shape[1] != expected:
        raise RemoteError(
            f"the latents have {samples.shape[1]} channels, and those of {model.name} have {expected}; choose the "
            "model of the latents",
            400,
            "wrong_channels",
        )
    sent = samples.detach().to("cpu")
    sent = (sent if sent.dtype in (torch.float16, torch.bfloat16) else sent.float()).contiguous()
    if model.class_name in ONE_VIDEO:
        yield sent, ()
        return
    if model.kind == "image" and sent.ndim == 5:
        sent = sent.transpose(1, 2).flatten(0, 1)  # [B, C, F, h, w] -> [B F, C, h, w]
    if model.class_name in FRAMES_FIRST and sent.ndim == 5 and sent.shape[1] == expected:
        sent = sent.transpose(1, 2)  # [B, C, F, h, w] -> [B, F, C, h, w]
    params: list[tuple[str, Any]] = [("do_scaling", "True")] if model.class_name in SCALED else []
    if model.entry["latents"]["takes_timestep"]:
        noise = torch.randn(sent.shape, generator=torch.Generator().manual_seed(0)).to(sent.dtype)
        sent = noise * NOISE + (1 - NOISE) * sent
        params.append(("decode_timestep", NOISE_TIME))
    if model.class_name in PACKED:
        h, w = sent.shape[-2:]
        params += [("height", h * model.ratio), ("width", w * model.ratio)]
        sent = sent.reshape(*sent.shape[:2], -1).transpose(1, 2)  # [B, C, F, h, w] -> [B, F h w, C]
    if model.entry["latents"]["family"] in CHANNELS_LAST:
        sent = sent.unflatten(1, (-1, 2, 2)).movedim(1, 3).flatten(1, 3)  # [B, C 2 2, h, w] -> [B, 2 2 C, h, w]
    for part in sent.split(most or model.max_batch):
        yield part.contiguous(), params


def encode(model: Model, pixels: torch.Tensor, show: Show, are_images: bool = False) -> torch.Tensor:
    """Encode pixels as ComfyUI's `VAE.encode` does, to the most likely latents. Raises RemoteError.

    pixels: `[B, H, W, C]` in [0, 1], cropped to whole latent pixels; a video model takes the batch for one video and
        leaves out the last frames if they do not fill a latent frame. Or `[B, F, H, W, C]`.
    are_images: a video model takes each image of the batch for a video of one frame.

    Returns float32 latents on the CPU, with the axes of the model's latents in ComfyUI.
    """
    if model.kind == "audio":
        raise RemoteError(f"{model.name} is a model of sound; it cannot encode images", 400, "wrong_kind")
    is_video = model.kind == "video"
    if is_video and pixels.ndim == 4:
        pixels = pixels.unsqueeze(1 if are_images else 0)  # [F, H, W, C] -> [1, F, H, W, C] or [B, 1, H, W, C]
    elif not is_video and pixels.ndim == 5:
        pixels = pixels.flatten(0, 1)  # [B, F, H, W, C] -> [B F, H, W, C]
    if is_video and model.class_name not in CLIPS_OF_17:
        frames = (pixels.shape[1] - 1) // model.time_ratio * model.time_ratio + 1
        pixels = pixels[:, :frames]
    channels = min(pixels.shape[-1], int(model.entry["latents"]["image_channels"]))
    wire = _levels(_cropped(pixels[..., :channels], model.ratio))
    params = [("do_scaling", "True")] if model.class_name in SCALED else []
    parts = [part.contiguous() for part in wire.split(model.max_batch)]
    connection = Connection(model.server, show, len(parts))
    encoded = [connection.post(Request((model.name, "encode"), params, part)).tensor() for part in parts]
    latents = torch.cat(encoded).float()
    if model.entry["latents"]["family"] in CHANNELS_LAST:  # they come without patches
        latents = torch.nn.functional.pixel_unshuffle(latents, 2)  # [B, C, 2 h, 2 w] -> [B, 4 C, h, w]
    if model.class_name in ONE_VIDEO and latents.ndim == 5:
        return latents.transpose(1, 2).flatten(0, 1)  # [B, C, F, h, w] -> [B F, C, h, w]
    if model.has_frame_axis and latents.ndim == 4:
        return latents.unsqueeze(2)  # [B, C, h, w] -> [B, C, 1, h, w]
    return latents


def _cropped(pixels: torch.Tensor, ratio: int) -> torch.Tensor:
    """Return the middle of the images, `[..., H, W, C]`, whose sides are whole latent pixels."""
    for axis in (-3, -2):
        size = pixels.shape[axis]
        pixels = pixels.narrow(axis, size % ratio // 2, size - size % ratio)
    return pixels


def _levels(pixels: torch.Tensor) -> torch.Tensor:
    """Return the bytes of pixels in [0, 1] that come from an image file, or else float16 in [-1, 1]."""
    known = pixels.detach().to("cpu", torch.float32).clamp(0, 1)
    levels = (255 * known).round()
    if torch.allclose(levels / 255, known, rtol=0, atol=1e-6):
        return levels.to(torch.uint8)
    return (2 * known - 1).half()
