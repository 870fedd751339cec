"""Compare the exact decoder with diffusers' own in time, memory and quality, alternating in one process.

    python -m benchmarks.decode --sizes 512 1024 --repeats 5
    python -m benchmarks.decode --device cuda --sizes 512 1024 2048 --compile

The VAE has the size of those of SD1, SDXL, SD3 and Flux, and random weights with a fixed seed. Quality is the PSNR
against the float32 decode. OpenVINO is measured on a CPU if it is installed.

`--save NAME` also writes benchmarks/results/NAME.json, which `benchmarks.plot` draws.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import importlib.util
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from server.engine.coders.image.decoder import ExactKLDecoder
from server.engine.coders.image.layers import Attention, DecoderWeights, Resnet, Upsample
from server.engine.coders.image.plan import RECOMPUTED_BAND_BYTES, Plan, footprint
from server.values import Layout

Variant = Callable[[Tensor], Tensor]
MEGA = 1e6
RESULTS = Path(__file__).parent / "results"
HEADER = "| size | decode | s | s (best) | ratio | against fp32 | of matrix rate | peak activations MB | PSNR dB |"
FP32, BF16 = "diffusers fp32", "diffusers bf16 channels_last"
LONG_S = 20.0  # a decode that takes longer is run once, without a warm-up
COMPILED_SIDE = 1024  # the largest size that is compiled, because larger ones take minutes each
LARGEST_FP32_SIDE = 2048
# The bytes that a variant needs per pixel, measured at 1024². Variants that do not fit into memory are left out.
BYTES_PER_PIXEL = {FP32: 4000, BF16: 1700, "OpenVINO bf16": 1200, "ours, one band": 1500}


def full_size_vae(without: str | None = "encoder") -> AutoencoderKL:
    """Return a VAE with random weights.

    Its norms are not the identity, so that its activations spread like those of a trained VAE.

    without: `encoder` or `decoder`, which is left out; None for neither.
    """
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,  # diffusers derives its tile size from it
        up_block_types=("UpDecoderBlock2D",) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
    )
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    if without is not None:
        setattr(vae, without, torch.nn.Identity())
    return vae.eval().requires_grad_(False)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--budget-mb", type=int, default=None, help="also measure a variant with this memory budget, in MB"
    )
    parser.add_argument("--only", nargs="+", default=None, help="run only variants whose names contain one of these")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile")
    parser.add_argument("--save", default=None, metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    torch.backends.cudnn.allow_tf32 = False  # the float32 decode is the reference of quality
    device = torch.device(arguments.device)

    rate = matrix_rate(device)
    print(f"{device_name(device)}, torch {torch.__version__}, bf16 matrix product {rate / 1e12:.2f} TFLOP/s\n")
    all_variants, network = variants(device, arguments)
    chosen = {n: f for n, f in all_variants.items() if not arguments.only or any(o in n for o in arguments.only)}
    print(HEADER)
    print("| --- " * HEADER.count(" | ") + "| --- |")
    rows = [row for size in arguments.sizes for row in table(size, chosen, network, rate, device, arguments.repeats)]
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        machine = f"{device_name(device)}, torch {torch.__version__}"
        saved = {"machine": machine, "date": f"{datetime.now(UTC):%Y-%m-%d}", "rate_flops": rate, "rows": rows}
        (RESULTS / f"{arguments.save}.json").write_text(json.dumps(saved, indent=1) + "\n")


def variants(device: torch.device, arguments: argparse.Namespace) -> tuple[dict[str, Variant], DecoderWeights]:
    """Return the variants by name, and the weights of the exact decoder, which give the number of operations."""
    vae = full_size_vae().to(device)
    half = copy.deepcopy(vae).to(torch.bfloat16)
    decoder = ExactKLDecoder(copy.deepcopy(half))
    nhwc = copy.deepcopy(half).to(memory_format=torch.channels_last)
    tiled = copy.deepcopy(nhwc)
    tiled.enable_tiling()

    chosen: dict[str, Variant] = {FP32: stock(vae), BF16: stock(nhwc)}
    chosen[f"{BF16} tiled (not exact)"] = stock(tiled)
    if device.type == "cuda":
        chosen["diffusers bf16"] = stock(half)
        chosen["ours, no graph"] = ours(decoder, lambda plan, _: plan)
    if arguments.compile:
        chosen["torch.compile bf16 channels_last"] = compiled(nhwc)
    if device.type == "cpu" and importlib.util.find_spec("openvino"):
        chosen["OpenVINO bf16"] = openvino(vae)
    if device.type == "cpu":
        single = ExactKLDecoder(copy.deepcopy(vae))
        chosen["ours, fp32"] = lambda latents: single.decode(latents, Layout.SAMPLE).tensor
    chosen["ours, one band"] = ours(decoder, lambda plan, largest: replace(plan, band_bytes=largest))
    chosen["ours, recomputing"] = ours(
        decoder, lambda plan, _: replace(plan, recomputes=True, band_bytes=RECOMPUTED_BAND_BYTES)
    )
    chosen["ours"] = lambda latents: decoder.decode(latents.to(torch.bfloat16), Layout.SAMPLE).tensor
    if arguments.budget_mb:
        chosen[f"ours, {arguments.budget_mb} MB"] = at_budget(decoder, arguments.budget_mb << 20)
    return chosen, decoder.network


def compiled(vae: AutoencoderKL) -> Variant:
    """Return diffusers' decode with torch.compile."""
    vae = copy.deepcopy(vae)
    torch._inductor.config.freezing = True  # as torch recommends for inference on a CPU
    vae.decoder.forward = torch.compile(vae.decoder.forward, dynamic=False)
    return stock(vae)


def openvino(vae: AutoencoderKL) -> Variant:
    """Return OpenVINO's decode, with one compiled model per shape.

    Its memory can be released after each decode, so that the memory of the next one can be measured.
    """
    ov = importlib.import_module("openvino")

    class Whole(torch.nn.Module):
        def forward(self, latents: Tensor) -> Any:
            return vae.decoder(vae.post_quant_conv(latents))

    with warnings.catch_warnings(action="ignore"):
        model = ov.convert_model(Whole(), example_input=torch.randn(1, 4, 8, 8))
    made: dict[tuple[int, ...], Any] = {}

    def decode(latents: Tensor) -> Tensor:
        shape = tuple(latents.shape)
        if shape not in made:
            model.reshape(list(shape))
            hints = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
            made[shape] = ov.Core().compile_model(model, "CPU", hints)
        return torch.from_numpy(made[shape](latents.numpy())[0])

    def release() -> None:
        for network in made.values():
            network.release_memory()

    decode.release = release
    return decode


def stock(vae: AutoencoderKL) -> Variant:
    """Return diffusers' own decode."""
    return lambda latents: vae.decode(latents.to(vae.dtype)).sample


def ours(decoder: ExactKLDecoder, change: Callable[[Plan, int], Plan]) -> Variant:
    """Return the exact decode with a changed plan. change: gets the plan and the bytes of the largest activation."""

    def decode(latents: Tensor) -> Tensor:
        batch, _, height, width = latents.shape
        plan = change(decoder.plan(batch, height, width), footprint(decoder.network, height, width).largest)
        with torch.inference_mode():
            return decoder.run(plan, latents.to(torch.bfloat16), layout=Layout.SAMPLE)[0]

    return decode


def at_budget(decoder: ExactKLDecoder, budget_bytes: int) -> Variant:
    """Return the exact decode with a memory budget."""

    def decode(latents: Tensor) -> Tensor:
        plan = decoder.plan(latents.shape[0], *latents.shape[2:], budget_bytes=budget_bytes)
        with torch.inference_mode():
            return decoder.run(plan, latents.to(torch.bfloat16), layout=Layout.SAMPLE)[0]

    return decode


def table(
    size: int, chosen: dict[str, Variant], network: DecoderWeights, rate: float, device: torch.device, repeats: int
) -> list[dict[str, Any]]:
    """Measure the variants at one size, and print and return a row for each.

    rate: the FLOP/s of a matrix product, with which the decodes are compared.
    """
    latents = torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(size)).to(device)
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    peaks, quality = {}, {}
    reference: Tensor | None = None
    left_out = {name: reason for name in chosen if (reason := reason_to_leave_out(name, size, device))}
    runs = {name: decode for name, decode in chosen.items() if name not in left_out}
    for name, decode in runs.items():  # measure memory and quality, and the time if the decode is long
        try:
            if compiles_first(name):
                decode(latents)
            started = time.perf_counter()
            peaks[name], sample = peak_of(decode, latents, device)
        except torch.OutOfMemoryError:
            left_out[name] = "out of memory"
            continue
        if (elapsed := time.perf_counter() - started) > LONG_S:
            seconds[name].append(elapsed)
        sample = sample.float().cpu()
        reference = sample if name == FP32 else reference
        quality[name] = psnr(sample, reference)
    for _ in range(repeats):
        for name in peaks:
            if not seconds[name] or seconds[name][0] <= LONG_S:
                seconds[name].append(timed(runs[name], latents, device))
    medians = {name: statistics.median(times) for name, times in seconds.items() if times}
    rows: list[dict[str, Any]] = []
    for name in chosen:
        if name in left_out:
            print(f"| {size}² | {name} | {left_out[name]} | | | | | | |", flush=True)
            continue
        row = {
            "size": size, "decode": name, "s": medians[name], "best_s": min(seconds[name]),
            "ratio": medians.get(BF16, math.nan) / medians[name],
            "against_fp32": medians.get(FP32, math.nan) / medians[name],
            "share": folded_flops(network, size // 8) / medians[name] / rate,
            "peak_bytes": peaks[name], "psnr_db": quality[name],
        }  # fmt: skip
        rows.append(row)
        print(
            f"| {size}² | {name} | {row['s']:.4g} | {row['best_s']:.4g} | {row['ratio']:.2f} "
            f"| {row['against_fp32']:.1f} | {row['share']:.0%} | {peaks[name] / MEGA:.0f} | {quality[name]:.2f} |",
            flush=True,
        )
    return rows


def reason_to_leave_out(name: str, size: int, device: torch.device) -> str | None:
    """Return why a variant is not measured at a size; None if it is."""
    if name.startswith("torch.compile") and device.type == "cpu" and size > COMPILED_SIDE:
        return f"compiled only up to {COMPILED_SIDE}²"
    if device.type == "cpu":
        needed = BYTES_PER_PIXEL.get(name, 0) * size * size
        if needed > psutil.virtual_memory().available:
            return f"needs about {needed / 1e9:.0f} GB"
        if "fp32" in name and size > LARGEST_FP32_SIDE:
            return "takes many minutes"
    return None


def compiles_first(name: str) -> bool:
    """Return whether a variant needs an additional first run, in which it compiles.

    For the others, the run that measures the memory is the warm-up.
    """
    return name.startswith(("torch.compile", "OpenVINO"))


def timed(decode: Variant, latents: Tensor, device: torch.device) -> float:
    """Return the time of a decode in seconds."""
    synchronise(device)
    start = time.perf_counter()
    decode(latents)
    synchronise(device)
    return time.perf_counter() - start


def peak_of(decode: Variant, latents: Tensor, device: torch.device) -> tuple[int, Tensor]:
    """Return the peak memory of a decode in bytes, without the memory in use before, and its result.

    It is the allocator's count on a GPU, and the resident memory of the process on a CPU.
    """
    gc.collect()
    getattr(decode, "release", lambda: None)()
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sample = decode(latents)
        synchronise(device)
        return torch.cuda.max_memory_allocated() - before, sample
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    sample = decode(latents)
    return resident("VmHWM") - before, sample


def resident(field: str) -> int:
    """Return a size from /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def psnr(sample: Tensor, reference: Tensor | None) -> float:
    """Return the PSNR of a sample in dB; NaN without a reference."""
    if reference is None:
        return math.nan
    error = (sample - reference).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(4 / error)  # the sample spans [-1, 1]


def folded_flops(network: DecoderWeights, side: int) -> float:
    """Return the floating-point operations of a decode: those of the convolutions and of the attention.

    A multiply-add counts as two operations. The convolution after an upsample counts as four 2x2 phases.

    side: height and width of the latents, in latent pixels.
    """
    pixels, channels = side * side, network.conv_in.out_channels
    total = 2.0 * pixels * channels * 9 * 4
    for step in network.steps:
        match step:
            case Resnet():
                out = step.conv1.out_channels
                total += 2 * 9 * pixels * out * (channels + out) + (2 * pixels * channels * out if step.shortcut else 0)
                channels = out
            case Attention():
                total += 2 * pixels * channels * (3 * channels + 2 * pixels)
            case Upsample():
                pixels *= 4
                total += 2 * 4 * pixels * channels * step.conv.out_channels
    return total + 2 * 9 * pixels * channels * 3


def matrix_rate(device: torch.device) -> float:
    """Return the best rate of a few large bf16 matrix products in FLOP/s. Some have the shapes of convolutions."""
    best = 0.0
    shapes = [(8192, 8192, 8192)] if device.type == "cuda" else [(4096, 512, 512), (16384, 1152, 128)]
    for m, k, n in shapes:
        a, b = torch.randn(m, k, device=device).bfloat16(), torch.randn(k, n, device=device).bfloat16()
        for _ in range(20):
            synchronise(device)
            start = time.perf_counter()
            a @ b
            synchronise(device)
            best = max(best, 2.0 * m * k * n / (time.perf_counter() - start))
    return best


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
