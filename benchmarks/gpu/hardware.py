"""The device, its driver and libraries, and how fast it multiplies matrices and convolves."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable

import torch

from benchmarks.decode import MEGA, device_name, synchronise
from benchmarks.gpu.report import Report
from benchmarks.gpu.sizes import sizes_for
from server.engine.kernels.choice import causal_kernels_for, kernels_for, triton_problem
from server.engine.memory import free_bytes

RUNS = 10


def run(report: Report) -> None:
    """Write the lines of this section."""
    device, sizes = torch.device(report.device), sizes_for(report.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    describe(report, device)
    for name in sizes.dtypes:
        dtype = getattr(torch, name)
        matrix_rate(report, device, dtype, sizes.matrix, name)
        for side, channels in sizes.convolution:
            convolution_rate(report, device, dtype, side, channels, name)
        frames_rate(report, device, dtype, name)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        matrix_rate(report, device, torch.float32, sizes.matrix, "TensorFloat-32")
        for side, channels in sizes.convolution:
            convolution_rate(report, device, torch.float32, side, channels, "TensorFloat-32")


def describe(report: Report, device: torch.device) -> None:
    """Write what the device and the libraries are."""
    report.line("device", name=device_name(device), free_mb=free_bytes(device) / MEGA, torch=torch.__version__)
    if device.type != "cuda":
        return
    properties = torch.cuda.get_device_properties(device)
    report.line(
        "properties",
        capability=f"{properties.major}.{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        total_mb=properties.total_memory / MEGA,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        bfloat16=torch.cuda.is_bf16_supported(False),
    )
    report.line("driver", **nvidia_smi())
    report.line("kernels", ours=type(kernels_for(device, torch.bfloat16)).__name__, note=triton_problem(device))


def nvidia_smi() -> dict[str, str]:
    """Return the driver's version, the clock and the power limit, as nvidia-smi tells them."""
    query = ("driver_version", "clocks.max.sm", "power.limit", "persistence_mode", "compute_mode")
    command = ["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"driver_version": f"unknown ({type(error).__name__})"}
    return dict(zip(query, (value.strip() for value in told.splitlines()[0].split(",")), strict=True))


def matrix_rate(report: Report, device: torch.device, dtype: torch.dtype, side: int, name: str) -> None:
    """Write the rate of a product of two square matrices."""
    report.check_time()
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))  # [side, side] twice
    seconds = fastest(lambda: a @ b, device)
    report.line(f"matrix {side}x{side} {name}", ms=seconds * 1e3, tflop_per_s=2 * side**3 / seconds / 1e12)


def convolution_rate(
    report: Report, device: torch.device, dtype: torch.dtype, side: int, channels: int, name: str
) -> None:
    """Write the rate of a 3x3 convolution, with the kernels that the coders of images use."""
    report.check_time()
    kernels = kernels_for(device, dtype)
    image = torch.randn(1, side + 2, side, channels, device=device).to(dtype)  # [1, H + 2, W, C]
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype)  # [C, C, 3, 3]
    packed = kernels.pack(weight)
    seconds = fastest(lambda: kernels.conv(image, packed, None), device)
    work = 2 * 9 * channels**2 * side**2
    report.line(
        f"convolution {side}x{side}, {channels} channels, {name}", ms=seconds * 1e3, tflop_per_s=work / seconds / 1e12
    )


def frames_rate(report: Report, device: torch.device, dtype: torch.dtype, name: str) -> None:
    """Write the rate of a convolution over frames, with the kernels that the coders of videos use."""
    report.check_time()
    kernels = causal_kernels_for(device, dtype).planar
    side, channels = sizes_for(report.device).convolution[0]
    window = torch.randn(6, side // 4 + 2, side, channels, device=device).to(dtype)  # [n + 2, r + 2, W, C]
    weight = torch.randn(channels, channels, 3, 3, 3, device=device).to(dtype)  # [C, C, 3, 3, 3]
    packed, bias = kernels.pack_frames(weight), weight.new_zeros(channels)  # [C]
    seconds = fastest(lambda: kernels.conv_frames(window, packed, bias, 1), device)
    work = 2 * 27 * channels**2 * 4 * (side // 4) * side
    form = "in 3-D" if kernels.in_3d else "side by side"
    report.line(
        f"convolution over 4 frames of {side // 4}x{side}, {channels} channels, {name}",
        ms=seconds * 1e3,
        tflop_per_s=work / seconds / 1e12,
        form=form,
    )


def fastest(call: Callable[[], object], device: torch.device) -> float:
    """Return the shortest time of some calls in seconds, without the first one, which sets up the libraries."""
    call()
    best = math.inf
    for _ in range(RUNS):
        synchronise(device)
        started = time.perf_counter()
        call()
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return best
