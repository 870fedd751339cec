"""How a sample is made: a real diffusers pipeline of small seeded components, run to latents and then to pixels.

Knows no pipeline; the files beside it do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.modular_pipelines import SequentialPipelineBlocks


@dataclass(frozen=True)
class Sample:
    """One pipeline's run: what a user would send to the server, and what the pipeline makes of it locally."""

    name: str
    vae: Any
    """The pipeline's own VAE module, float32 and in eval mode."""
    latents: torch.Tensor
    """What the pipeline returned for `output_type="latent"`, nothing undone."""
    pixels: torch.Tensor
    """[B, C, H, W] for pictures, [B, F, C, H, W] for clips, in [0, 1], float32, as the pipeline postprocessed them."""
    height: int
    width: int
    num_frames: int
    is_packed: bool
    """Whether the latents are a sequence of tokens."""
    are_scaled: bool
    """Whether the VAE's statistics are still to be undone before decoding."""
    are_floored: bool = False
    """Whether the pipeline cut the pixels off to whole steps of 1/255."""


@contextmanager
def quiet() -> Iterator[None]:
    """diffusers deprecates parts of its own pipelines, and its schedulers meet a newer numpy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "In CPU autocast")
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        yield


def seeded(make: Callable[..., Any], **config: Any) -> Any:
    """A module with seeded weights; the norms' too, which start at 1 and 0, where a lost affine would not show."""
    torch.manual_seed(0)
    with quiet():
        module = make(**config).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith(("pad_token", "table")):  # diffusers leaves some of these uninitialised
                parameter.normal_(std=0.1)
    return module


def noise(*shape: int) -> torch.Tensor:
    """Seeded noise, as prompt embeddings or latents."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def ones(*shape: int) -> torch.Tensor:
    """The attention mask of a prompt without padding."""
    return torch.ones(shape, dtype=torch.long)


def run(
    name: str, pipe: Any, *, is_packed: bool = False, are_scaled: bool = True, are_floored: bool = False, **inputs: Any
) -> Sample:
    """Run the pipeline once to latents and once to pixels, from the same seed."""
    latents, pixels = (_call(pipe, output_type, inputs) for output_type in ("latent", "pt"))
    is_clip = pixels.ndim == 5
    return Sample(
        name=name,
        vae=pipe.vae,
        latents=latents,
        pixels=pixels,
        height=pixels.shape[-2],
        width=pixels.shape[-1],
        num_frames=pixels.shape[1] if is_clip else 1,
        is_packed=is_packed,
        are_scaled=are_scaled,
        are_floored=are_floored,
    )


def run_block(
    name: str,
    blocks: Any,
    latents: torch.Tensor,
    *,
    is_packed: bool = False,
    are_scaled: bool = True,
    config: dict[str, Any] | None = None,
    **given: Any,
) -> Sample:
    """Run the decoding block of a modular pipeline on latents, or several blocks, the last of which gives the pixels.

    config: of the whole pipeline. given: the component that decodes, by name, and further inputs.
    """
    (part,) = given.keys() & {"vae", "diffusion_decoder"}
    vae = given.pop(part)
    several = blocks if isinstance(blocks, list) else [blocks]
    with quiet():
        chain = SequentialPipelineBlocks.from_blocks_dict({str(number): each for number, each in enumerate(several)})
        pipe = chain.init_pipeline()
        pipe.update_components(**{part: vae})
        pipe.register_to_config(**config or {})
        (output,) = (each.name for each in several[-1].intermediate_outputs)
        held = {} if "latent_chunks" in given else {"latents": latents}
        made = pipe(**held, output_type="pt", **given, output=output)
    pixels = made[0] if isinstance(made, list) else made
    pixels = pixels[None] if output == "videos" and pixels.ndim == 4 else pixels  # one clip has no batch axis
    is_clip = pixels.ndim == 5
    return Sample(
        name=name,
        vae=vae,
        latents=latents,
        pixels=pixels.float(),
        height=pixels.shape[-2],
        width=pixels.shape[-1],
        num_frames=pixels.shape[1] if is_clip else 1,
        is_packed=is_packed,
        are_scaled=are_scaled,
    )


def _call(pipe: Any, output_type: str, inputs: dict[str, Any]) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    with quiet():
        made = pipe(**{"num_inference_steps": 2} | inputs, generator=generator, output_type=output_type)
    first: torch.Tensor = made[0]
    return first
