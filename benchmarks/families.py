"""Video families: the streaming decoder beside diffusers' plain decode, at published sizes with random weights.

`python -m benchmarks.families [--only NAME …] [--save NAME]`. Every way of decoding has a process of its own: one run
for the memory, another for the time, in float32, to the sample. Clips are small, and tall rather than wide, for slabs
are rows. "Lowest slabs" is a memory budget of one byte.
`--save NAME` also writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

from benchmarks.decode import MEGA, RESULTS, device_name, peak_of, timed
from server.engine.decoders.stock import StockDecoder
from server.engine.decoders.streaming import StreamingDecoder
from server.families import family_of_class
from server.types import Layout

CPU = torch.device("cpu")
STOCK, OURS, SLABS = WAYS = ("diffusers", "ours", "ours, lowest slabs")
HEADER = (
    "| family | frames | size | diffusers s | ours s | ratio | diffusers MB | ours MB | max abs difference "
    "| lowest slabs s | MB | max abs difference |"
)
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
    class_name: str
    config: dict[str, Any]
    latents: tuple[int, ...]
    """(C, F, h, w), or (C, h, w) of a picture."""


LTX_2 = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
CASES = {
    "Wan 2.1": Case("AutoencoderKLWan", {}, (16, 5, 24, 8)),
    "Wan 2.2 5B": Case("AutoencoderKLWan", WAN_22, (48, 5, 12, 4)),
    "Qwen-Image": Case("AutoencoderKLQwenImage", {}, (16, 32, 32)),
    "HunyuanVideo 1.5": Case("AutoencoderKLHunyuanVideo15", {}, (32, 5, 12, 4)),
    "LTX-Video": Case("AutoencoderKLLTXVideo", {}, (128, 13, 6, 3)),
    "LTX-2": Case("AutoencoderKLLTX2Video", LTX_2, (128, 13, 4, 2)),
    "CogVideoX": Case("AutoencoderKLCogVideoX", {}, (16, 5, 12, 8)),
    "Mochi": Case("AutoencoderKLMochi", {}, (12, 5, 12, 8)),
    "EasyAnimate": Case("AutoencoderKLMagvit", {}, (16, 5, 12, 8)),
}
IN_SLABS = set(CASES) - {"LTX-2", "CogVideoX", "Mochi", "EasyAnimate"}  # LTX-2 could be, of more rows than these


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--save", default=None, metavar="NAME", help="write results/NAME.json")
    parser.add_argument("--one", nargs=3, default=None, metavar=("FAMILY", "WAY", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(*arguments.one)
        return
    machine = f"{device_name(CPU)}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    print(f"{machine}\n\n{HEADER}\n{'| --- ' * HEADER.count(' | ')}| --- |")
    rows = [row_of(name) for name in arguments.only]
    if arguments.save:
        saved = {"machine": machine, "date": f"{datetime.now(UTC):%Y-%m-%d}", "rows": rows}
        (RESULTS / f"{arguments.save}.json").write_text(json.dumps(saved, indent=1) + "\n")


def row_of(name: str) -> dict[str, Any]:
    """Every way of decoding in turn, against diffusers' sample."""
    row: dict[str, Any] = {"family": name}
    with tempfile.TemporaryDirectory() as folder:
        reference: Tensor | None = None
        for way in WAYS if name in IN_SLABS else WAYS[:2]:
            path = Path(folder) / "sample.pt"
            command = [sys.executable, "-m", "benchmarks.families", "--one", name, way, str(path)]
            environment = {"GOMP_SPINCOUNT": "8000"} | os.environ  # as the server's worker runs
            row[way] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
            sample = torch.load(path)
            reference = sample if reference is None else reference
            row[way]["max_abs_difference"] = float((sample - reference).abs().max())
            row |= {"frames": sample.shape[2] if sample.ndim == 5 else 1, "size": list(sample.shape[-2:])}
    print(line_of(row), flush=True)
    return row


def line_of(row: dict[str, Any]) -> str:
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


def run_one(name: str, way: str, path: str) -> None:
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    class_name, config, shape = CASES[name]
    family = family_of_class(class_name)
    assert family is not None
    torch.manual_seed(0)
    vae = getattr(diffusers, class_name)(**config).eval()
    vae.encoder = torch.nn.Identity()
    latents = torch.randn(1, *shape)  # [1, C, (F,) h, w]
    ours = StreamingDecoder(vae, family, memory_budget_bytes=1 if way == SLABS else None)
    decoder = StockDecoder(vae, family) if way == STOCK else ours
    peak_bytes, sample = peak_of(lambda z: decoder.decode(z, Layout.SAMPLE), latents, CPU)
    torch.save(sample.contiguous(), path)
    seconds = timed(lambda z: decoder.decode(z, Layout.SAMPLE), latents, CPU)
    print(json.dumps({"s": seconds, "peak_bytes": peak_bytes}))


if __name__ == "__main__":
    main()
