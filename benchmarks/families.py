"""Compare our video decoders with diffusers' own, for video families at their published sizes with random weights.

`python -m benchmarks.families [--only NAME …] [--save NAME]` decodes a small video once to the float32 sample, each
variant in its own process, and compares time, resident memory and results. "Lowest slabs" means a memory budget of one
byte, so that the decoder uses the lowest possible slabs.

`python -m benchmarks.families --count [--size FRAMES HEIGHT WIDTH] [--budget GB]` counts the peak bytes of live
tensors, beside the output, in a bfloat16 decode to uint8 pixels, by default of 49 frames of 480x832. Ours is counted
with ample memory and, if a budget is given, within it, beside what its plan says. The tensors have no data, so this
takes only seconds, or minutes with a small budget. Plans are those of a GPU, whose bands of rows are larger.

`python -m benchmarks.families --speed` runs all variants in one process, alternating: diffusers and ours in float32,
and in bfloat16 (diffusers with its weights in channels_last_3d, which is its fastest form), and `fastvae` from PyPI for
Wan 2.1 if it is installed. It prints ratios of the fastest runs, how far each is from diffusers' float32 in dB, what
share of the machine's convolution rate ours reaches in bfloat16, and the live bytes at the peak of the bfloat16 runs.
The rate is measured in the same run; the work is that of diffusers' float32 decode without padding frames, which ours
partly avoids. `--latents F h w` changes the size. `--speed --encode` does the same with an encode of the video or image
that these latents belong to.

`--save NAME` also writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.decode import MEGA, RESULTS, device_name, peak_of
from server.engine.coders.build import build_coder
from server.engine.coders.interface import Coded, Decoder
from server.engine.coders.layouts import postprocess
from server.engine.coders.stock import StockDecoder, StockEncoder
from server.engine.kernels import trial
from server.engine.kernels.cpu import CpuKernels
from server.engine.kernels.reference import TAPS
from server.families import Family, family_of_class
from server.model_info import Direction, LatentSpec
from server.values import Layout
from tests.engine.live import LiveBytes

CPU = torch.device("cpu")
STOCK, OURS, SLABS = WAYS = ("diffusers", "ours", "ours, lowest slabs")
HEADER = (
    "| family | frames | size | diffusers s | ours s | ratio | diffusers MB | ours MB | max abs difference "
    "| lowest slabs s | MB | max abs difference |"
)
SPEED_HEADER = (
    "| family | diffusers float32 s | diffusers bf16, times as fast | ours float32 | ours bf16 "
    "| ours bf16 against diffusers bf16 | fastvae bf16 | ours float32 dB | diffusers bf16 dB | ours bf16 dB "
    "| share of the convolution rate | diffusers MB | ours MB | hash |"
)
LARGE_HEADER = "| family | frames | size | diffusers GB | ours GB | budget GB | planned GB | ours within it GB |"
WAN_22: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "is_residual": True,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}


class Case(NamedTuple):
    """A VAE class with its configuration, and the shape of the latents: (C, F, h, w), or (C, h, w) for an image."""

    class_name: str
    config: dict[str, Any]
    latents: tuple[int, ...]


LTX_2 = {"decoder_causal": False, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
CASES = {
    "Wan 2.1": Case("AutoencoderKLWan", {}, (16, 3, 24, 4)),
    "Wan 2.2 5B": Case("AutoencoderKLWan", WAN_22, (48, 3, 12, 4)),
    "Qwen-Image": Case("AutoencoderKLQwenImage", {}, (16, 32, 16)),
    "HunyuanVideo": Case("AutoencoderKLHunyuanVideo", {}, (16, 3, 16, 6)),
    "HunyuanVideo 1.5": Case("AutoencoderKLHunyuanVideo15", {}, (32, 5, 12, 3)),
    "LTX-Video": Case("AutoencoderKLLTXVideo", {}, (128, 13, 5, 2)),
    "LTX-2": Case("AutoencoderKLLTX2Video", LTX_2, (128, 9, 4, 2)),
    "CogVideoX": Case("AutoencoderKLCogVideoX", {}, (16, 5, 8, 6)),
    "Mochi": Case("AutoencoderKLMochi", {}, (12, 5, 8, 6)),
    "EasyAnimate": Case("AutoencoderKLMagvit", {}, (16, 5, 8, 6)),
}
LARGE = (49, 480, 832)  # frames, height, width


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--count", action="store_true", help="count the memory of large videos instead")
    parser.add_argument("--size", nargs=3, type=int, default=LARGE, metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--budget", type=float, default=None, metavar="GB", help="with --count: a memory budget")
    parser.add_argument("--speed", action="store_true", help="compare the speed of all variants in one process instead")
    parser.add_argument("--encode", action="store_true", help="with --speed: encode instead of decode")
    parser.add_argument("--latents", nargs=3, type=int, default=None, metavar=("F", "H", "W"), help="with --speed")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each variant with --speed")
    parser.add_argument("--save", default=None, metavar="NAME", help="write results/NAME.json")
    parser.add_argument("--one", nargs=3, default=None, metavar=("FAMILY", "WAY", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(*arguments.one)
        return
    header, row, line = HEADER, row_of, line_of
    if arguments.count:
        size, budget = tuple(arguments.size), arguments.budget
        header, row, line = LARGE_HEADER, lambda name: large_row_of(name, size, budget), large_line_of
    if arguments.speed:
        direction = Direction.ENCODE if arguments.encode else Direction.DECODE
        wanted = None if arguments.latents is None else tuple(arguments.latents)
        header, row, line = (
            SPEED_HEADER,
            lambda name: speed_row_of(name, direction, wanted, arguments.repeats),
            speed_line_of,
        )
    machine = f"{device_name(CPU)}, {cpu_class()}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    print(f"{machine}\n\n{header}\n{'| --- ' * header.count(' | ')}| --- |", flush=True)
    rows = []
    for name in arguments.only:
        rows.append(row(name))
        print(line(rows[-1]), flush=True)
    if arguments.save:
        saved = {"machine": machine, "date": f"{datetime.now(UTC):%Y-%m-%d}", "rows": rows}
        (RESULTS / f"{arguments.save}.json").write_text(json.dumps(saved, indent=1) + "\n")


def cpu_class() -> str:
    """Return what the CPU multiplies bfloat16 with, unless ONEDNN_MAX_CPU_ISA forbids it."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = "AMX" if "amx_bf16" in flags else "AVX512-BF16" if "avx512_bf16" in flags else "no bfloat16 in hardware"
    return f"limited to {limit}" if limit else found


def speed_row_of(name: str, direction: Direction, size: tuple[int, ...] | None, repeats: int) -> dict[str, Any]:
    """Run all variants of a family in this process, alternating, and return the fastest time of each in seconds.

    size: latent frames, height and width; None for those of the case.
    """
    torch.manual_seed(0)
    vae, family = made(name, direction)
    half = copy.deepcopy(vae).to(torch.bfloat16)
    fastest = copy.deepcopy(half)
    for module in fastest.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    stock: Any = StockEncoder if direction is Direction.ENCODE else StockDecoder
    coders: dict[str, Any] = {
        "diffusers float32": stock(copy.deepcopy(vae), family),
        "diffusers bfloat16": stock(fastest, family),
        "ours float32": coder_of(vae, family, direction, OURS),
    }
    if name == "Wan 2.1" and direction is Direction.DECODE and importlib.util.find_spec("fastvae"):
        coders["fastvae bfloat16"] = FastVAE(half)
    coders["ours bfloat16"] = coder_of(half, family, direction, OURS)  # it takes the weights
    latents = CASES[name].latents
    if size is not None:
        latents = (latents[0], *size[4 - len(latents) :])
    values = input_of(latents, family.describe(vae.config), direction)
    work, rate = flops_of(coders["diffusers float32"], direction, values), convolution_rate()
    outputs: dict[str, Tensor] = {}
    seconds = dict.fromkeys(coders, math.inf)
    for turn in range(repeats):
        for way in coders if turn % 2 == 0 else reversed(coders):
            started = time.perf_counter()
            outputs[way] = run(coders[way], direction, values)
            seconds[way] = min(seconds[way], time.perf_counter() - started)
    reference = outputs["diffusers float32"]
    return {
        "family": name,
        "direction": direction,
        "s": seconds,
        "dB": {way: psnr(output.float(), reference) for way, output in outputs.items()},
        "share": work / seconds["ours bfloat16"] / rate,
        "peak_bytes": {way: live_bytes(coders[way], direction, values) for way in coders if "bfloat16" in way},
        "hash": hashlib.sha256(outputs["ours bfloat16"].float().numpy().tobytes()).hexdigest()[:8],
    }


class FastVAE:
    """The decoder of the package fastvae."""

    def __init__(self, vae: Any) -> None:
        from fastvae import FastVAEDecoder  # type: ignore[import-not-found]  # not a requirement

        self.decoder = FastVAEDecoder.from_vae(copy.deepcopy(vae))

    def decode(self, latents: Tensor, _layout: Layout, *, budget_bytes: int | None = None) -> Coded:
        """Decode as `Decoder.decode` does."""
        sample: Tensor = self.decoder.decode(latents.bfloat16())
        return Coded(sample, torch.isfinite(sample).all())


def flops_of(coder: Any, direction: Direction, values: Tensor) -> int:
    """Return the floating-point operations of one run."""
    with FlopCounterMode(display=False) as counter:
        run(coder, direction, values)
    total: int = counter.get_total_flops()
    return total


def convolution_rate() -> float:
    """Return the bfloat16 operations per second of a convolution over frames of usual size, in its faster form."""
    kernels = CpuKernels(torch.bfloat16)
    window = torch.randn(trial.FRAMES, trial.ROWS, trial.COLUMNS, trial.CHANNELS).bfloat16()  # [n, r, W, C]
    weight = torch.randn(trial.CHANNELS, trial.CHANNELS, TAPS, 3, 3).bfloat16()  # [O, I, 3, 3, 3]
    kernels.in_3d = trial.is_faster_in_3d(kernels, CPU, torch.bfloat16)
    packed, bias = kernels.pack_frames(weight), weight.new_zeros(trial.CHANNELS)  # [O]
    seconds = min(trial.seconds(lambda: kernels.conv_frames(window, packed, bias, 1)) for _ in range(5))
    pixels = (trial.FRAMES - TAPS + 1) * (trial.ROWS - 2) * trial.COLUMNS
    return 2 * weight.numel() * pixels / seconds


def live_bytes(coder: Any, direction: Direction, values: Tensor) -> int:
    """Return the peak bytes of live tensors in a run, beside its output."""
    with LiveBytes() as live:
        output = run(coder, direction, values)
    return live.most - output.nbytes


def input_of(latents: tuple[int, ...], spec: LatentSpec, direction: Direction) -> Tensor:
    """Return latents of a shape (C, (F,) h, w), or pixels in [-1, 1] of the size that they decode to."""
    if direction is Direction.DECODE:
        return torch.randn(1, *latents)  # [1, C, (F,) h, w]
    frames = ((latents[1] - 1) * spec.temporal_compression_ratio + 1,) if len(latents) == 4 else ()
    size = [spec.vae_scale_factor * side for side in latents[-2:]]
    return torch.rand(1, spec.image_channels, *frames, *size) * 2 - 1  # [1, C, (F,) H, W]


def run(coder: Any, direction: Direction, values: Tensor) -> Tensor:
    """Decode to the sample or encode to the posterior's parameters, with more memory than any run needs."""
    if direction is Direction.ENCODE:
        parameters: Tensor = coder.encode(values, budget_bytes=1 << 60).tensor
        return parameters
    sample: Tensor = coder.decode(values, Layout.SAMPLE, budget_bytes=1 << 60).tensor
    return sample


def psnr(sample: Tensor, reference: Tensor) -> float:
    """Return how close values are to others, in dB below a square of 2: the range of a sample in [-1, 1]."""
    return float(10 * torch.log10(4 / (sample - reference).square().mean().clamp_min(1e-30)))


def speed_line_of(row: dict[str, Any]) -> str:
    """Return a row of speeds as a line of the table."""
    seconds, close = row["s"], row["dB"]
    single, best = seconds["diffusers float32"], seconds["diffusers bfloat16"]
    ours, ours_half = seconds["ours float32"], seconds["ours bfloat16"]
    ratios = single / best, single / ours, single / ours_half, best / ours_half
    cells = [row["family"], f"{single:.1f}", *(f"{ratio:.2f}" for ratio in ratios)]
    cells.append(f"{single / seconds['fastvae bfloat16']:.2f}" if "fastvae bfloat16" in seconds else "")
    cells += [f"{close[way]:.1f}" for way in ("ours float32", "diffusers bfloat16", "ours bfloat16")]
    peaks = row["peak_bytes"]
    cells += [f"{row['share']:.0%}", *(f"{peaks[way] / MEGA:.0f}" for way in ("diffusers bfloat16", "ours bfloat16"))]
    cells.append(row["hash"])
    return f"| {' | '.join(cells)} |"


def row_of(name: str) -> dict[str, Any]:
    """Run each variant of a family in its own process, and compare the samples with diffusers'."""
    row: dict[str, Any] = {"family": name}
    with tempfile.TemporaryDirectory() as folder:
        reference: Tensor | None = None
        for way in WAYS:
            path = Path(folder) / "sample.pt"
            command = [sys.executable, "-m", "benchmarks.families", "--one", name, way, str(path)]
            environment = {"GOMP_SPINCOUNT": "8000"} | os.environ  # as in the server's workers
            row[way] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
            sample = torch.load(path)
            reference = sample if reference is None else reference
            row[way]["max_abs_difference"] = float((sample - reference).abs().max())
            row |= {"frames": sample.shape[2] if sample.ndim == 5 else 1, "size": list(sample.shape[-2:])}
    return row


def line_of(row: dict[str, Any]) -> str:
    """Return a row as a line of the table."""
    theirs, ours = row[STOCK], row[OURS]
    height, width = row["size"]
    cells = [row["family"], row["frames"], f"{height}x{width}", f"{theirs['s']:.1f}", f"{ours['s']:.1f}"]
    cells += [f"{ours['s'] / theirs['s']:.2f}", f"{theirs['peak_bytes'] / MEGA:.0f}"]
    for way in (OURS, SLABS):
        if way == SLABS:
            cells.append(f"{row[way]['s']:.1f}" if way in row else "")
        cells += (
            [f"{row[way]['peak_bytes'] / MEGA:.0f}", f"{row[way]['max_abs_difference']:.1e}"]
            if way in row
            else ["", ""]
        )
    return f"| {' | '.join(map(str, cells))} |"


def large_row_of(name: str, size: tuple[int, int, int], budget_gb: float | None) -> dict[str, Any]:
    """Count the memory of a large decode: diffusers', ours with ample memory and, if there is a budget, within it."""
    row: dict[str, Any] = {"family": name, "size": size, "budget_gb": budget_gb}
    row[STOCK], row[OURS] = counted(name, size, None), counted(name, size, 1 << 60)
    if budget_gb is not None:
        row["within"] = counted(name, size, int(budget_gb * 1e9))
    return row


def large_line_of(row: dict[str, Any]) -> str:
    """Return a row of counted memory as a line of the table."""
    frames, height, width = row["size"]
    cells = [row["family"], frames, f"{height}x{width}", f"{row[STOCK]['bytes'] / 1e9:.1f}"]
    cells.append(f"{row[OURS]['bytes'] / 1e9:.1f}")
    if "within" in row:
        within = row["within"]
        cells += [row["budget_gb"], f"{within['planned_bytes'] / 1e9:.1f}", f"{within['bytes'] / 1e9:.1f}"]
    else:
        cells += ["", "", ""]
    return f"| {' | '.join(map(str, cells))} |"


def run_one(name: str, way: str, path: str) -> None:
    """Run one variant in this process, save its sample to `path`, and print its time and memory as JSON."""
    torch.manual_seed(0)
    decoder = decoder_of(*made(name), way)
    latents = torch.randn(1, *CASES[name].latents)  # [1, C, (F,) h, w]
    started = time.perf_counter()

    def decode(z: Tensor) -> Tensor:
        return decoder.decode(z, Layout.SAMPLE, budget_bytes=budget_of(way)).tensor

    peak_bytes, sample = peak_of(decode, latents, CPU)
    seconds = time.perf_counter() - started
    torch.save(sample.contiguous(), path)
    print(json.dumps({"s": seconds, "peak_bytes": peak_bytes}))


def counted(name: str, size: tuple[int, int, int], budget: int | None) -> dict[str, int]:
    """Return the peak bytes of live tensors in a large decode, beside the output, and what our plan says.

    size: frames, height and width. budget: our memory budget in bytes; None for diffusers' own decode.
    """
    frames, height, width = size
    with torch.device("meta"), torch.inference_mode():
        vae, family = made(name)
        vae = vae.to(torch.bfloat16)
        spec = family.describe(vae.config)
        ratio, times = spec.vae_scale_factor, spec.temporal_compression_ratio
        latent_frames = ((frames - 1) // times + 1,) if len(CASES[name].latents) == 4 else ()
        shape = 1, spec.channels, *latent_frames, height // ratio, width // ratio
        latents = torch.empty(shape, dtype=torch.bfloat16)  # [1, C, (F,) h, w]
        if budget is None:
            with LiveBytes() as live:
                pixels = postprocess(family.decode(vae, latents), Layout.PIXELS)  # [F, H, W, C]
            return {"bytes": live.most - pixels.nbytes}
        decoder: Any = decoder_of(vae, family, OURS)
        plan = decoder.plan(latent_frames[0] if latent_frames else 1, *shape[-2:], budget)
        with LiveBytes() as live:
            pixels = decoder.decode(latents, Layout.PIXELS, budget_bytes=budget).tensor  # [F, H, W, C]
    return {"bytes": live.most - pixels.nbytes, "planned_bytes": plan.peak_bytes}


def made(name: str, direction: Direction = Direction.DECODE) -> tuple[Any, Family]:
    """Return the VAE of a case, with random weights and without its other direction, and its family."""
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    class_name, config, _ = CASES[name]
    family = family_of_class(class_name)
    assert family is not None
    vae = getattr(diffusers, class_name)(**config).eval()
    if class_name == "AutoencoderKLHunyuanVideo":  # temporal tiles would give another result
        vae.use_framewise_decoding = vae.use_framewise_encoding = False
    if direction is Direction.DECODE:
        vae.encoder = torch.nn.Identity()
    else:
        vae.decoder = torch.nn.Identity()
    return vae, family


def decoder_of(vae: Any, family: Family, way: str) -> Decoder:
    """Return the decoder of a variant. Ours may take the weights of the VAE."""
    decoder: Decoder = coder_of(vae, family, Direction.DECODE, way)
    return decoder


def coder_of(vae: Any, family: Family, direction: Direction, way: str) -> Any:
    """Return the coder of a variant in one direction. Ours may take the weights of the VAE."""
    if way == STOCK:
        return StockDecoder(vae, family) if direction is Direction.DECODE else StockEncoder(vae, family)
    return build_coder(vae, family, direction, "auto", "none")[0]


def budget_of(way: str) -> int:
    """Return the memory budget of a variant in bytes: 1 for the lowest slabs, else more than any decode needs."""
    return 1 if way == SLABS else 1 << 60


if __name__ == "__main__":
    main()
