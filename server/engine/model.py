"""A VAE on its device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from server.engine.coder import Decoder, Encoder
from server.families import Family
from server.types import LatentSpec, LoadedInfo


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One direction of a VAE, ready to run: either the decoder or the encoder is there.

    budget_bytes: the memory limit of a run's activations; None means the memory that is free when it begins.
    """

    family: Family
    spec: LatentSpec
    device: torch.device
    dtype: torch.dtype
    weight_bytes: int
    info: LoadedInfo
    budget_bytes: int | None = None
    decoder: Decoder | None = None
    encoder: Encoder | None = None

    @property
    def coder(self) -> Decoder | Encoder:
        coder = self.decoder or self.encoder
        assert coder is not None
        return coder
