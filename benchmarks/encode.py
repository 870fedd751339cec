"""Compare the exact encoder with diffusers' own in time, memory and error, alternating in one process.

    python -m benchmarks.encode --sizes 512 1024 --repeats 5

The VAE has the size of those of SD1, SDXL, SD3 and Flux, and random weights with a fixed seed. Errors are differences
of the posterior's parameters from those of diffusers in float32. The peak of the PSNR is the range of the parameters.

`--save NAME` also writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from benchmarks.decode import BF16, FP32, LONG_S, MEGA, RESULTS, Variant, device_name, full_size_vae, peak_of, timed
from server.engine.coders.image.encoder import ExactKLEncoder
from server.engine.coders.image.plan import RECOMPUTED_BAND_BYTES
from server.engine.kernels.cpu import preferred_cpu_dtype

HEADER = "| size | encode | s | s (best) | ratio | against fp32 | peak activations MB | largest error | PSNR dB |"


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", default=None, metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    torch.backends.cudnn.allow_tf32 = False  # the float32 encode is the reference
    device = torch.device(arguments.device)

    machine = f"{device_name(device)}, torch {torch.__version__}"
    print(f"{machine}\n\n{HEADER}")
    print("| --- " * HEADER.count(" | ") + "| --- |")
    chosen = variants(device)
    rows = [row for size in arguments.sizes for row in table(size, chosen, device, arguments.repeats)]
    if arguments.save:
        saved = {"machine": machine, "date": f"{datetime.now(UTC):%Y-%m-%d}", "rows": rows}
        (RESULTS / f"{arguments.save}.json").write_text(json.dumps(saved, indent=1) + "\n")


def variants(device: torch.device) -> dict[str, Variant]:
    """Return the variants by name. `ours` computes in the dtype that the server chooses for this device."""
    vae = full_size_vae(without="decoder").to(device)
    auto = preferred_cpu_dtype() if device.type == "cpu" else torch.bfloat16
    nhwc = copy.deepcopy(vae).to(torch.bfloat16, memory_format=torch.channels_last)
    single, ours = ExactKLEncoder(copy.deepcopy(vae)), ExactKLEncoder(copy.deepcopy(vae).to(auto))
    return {
        FP32: stock(vae),
        BF16: stock(nhwc),
        "ours, fp32": single.encode,
        "ours, recomputing": recomputing(ours),
        "ours": ours.encode,
    }


def stock(vae: AutoencoderKL) -> Variant:
    """Return diffusers' own encode."""
    return lambda pixels: vae.encode(pixels.to(vae.dtype)).latent_dist.parameters


def recomputing(encoder: ExactKLEncoder) -> Variant:
    """Return the exact encode with the plan that needs least memory, which recomputes activations."""

    def encode(pixels: Tensor) -> Tensor:
        plan = encoder.plan(pixels.shape[0], *pixels.shape[2:])
        with torch.inference_mode():
            small = replace(plan, recomputes=True, band_bytes=RECOMPUTED_BAND_BYTES)
            return encoder.run(small, pixels.to(encoder.network.dtype))[0]

    return encode


def table(size: int, chosen: dict[str, Variant], device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Measure the variants at one size, and print and return a row for each."""
    generator = torch.Generator().manual_seed(size)
    pixels = (2 * torch.rand(1, 3, size, size, generator=generator) - 1).to(device)  # [1, 3, H, W]
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    peaks, results = {}, {}
    for name, encode in chosen.items():  # measure memory and error, and the time if the encode is long
        started = time.perf_counter()
        peaks[name], parameters = peak_of(encode, pixels, device)
        if (elapsed := time.perf_counter() - started) > LONG_S:
            seconds[name].append(elapsed)
        results[name] = parameters.float().cpu()  # [1, 2 C, h, w]
    for _ in range(repeats):
        for name, encode in chosen.items():
            if not seconds[name] or seconds[name][0] <= LONG_S:
                seconds[name].append(timed(encode, pixels, device))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = []
    for name in chosen:
        error, psnr_db = closeness(results[name], results[FP32])
        row = {
            "size": size, "encode": name, "s": medians[name], "best_s": min(seconds[name]),
            "ratio": medians[BF16] / medians[name], "against_fp32": medians[FP32] / medians[name],
            "peak_bytes": peaks[name], "largest_error": error, "psnr_db": psnr_db,
        }  # fmt: skip
        rows.append(row)
        quality = "" if psnr_db is None else f"{psnr_db:.2f}"
        print(
            f"| {size}² | {name} | {row['s']:.4g} | {row['best_s']:.4g} | {row['ratio']:.2f} "
            f"| {row['against_fp32']:.1f} | {peaks[name] / MEGA:.0f} | {error:.1e} | {quality} |",
            flush=True,
        )
    return rows


def closeness(parameters: Tensor, reference: Tensor) -> tuple[float, float | None]:  # [1, 2 C, h, w] twice
    """Return the largest error, and the PSNR in dB, which is None for the reference itself."""
    error = (parameters - reference).abs()  # [1, 2 C, h, w]
    if not error.any():
        return 0.0, None
    peak = reference.max() - reference.min()
    return error.max().item(), (10 * torch.log10(peak**2 / error.square().mean())).item()


if __name__ == "__main__":
    main()
