"""Compare the exact decoder of HunyuanVideo with diffusers' own, with its default temporal tiles and without tiles.

`python -m benchmarks.video [--device cpu] [--frames 17] [--size 256] [--repeats 1]`. The VAE has its published size,
and random weights with a fixed seed. The float32 decode without tiles is the reference of quality. diffusers' default
decode differs from it because it blends its tiles.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor

from benchmarks.decode import MEGA, Variant, device_name, matrix_rate, peak_of, psnr, timed
from server.engine.coders.video.causal_decoder import ExactCausalDecoder
from server.values import Layout


def full_size_vae() -> AutoencoderKLHunyuanVideo:
    """Return a VAE of the published size with random weights, without its encoder."""
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo()
    for module in vae.decoder.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    vae.encoder = torch.nn.Identity()
    return vae.eval()


def stock(vae: AutoencoderKLHunyuanVideo, is_tiled: bool) -> Variant:
    """Return diffusers' own decode, with or without temporal tiles."""

    def decode(latents: Tensor) -> Tensor:
        vae.use_framewise_decoding = is_tiled
        sample: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return sample

    return decode


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=1, help="0: use the time of the run that measures the memory")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.backends.cudnn.allow_tf32 = False
    device, side = torch.device(arguments.device), arguments.size // 8
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, (arguments.frames - 1) // 4 + 1, side, side, generator=generator).to(device)

    vae = full_size_vae().to(device)
    half = copy.deepcopy(vae).to(torch.bfloat16)
    decoder = ExactCausalDecoder(copy.deepcopy(half))
    variants: dict[str, Variant] = {
        "diffusers fp32, untiled": stock(vae, False),
        "diffusers fp32 (its default)": stock(vae, True),
        "diffusers bf16 (its default)": stock(half, True),
        "ours, bf16": lambda z: decoder.decode(z, Layout.SAMPLE).tensor,
    }
    print(f"{device_name(device)}, torch {torch.__version__}, {matrix_rate(device) / 1e12:.2f} TFLOP/s bf16")
    print(f"{arguments.frames} frames of {arguments.size}x{arguments.size}\n")
    print("| decode | s (median) | times as fast as diffusers' default | peak activations MB | PSNR dB |")
    print("| --- | --- | --- | --- | --- |")
    reference: Tensor | None = None
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    peaks, quality = {}, {}
    for name, decode in variants.items():
        started = time.perf_counter()
        peaks[name], video = peak_of(decode, latents, device)
        if not arguments.repeats:
            seconds[name].append(time.perf_counter() - started)
        reference = video.float().cpu() if reference is None else reference
        quality[name] = psnr(video.float().cpu(), reference)
        del video
    for _ in range(arguments.repeats):
        for name, decode in variants.items():
            seconds[name].append(timed(decode, latents, device))
    usual = statistics.median(seconds["diffusers fp32 (its default)"])
    for name in variants:
        median = statistics.median(seconds[name])
        print(f"| {name} | {median:.2f} | {usual / median:.2f} | {peaks[name] / MEGA:.0f} | {quality[name]:.1f} |")


if __name__ == "__main__":
    main()
