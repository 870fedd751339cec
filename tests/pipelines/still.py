"""A transformer that changes nothing, for pipelines of which only the part after the transformer is compared.

The scheduler then leaves the pipeline's noise as it is, and the rest of `__call__` is the real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


class Still(nn.Module):
    """Predicts a velocity of zeros.

    channels: of its answer; by default those of its input. config: what the pipeline reads of its configuration.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, channels: int | None = None, **config: Any) -> None:
        super().__init__()
        self.channels, self.config = channels, SimpleNamespace(**config)

    @contextmanager
    def cache_context(self, _name: str) -> Iterator[None]:
        yield

    def forward(self, hidden_states: torch.Tensor, *_: Any, **others: Any) -> Any:
        still = torch.zeros_like(hidden_states[:, : self.channels] if self.channels else hidden_states)
        return (still,) if others.get("return_dict") is False else SimpleNamespace(sample=still)
