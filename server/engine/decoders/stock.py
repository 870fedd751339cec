"""diffusers' own `vae.decode`."""

from __future__ import annotations

from typing import Any

import torch

from server.engine.postprocess import postprocess
from server.types import Layout


class StockDecoder:
    """What a user's local pipeline runs."""

    name = "diffusers"

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    def decode(self, latents: torch.Tensor, layout: Layout) -> torch.Tensor:
        parameter = next(self.vae.parameters())
        sample = self.vae.decode(latents.to(parameter.device, parameter.dtype), return_dict=False)[0]
        return postprocess(sample, layout)
