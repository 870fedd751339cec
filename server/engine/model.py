"""A VAE on its device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from server.engine.decoders import Decoder
from server.engine.encoders import Encoder
from server.families import Family
from server.types import LatentSpec, LoadedInfo


class Coder(Protocol):
    """What a Decoder and an Encoder share."""

    name: str
    finite: torch.Tensor
    memory_budget_bytes: int | None


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One direction of a VAE, ready to run: the decoder or the encoder is there."""

    family: Family
    spec: LatentSpec
    device: torch.device
    dtype: torch.dtype
    weight_bytes: int
    info: LoadedInfo
    decoder: Decoder | None = None
    encoder: Encoder | None = None

    @property
    def coder(self) -> Coder:
        coder = self.decoder or self.encoder
        assert coder is not None
        return coder
