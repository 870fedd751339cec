"""The interface of a coder: one direction of a VAE on its device, as the pipeline calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ...errors import ServerError
from ...values import Layout

Check = Callable[[], None]
"""Called by a coder between two steps of its work. Raises Stopped once every client of the work has left."""

Emit = Callable[[Tensor, Tensor], None]
"""`emit(frames, finite)` receives finished images or frames in order, on the device, in the layout that was asked for.

finite: whether everything computed so far was finite, as in `Coded`.
"""


class Stopped(ServerError):
    """The work was stopped between two of its steps, because no client waits for it any more."""


def go_on() -> None:
    """Do nothing: the check of work that always runs to its end."""


@dataclass(frozen=True)
class Coded:
    """What a coder returns. finite: whether every value computed was finite, a 0-d bool tensor on the device.

    The tensor's rounding to uint8 would hide a NaN, so `finite` is taken before it.
    """

    tensor: Tensor
    finite: Tensor


class Coder(Protocol):
    """One direction of a VAE on its device.

    name: the name of the implementation in `GET /models`. While a coder named `EXACT` calls `check`, the same coder may
        be called again.
    """

    name: str

    @property
    def heeds_budget(self) -> bool:
        """Return whether a smaller `budget_bytes` makes a call hold less memory."""
        ...

    def free_caches(self) -> None:
        """Free all device memory that is kept to make the next call faster."""
        ...


class Decoder(Coder, Protocol):
    """Decodes with the weights of one VAE."""

    def decode(
        self,
        latents: Tensor,
        layout: Layout,
        *,
        budget_bytes: int | None = None,
        emit: Emit | None = None,
        check: Check = go_on,
        **arguments: float,
    ) -> Coded:
        """Decode unscaled latents `[B, C, h, w]` or `[B, C, F, h, w]`, on any device and of any dtype, to `layout`.

        budget_bytes: the memory limit of the activations; None means the memory that is free now. diffusers' own
        decoder ignores it. arguments: further arguments of the family's `vae.decode`.
        Raises Stopped, and whatever torch raises.
        """
        ...


class Encoder(Coder, Protocol):
    """Encodes with the weights of one VAE."""

    def encode(self, pixels: Tensor, *, budget_bytes: int | None = None, check: Check = go_on) -> Coded:
        """Encode pixels `[B, C, (F,) H, W]` in [-1, 1]: C is 3, or 4 for a VAE with an alpha channel.

        H and W are multiples of the VAE's scale factor.

        Returns the parameters of the posterior `[B, 2 C, (f,) h, w]`, mean and logarithm of the variance, in the
        weights' dtype: `vae.encode(pixels).latent_dist.parameters` of diffusers. A VAE without a posterior gives its
        latents. Raises Stopped, and whatever torch raises.
        """
        ...


@contextmanager
def checking(module: nn.Module, check: Check) -> Iterator[None]:
    """Call `check` before each layer of a diffusers module that runs inside this context.

    A layer is a module without children: a convolution, a norm, a linear layer.
    """

    def before(_layer: nn.Module, _arguments: tuple[Any, ...]) -> None:
        check()

    layers = [layer for layer in module.modules() if next(layer.children(), None) is None]
    hooks = [layer.register_forward_pre_hook(before) for layer in layers] if check is not go_on else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
