"""Time, memory and quality of the exact decoder beside diffusers' own, alternating in one process.

    python -m benchmarks.decode --sizes 512 1024 --repeats 5
    python -m benchmarks.decode --device cuda --sizes 512 1024 2048

The VAE has the size of SD1, SDXL, SD3 and Flux and seeded random weights. Quality is the PSNR against float32.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from server.engine.decoders.exact import ExactKLDecoder
from server.engine.decoders.exact.network import Attention, Network, Resnet, Upsample
from server.engine.decoders.exact.plan import Plan, footprint
from server.types import Layout

Variant = Callable[[Tensor], Tensor]
MEGA = 1e6
HEADER = (
    "| size | decode | ms (median) | ms (best) | ratio | ratio of the best | of matrix rate "
    "| peak activations MB | PSNR dB |"
)


def full_size_vae() -> AutoencoderKL:
    """Random weights, with norms that are not the identity, so that the activations have a trained decoder's spread."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,  # what diffusers takes its tile size from
        up_block_types=("UpDecoderBlock2D",) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
    )
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    vae.encoder = torch.nn.Identity()
    return vae.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget-mb", type=int, default=None, help="memory budget of the 'at budget' variant")
    parser.add_argument("--only", nargs="+", default=None, help="substrings of the variants to run")
    parser.add_argument("--compile", action="store_true", help="also torch.compile")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    torch.backends.cudnn.allow_tf32 = False  # the float32 decode is the reference of quality
    device = torch.device(arguments.device)

    rate = matrix_rate(device)
    print(f"{device_name(device)}, torch {torch.__version__}, bf16 matrix product {rate / 1e12:.2f} TFLOP/s\n")
    all_variants, network = variants(device, arguments)
    print(HEADER)
    print("| --- " * HEADER.count(" | ") + "| --- |")
    for size in arguments.sizes:
        chosen = {n: f for n, f in all_variants.items() if not arguments.only or any(o in n for o in arguments.only)}
        table(size, chosen, network, rate, device, arguments.repeats)


def variants(device: torch.device, arguments: argparse.Namespace) -> tuple[dict[str, Variant], Network]:
    vae = full_size_vae().to(device)
    half = copy.deepcopy(vae).to(torch.bfloat16)
    decoder = ExactKLDecoder(copy.deepcopy(half))
    nhwc = copy.deepcopy(half).to(memory_format=torch.channels_last)
    tiled = copy.deepcopy(nhwc)
    tiled.enable_tiling()

    chosen: dict[str, Variant] = {"diffusers fp32": stock(vae), "diffusers bf16 channels_last": stock(nhwc)}
    chosen["diffusers bf16 channels_last tiled (not exact)"] = stock(tiled)
    if device.type == "cuda":
        chosen["diffusers bf16"] = stock(half)
        chosen["ours, no graph"] = ours(decoder, lambda plan, _: plan)
    if arguments.compile:
        compiled = copy.deepcopy(nhwc)
        compiled.decoder.forward = torch.compile(compiled.decoder.forward, dynamic=False)
        chosen["torch.compile bf16 channels_last"] = stock(compiled)
    chosen["ours, one band"] = ours(decoder, lambda plan, largest: replace(plan, band_bytes=largest))
    chosen["ours"] = lambda latents: decoder.decode(latents.to(torch.bfloat16), Layout.SAMPLE)
    if arguments.budget_mb:
        chosen[f"ours, {arguments.budget_mb} MB"] = at_budget(decoder, arguments.budget_mb << 20)
    return chosen, decoder.network


def stock(vae: AutoencoderKL) -> Variant:
    return lambda latents: vae.decode(latents.to(vae.dtype)).sample


def ours(decoder: ExactKLDecoder, change: Callable[[Plan, int], Plan]) -> Variant:
    def decode(latents: Tensor) -> Tensor:
        batch, _, height, width = latents.shape
        plan = change(decoder.plan(batch, height, width), footprint(decoder.network, height, width).largest)
        with torch.inference_mode():
            return decoder.run(plan, latents.to(torch.bfloat16), Layout.SAMPLE)

    return decode


def at_budget(decoder: ExactKLDecoder, budget_bytes: int) -> Variant:
    def decode(latents: Tensor) -> Tensor:
        decoder.memory_budget_bytes = budget_bytes
        plan = decoder.plan(latents.shape[0], *latents.shape[2:])
        decoder.memory_budget_bytes = None
        with torch.inference_mode():
            return decoder.run(plan, latents.to(torch.bfloat16), Layout.SAMPLE)

    return decode


def table(
    size: int, chosen: dict[str, Variant], network: Network, rate: float, device: torch.device, repeats: int
) -> None:
    latents = torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(size)).to(device)
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    peaks, quality = {}, {}
    reference: Tensor | None = None
    failed: set[str] = set()
    for repeat in range(repeats + 1):  # the first is warm-up, and where memory and quality are read
        for name, decode in chosen.items():
            slow = name == "diffusers fp32" and device.type == "cpu"  # minutes: no warm-up, and timed once
            if name in failed or (slow and repeat > 1):
                continue
            try:
                if repeat == 0:
                    if not slow:
                        decode(latents)
                    peaks[name], picture = peak_of(decode, latents, device)
                    if name == "diffusers fp32":
                        reference = picture.float().cpu()
                    quality[name] = psnr(picture.float().cpu(), reference)
                    del picture
                else:
                    seconds[name].append(timed(decode, latents, device))
            except torch.OutOfMemoryError:
                failed.add(name)
    compared = seconds.get("diffusers bf16 channels_last") or [math.nan]
    usual, usual_best = statistics.median(compared), min(compared)  # the best is what a busy machine disturbs least
    for name in chosen:
        if not seconds[name]:
            print(f"| {size}² | {name} | out of memory | | | | | | |")
            continue
        median, best = statistics.median(seconds[name]), min(seconds[name])
        share = folded_flops(network, size // 8) / median / rate
        print(
            f"| {size}² | {name} | {1e3 * median:.1f} | {1e3 * best:.1f} | {usual / median:.2f} "
            f"| {usual_best / best:.2f} | {share:.0%} | {peaks[name] / MEGA:.0f} | {quality[name]:.2f} |",
            flush=True,
        )


def timed(decode: Variant, latents: Tensor, device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    decode(latents)
    synchronise(device)
    return time.perf_counter() - start


def peak_of(decode: Variant, latents: Tensor, device: torch.device) -> tuple[int, Tensor]:
    """The most memory above what was held before: the allocator's count on a GPU, resident pages on a CPU."""
    gc.collect()
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        picture = decode(latents)
        synchronise(device)
        return torch.cuda.max_memory_allocated() - before, picture
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    picture = decode(latents)
    return resident("VmHWM") - before, picture


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def psnr(picture: Tensor, reference: Tensor | None) -> float:
    if reference is None:
        return math.nan
    error = (picture - reference).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(4 / error)  # the sample spans [-1, 1]


def folded_flops(network: Network, side: int) -> float:
    """Multiply-adds counted twice: every convolution, the upsamples as four 2x2 phases, and the attention."""
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
    """The best rate of a few large bf16 matrix products, the shapes a convolution becomes among them."""
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
    if device.type == "cuda":
        torch.cuda.synchronize()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
