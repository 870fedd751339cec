"""CPU kernels: oneDNN convolutions with prepacked weights, and norms computed by torch's vectorized batch norm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from .moments import Affine, Moments
from .reference import TAPS, Kernels
from .trial import seconds

_ONES = [1, 1]  # the dilation, and the stride of `add_conv_`
_PADDING = [0, 1]  # rows, columns: the input has its halo rows already
# Weights are packed for bands of this size. oneDNN packs most weights in the same way for every size, or packs them
# again at each call, which takes about 40 µs. Some weights, however, take 3 to 700 ms: those with 96 channels, and many
# with a multiple of 96. They are found by timing a convolution of the small size below, and are not packed. Every call
# packs an unpacked weight: 0.2 ms for three taps of 256 channels, 20 ms for 1024 channels.
_BAND_FRAMES, _BAND_ROWS, _BAND_COLUMNS = 6, 18, 256
_SMALL_ROWS, _SMALL_COLUMNS = 10, 8
# A packed weight is dropped if it makes the small convolution more than this many times slower.
SLOW_REORDER = 5
_SUMS = 16  # into how many sums the values of a channel are divided for its mean, if the width allows it

_is_packed: dict[tuple[object, ...], bool] = {}
"""Whether weights are packed, by their shape, dtype and stride: found out with the first such weight of a process."""


def preferred_cpu_dtype() -> torch.dtype:
    """Return bfloat16 if the CPU multiplies it in hardware, else float32: emulated bfloat16 is slower than float32.

    oneDNN must support bfloat16 too, because ONEDNN_MAX_CPU_ISA can keep it from using instructions that the CPU has.
    """
    is_in_hardware = _has("amx_tile") or _has("avx512_bf16")
    if is_in_hardware and _has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _has(feature: str) -> bool:
    probe = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return bool(probe and probe())


class CpuKernels(Kernels):
    """Kernels for a CPU.

    Norms are computed image by image, because the statistics of a batch norm are those of the whole batch. Convolutions
    take the whole batch at once.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        """Find out whether oneDNN can prepack weights of this dtype; if not, plain torch convolutions are used."""
        operators = ("_reorder_convolution_weight", "_convolution_pointwise", "_convolution_pointwise_")
        self.prepacks = (
            _has_onednn()
            and dtype in (torch.float32, preferred_cpu_dtype())
            and all(hasattr(torch.ops.mkldnn, operator) for operator in operators)
        )
        name = str(dtype).removeprefix("torch.")
        slower = f"oneDNN cannot pack weights in {name} here, so plain convolutions run, which are slower."
        super().__init__(None if self.prepacks else slower)

    def pack(self, weight: Tensor, stride: int = 1) -> Tensor:  # [O, I, k, k]
        """Return the weight as `conv` expects it, packed for oneDNN unless that makes small convolutions slow."""
        if not self.prepacks:
            return super().pack(weight)
        shape = [1, weight.shape[1], _BAND_ROWS, _BAND_COLUMNS]
        x = weight.new_zeros(1, _SMALL_ROWS, _SMALL_COLUMNS, weight.shape[1])  # [1, n, W, I]
        return _packed(
            weight, super().pack(weight), _PADDING, stride, shape, lambda form: self.conv(x, form, None, stride=stride)
        )

    def pack_frames(self, weight: Tensor) -> Tensor:  # [O, I, 3, 3, 3]
        """Return the weight as `conv_frames` expects it, packed for oneDNN as `pack` says."""
        if not (self.in_3d and self.prepacks):
            return super().pack_frames(weight)
        shape = [1, weight.shape[1], _BAND_FRAMES, _BAND_ROWS, _BAND_COLUMNS]
        window = weight.new_zeros(TAPS, _SMALL_ROWS, _SMALL_COLUMNS, weight.shape[1])  # [3, n, W, I]
        bias = weight.new_zeros(len(weight))  # [O]
        return _packed(
            weight,
            super().pack_frames(weight),
            [0, *_PADDING],
            1,
            shape,
            lambda form: self.conv_frames(window, form, bias, 1),
        )

    def conv_frames(
        self, window: Tensor, weight: Tensor, bias: Tensor, columns: int
    ) -> Tensor:  # [n + 2, r + 2, W + 2 - 2 columns, I] -> [n, r, W, O]
        """Convolve as `Kernels.conv_frames` says, with oneDNN: torch's own 3-D convolution is slow for low bands."""
        if not (self.in_3d and self.prepacks):
            return super().conv_frames(window, weight, bias, columns)
        ones = [1, 1, 1]
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            window.permute(3, 0, 1, 2)[None], weight, bias, [0, 0, columns], ones, ones, 1, "none", [], ""
        )  # [1, O, n, r, W]
        return y[0].permute(1, 2, 3, 0).contiguous()  # [n, r, W, O], already in this order

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, columns: int = 1, stride: int = 1) -> Tensor:
        """Convolve as `Kernels.conv` says, with oneDNN."""
        if not self.prepacks:
            return super().conv(x, weight, bias, columns, stride)
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x.permute(0, 3, 1, 2), weight, bias, [0, columns], [stride, stride], _ONES, 1, "none", [], ""
        )  # [B, O, n, W]
        return y.permute(0, 2, 3, 1).contiguous()  # [B, n, W, O], already in this order

    def add_conv_(self, total: Tensor, x: Tensor, weight: Tensor, bias: Tensor, unit: int) -> Moments:
        """Convolve and add as `Kernels.add_conv_` says, in one oneDNN call."""
        if not self.prepacks:
            return super().add_conv_(total, x, weight, bias, unit)
        torch.ops.mkldnn._convolution_pointwise_.binary(
            total.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, bias,
            _PADDING, _ONES, _ONES, 1, "add", 1.0, None, [], None,
        )  # fmt: skip
        return self.moments(total, unit)

    def moments(self, x: Tensor, unit: int) -> Moments:  # [B, n, W, C]
        """Return the moments of x, one part for each `unit` of rows, so that they do not depend on the band height.

        A batch norm adds up the values of a channel one after the other, and the rounding of a long sum matters where
        the mean is much larger than the deviation. So neighbouring columns are given to it as channels of their own.
        """
        batch, rows, width, channels = x.shape
        columns = gcd(width, _SUMS)
        narrow = x.view(batch, rows, width // columns, columns * channels).permute(0, 3, 1, 2)  # [B, s C, n, W / s]
        # The results have the dtype of the running statistics, which are otherwise unused here.
        running = torch.zeros(2, columns * channels, dtype=torch.float32)  # [2, s C]
        parts = [part for image in torch.split(narrow, 1) for part in torch.split(image, unit, 2)]
        statistics = [torch.batch_norm_update_stats(part, running[0], running[1], 0.0) for part in parts]  # [s C] twice
        count = torch.tensor(
            [min(unit, rows - top) * width for top in range(0, rows, unit)], dtype=torch.float32
        )  # [K]
        shape = batch, len(count), columns, channels
        means = torch.stack([mean for mean, _ in statistics]).view(shape).transpose(0, 1)  # [K, B, s, C]
        variances = torch.stack([variance for _, variance in statistics]).view(shape).transpose(0, 1)  # [K, B, s, C]
        mean = means.mean(2)  # [K, B, C]: every sum has the same number of pixels
        variance = (variances + (means - mean[:, :, None]).square()).mean(2)  # [K, B, C]
        return Moments(count, mean, variance * count[:, None, None])

    def normalize(self, x: Tensor, affine: Affine, out: Tensor, *, silu: bool) -> None:
        """Normalize as `Kernels.normalize` says, in one pass over x."""
        # A batch norm with mean 0, variance 1 and eps 0 is the affine map. It computes in float32 for every dtype of x.
        zeros, ones = torch.zeros_like(affine.scale[0]), torch.ones_like(affine.scale[0])  # [C]
        unused = x.new_empty(0, dtype=torch.float32)
        for image in range(x.shape[0]):
            one, written = x[image : image + 1], out[image : image + 1]  # [1, n, W, C]
            torch.native_batch_norm(
                one.permute(0, 3, 1, 2), affine.scale[image], affine.shift[image], zeros, ones, False, 0.0, 0.0,
                out=(written.permute(0, 3, 1, 2), unused, unused),
            )  # fmt: skip
        if silu:
            F.silu(out, inplace=True)


def _packed(
    weight: Tensor, plain: Tensor, padding: list[int], stride: int, shape: list[int], run: Callable[[Tensor], object]
) -> Tensor:
    """Return a weight packed for an input of a shape, or its plain form where packing makes small convolutions slow.

    run: convolves an input of the small size with one of the forms.
    """
    key = tuple(weight.shape), weight.dtype, stride
    if not _is_packed.get(key, True):
        return plain
    strides, ones = [stride] * len(padding), [1] * len(padding)
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, strides, ones, 1, shape)
    if key not in _is_packed:
        slow, fast = (seconds(partial(run, form)) for form in (packed, plain))
        _is_packed[key] = slow <= SLOW_REORDER * fast
    return packed if _is_packed[key] else plain
