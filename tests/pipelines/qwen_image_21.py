"""Qwen-Image 2.1: a token for each latent pixel, `[B, h w, C]`, and pictures with an alpha channel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, QwenImage21Pipeline, QwenImage21Transformer2DModel

from tests.pipelines import vaes
from tests.pipelines.sample import Sample, noise, run, seeded

TRANSFORMER: dict[str, Any] = {
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "context_in_dim": 8,
    "axes_dims_rope": (8, 4, 4),
}


class Processor:
    """What the pipeline asks of a processor before it knows that the prompt is already encoded."""

    tokenizer = SimpleNamespace(encode=lambda text: [0])

    def apply_chat_template(self, *messages: Any, **options: Any) -> list[list[int]]:
        return [[0]]


def qwen_image_21() -> Sample:
    transformer = seeded(QwenImage21Transformer2DModel, **TRANSFORMER)
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": vaes.qwen_image_21(), "processor": Processor()}
    pipe = QwenImage21Pipeline(text_encoder=None, transformer=transformer, **parts)
    return run("qwen-image-2.1", pipe, is_packed=True, prompt_embeds=noise(1, 4, 8), height=96, width=64)


SAMPLES = {"qwen-image-2.1": qwen_image_21}
