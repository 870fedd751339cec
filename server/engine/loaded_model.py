"""One direction of a model whose weights are on a device."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ..families import Family
from ..model_info import LatentSpec, LoadedInfo
from .coders.interface import Coder

C = TypeVar("C", bound=Coder, covariant=True)


@dataclass(frozen=True, slots=True)
class LoadedModel(Generic[C]):
    """A Decoder or an Encoder, ready to run, with the family and spec that prepare its requests.

    allows_tf32: a GPU may round the factors of float32 convolutions to TensorFloat-32.
    budget_bytes: memory limit for the activations of a run; None means the memory that is free when the run begins.
    """

    coder: C
    family: Family
    spec: LatentSpec
    device: torch.device
    dtype: torch.dtype
    weight_bytes: int
    info: LoadedInfo
    budget_bytes: int | None = None
    allows_tf32: bool = False

    def precision(self) -> AbstractContextManager[None]:
        """Return a context in which cuDNN convolves in the model's precision. Contexts may be nested."""
        cudnn = torch.backends.cudnn
        return cudnn.flags(cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic, self.allows_tf32)
