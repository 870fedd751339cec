"""diffusers' own `vae.decode` and `vae.encode`, as a user's local pipeline calls them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...families import Family
from ...values import Layout
from .interface import Check, Coded, Emit, checking, go_on
from .layouts import postprocess


class StockCoder:
    """What diffusers' own decoder and encoder have in common."""

    name = "diffusers"
    heeds_budget = False

    def __init__(self, vae: Any, family: Family) -> None:
        weight = next(weight for weight in vae.parameters() if not weight.is_meta)
        # As `from_pretrained` leaves it: torch multiplies in another order where no weight requires a gradient.
        self.vae = vae.requires_grad_(True)
        self.family = family
        self.device, self.dtype = weight.device, weight.dtype

    def free_caches(self) -> None:
        """Do nothing: diffusers' modules keep no caches between calls."""

    @torch.inference_mode()
    def run(self, compute: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, check: Check) -> Coded:
        """Compute a batch `[B, ...]`. check: called before each layer.

        On a CPU the images or videos of a batch are computed one by one, because torch's kernels round differently for
        different batch sizes, and the answer to a request must not depend on the requests beside it. The same holds for
        families whose VAE cannot compute a batch.
        """
        batch = batch.to(self.device, self.dtype)
        is_one_by_one = self.device.type == "cpu" or not self.family.takes_batches
        parts = torch.split(batch, 1) if is_one_by_one else [batch]
        with checking(self.vae, check):
            outputs = [compute(part) for part in parts]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return Coded(output, torch.isfinite(output).all())


class StockDecoder(StockCoder):
    """diffusers' own decoder."""

    def decode(
        self,
        latents: torch.Tensor,
        layout: Layout,
        *,
        budget_bytes: int | None = None,
        emit: Emit | None = None,
        check: Check = go_on,
        **arguments: float,
    ) -> Coded:
        """Decode as `Decoder.decode` says. The budget has no effect, because diffusers has no such setting.

        arguments: a `seed` becomes the `generator` of each call of `vae.decode`. It draws on the CPU, so that the noise
            is the same on every device.
        """
        others = {name: value for name, value in arguments.items() if name != "seed"}

        def compute(part: torch.Tensor) -> torch.Tensor:
            noise = {"generator": torch.Generator().manual_seed(int(arguments["seed"]))} if "seed" in arguments else {}
            return self.family.decode(self.vae, part, **others, **noise)

        sample = self.run(compute, latents, check)
        output = postprocess(sample.tensor, layout)
        if emit is not None:
            emit(output, sample.finite)
        return Coded(output, sample.finite)


class StockEncoder(StockCoder):
    """diffusers' own encoder."""

    def encode(self, pixels: torch.Tensor, *, budget_bytes: int | None = None, check: Check = go_on) -> Coded:
        """Encode as `Encoder.encode` says. The budget has no effect, because diffusers has no such setting."""
        return self.run(partial(self.family.encode, self.vae), pixels, check)
