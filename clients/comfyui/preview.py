"""Previews while sampling, decoded by a preview model of the server."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from math import prod
from typing import Any

import comfy.patcher_extension
import comfy.utils
import torch
from PIL import Image

from .latents import Model, decode_to_file
from .remote import RemoteError

log = logging.getLogger(__name__)

MAX_SIDE = 512  # in pixels, of the picture that ComfyUI shows
TIMEOUT_S = 10.0
JPEG = [("output_type", "pil"), ("image_format", "jpg")]


class Previews:
    """The previews of one run of a sampler.

    A step never waits for the server: while a preview is computed, the steps that follow are left out, and it is shown
    at the end of the step after it has arrived.
    """

    def __init__(self, model: Model, unscale: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Start. unscale: makes latents of the sampler those that a VAE takes; preview models take the sampler's."""
        self._model = replace(model, server=replace(model.server, timeout_s=TIMEOUT_S))
        self._unscale = unscale
        self._pool = ThreadPoolExecutor(1)
        self._asked: Future[Image.Image] | None = None
        self._picture: Image.Image | None = None
        self._works = True
        self._bar = comfy.utils.ProgressBar(1)

    def step(self, step: int, latents: torch.Tensor, steps: int) -> None:
        """Show the last preview that has arrived, and ask for one of these latents if the server is free."""
        if self._asked is not None and self._asked.done():
            try:
                self._picture = self._asked.result()
            except RemoteError as error:
                log.warning("no previews: %s", error)
                self._works = False
            self._asked = None
        if self._picture is not None:
            self._bar.update_absolute(step + 1, steps, ("JPEG", self._picture, MAX_SIDE))
        if self._works and self._asked is None and latents.ndim in (4, 5):
            self._asked = self._pool.submit(self._decode, self._first(latents))

    def end(self) -> None:
        """Let the thread end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _first(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the latents of the first image, or of the middle frame of the first video, on the CPU."""
        if not self._model.is_preview:
            latents = self._unscale(latents)
        latents = latents[:1]
        if latents.ndim == 5:
            middle = latents.shape[2] // 2
            latents = latents[:, :, middle : middle + 1]
        return latents.detach().to("cpu", torch.float16)

    def _decode(self, latents: torch.Tensor) -> Image.Image:
        (file,) = decode_to_file(self._model, latents, JPEG, "image/jpeg", lambda _: None)
        picture = Image.open(io.BytesIO(file))
        picture.load()
        return picture


def video_of(latents: torch.Tensor, shapes: Sequence[Sequence[int]] | None) -> torch.Tensor:
    """Return the latents of the images or the video.

    ComfyUI samples a video with its sound as one tensor `[B, 1, N]`. shapes: the shapes of its parts, the video's
    first.
    """
    if shapes is None or len(shapes) < 2:
        return latents
    shape = shapes[0][1:]
    return latents[:, 0, : prod(shape)].unflatten(1, list(shape))  # [B, 1, N] -> [B, C, F, h, w]


def with_previews(patcher: Any, model: Model) -> Any:
    """Return a clone of ComfyUI's model that shows previews while it samples."""
    clone = patcher.clone()

    def sample(executor: Any, *given: Any, **named: Any) -> Any:
        previews = Previews(model, executor.class_obj.model_patcher.model.process_latent_out)
        before = given[5] if len(given) > 5 else named.get("callback")

        def callback(step: int, x0: torch.Tensor, x: torch.Tensor, steps: int) -> None:
            if before is not None:
                before(step, x0, x, steps)
            previews.step(step, video_of(x0, named.get("latent_shapes")), steps)

        if len(given) > 5:
            given = (*given[:5], callback, *given[6:])
        else:
            named["callback"] = callback
        try:
            return executor(*given, **named)
        finally:
            previews.end()

    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "remote_vae_preview", sample)
    return clone
