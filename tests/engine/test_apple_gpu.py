"""What an Apple GPU needs, tested on a CPU with the kernels that run there: it has no float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from server.engine.coders.build import build_coder
from server.engine.coders.image import exact_coder, layers
from server.engine.coders.interface import Coded
from server.engine.coders.video import causal_decoder, causal_encoder, ltx_decoder, wan_layers
from server.engine.kernels import choice
from server.engine.kernels.cpu import CpuKernels
from server.families import family_of_class
from server.model_info import Direction
from server.values import Layout
from tests.pipelines import vaes

APPLE = torch.device("mps")
BUILDERS: dict[str, Callable[[], Any]] = {
    name: getattr(vaes, name)
    for name in (
        "kl", "kl16", "flux2", "wan", "wan_22", "qwen_image", "hunyuan_video", "hunyuan_video_15", "ltx", "ltx2",
        "cogvideox", "mochi", "magvit",
    )
}  # fmt: skip


class NoFloat64(TorchDispatchMode):
    """Within it every operation that makes a tensor in float64 raises."""

    def __torch_dispatch__(self, run: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = run(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                assert tensor.dtype is not torch.float64, f"{run} makes float64"
        return made


@pytest.fixture(autouse=True)
def kernels_of_an_apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_for, causal_kernels_for = choice.kernels_for, choice.causal_kernels_for
    for module in (layers, wan_layers):  # which fold weights in float64 on the CPU
        monkeypatch.setattr(module, "precise", lambda x: x)
    for module in (exact_coder, causal_decoder, causal_encoder, ltx_decoder):
        for name, chosen in (("kernels_for", kernels_for), ("causal_kernels_for", causal_kernels_for)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda _device, dtype, chosen=chosen: chosen(APPLE, dtype))


class Recorded(TorchDispatchMode):
    """Notes the dtype and the device of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[torch.dtype, str]] = []

    def __torch_dispatch__(self, run: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = run(*args, **(kwargs or {}))
        self.made += [(each.dtype, each.device.type) for each in tree_leaves(made) if isinstance(each, torch.Tensor)]
        return made


def test_folded_weights_are_rounded_before_they_leave_the_cpu() -> None:
    """`meta` stands for the device without float64."""
    folded, like = torch.ones(2, 2, dtype=torch.float64), torch.empty(2, 2, dtype=torch.float16, device="meta")
    with Recorded() as recorded:
        layers.rounded(folded, like)
    assert recorded.made == [(torch.float16, "cpu"), (torch.float16, "meta")]


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("direction", Direction)
def test_nothing_is_computed_in_float64(name: str, direction: Direction) -> None:
    vae = BUILDERS[name]()
    family = family_of_class(type(vae).__name__)
    assert family is not None
    spec = family.describe(vae.config)
    size = (3, 4, 4) if spec.kind == "video" else (4, 4)
    latents = torch.randn(1, spec.channels, *size)  # [1, C, (F,) h, w]
    with torch.inference_mode(), NoFloat64():
        decoder: Any = build_coder(BUILDERS[name](), family, Direction.DECODE, "auto", "none")[0]
        assert decoder.name == "exact"
        coded: Coded = decoder.decode(latents, Layout.SAMPLE)
        if direction is Direction.ENCODE:
            encoder: Any = build_coder(vae, family, Direction.ENCODE, "auto", "none")[0]
            assert encoder.name == "exact"
            coded = encoder.encode(coded.tensor.clamp(-1, 1))
    assert bool(coded.finite)
    kernels = getattr(decoder, "kernels", None)
    assert not isinstance(getattr(kernels, "planar", kernels), CpuKernels)
