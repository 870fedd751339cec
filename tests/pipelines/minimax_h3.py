"""MiniMax-H3: the decoding block of its modular pipeline."""

from __future__ import annotations

from diffusers.modular_pipelines.minimax_h3.decoders import MiniMaxH3VideoDecodeStep

from tests.pipelines import vaes
from tests.pipelines.sample import Sample, noise, run_block


def minimax_h3(name: str, frames: int, rows: int, columns: int) -> Sample:
    latents = noise(1, 8, frames, rows, columns)
    return run_block(name, MiniMaxH3VideoDecodeStep(), latents, vae=vaes.minimax_h3())


SAMPLES = {
    "minimax-h3": lambda: minimax_h3("minimax-h3", 12, 4, 6),
    "minimax-h3-tiles": lambda: minimax_h3("minimax-h3-tiles", 7, 20, 3),  # 320 rows, more than one tile
}
