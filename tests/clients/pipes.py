"""The pipelines of tests/pipelines before they run, so that they can run with another VAE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from server.config import Settings, load_settings
from tests.conftest import write_models_yaml
from tests.pipelines import FILES
from tests.pipelines.sample import quiet, run_block
from tests.test_families import FAMILY

WHOLE = {name: file for file in FILES if hasattr(file, "run") for name in file.SAMPLES}
BLOCKS = {name: file for file in FILES if hasattr(file, "run_block") for name in file.SAMPLES}


@dataclass(frozen=True)
class Whole:
    """A pipeline and the inputs of its call."""

    pipe: Any
    inputs: dict[str, Any]

    @property
    def vae(self) -> Any:
        return self.pipe.vae


@dataclass(frozen=True)
class Block:
    """The last blocks of a modular pipeline; `run(vae)` gives their pixels in [0, 1]."""

    part: str
    vae: Any
    run: Callable[[Any], torch.Tensor]


class Captured(Exception):
    """Ends the making of a sample once its pipeline is made."""


def captured(file: Any, function: str, name: str) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of the call of `run` or of `run_block` by which a sample is made; None if another function makes it."""
    with patch.object(file, function, side_effect=Captured) as call:
        try:
            file.SAMPLES[name]()
        except Captured:
            return call.call_args.args, call.call_args.kwargs
    return None


@cache
def whole(name: str) -> Whole | None:
    """The sample's pipeline; None for a sample of blocks."""
    found = captured(WHOLE[name], "run", name)
    if found is None:
        return None
    (_, pipe), inputs = found
    pipe.set_progress_bar_config(disable=True)
    return Whole(
        pipe, {key: value for key, value in inputs.items() if key not in ("is_packed", "are_scaled", "are_floored")}
    )


@cache
def block(name: str) -> Block | None:
    """The sample's blocks; None for a sample of a whole pipeline."""
    found = captured(BLOCKS[name], "run_block", name)
    if found is None:
        return None
    positional, given = found
    (part,) = given.keys() & {"vae", "diffusion_decoder"}

    def run(vae: Any) -> torch.Tensor:
        again = {key: value.manual_seed(0) if key == "generator" else value for key, value in given.items()}
        return run_block(*positional, **again | {part: vae}).pixels

    return Block(part, given[part], run)


def with_vaes(folder: Path, vaes: dict[str, Any]) -> Settings:
    """The settings of a server with these VAEs."""
    models: dict[str, Any] = {}
    for name, vae in vaes.items():
        vae.save_pretrained(folder / name)
        models[name] = {"repo": str(folder / name), "dtype": "float32", "family": FAMILY.get(name)}
    return load_settings(config=write_models_yaml(folder / "models.yaml", models, next(iter(models))))


def levels(made: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """All pixels of images, of lists of images, or of arrays in [0, 1], as levels from 0 to 255."""
    if isinstance(made, list):
        return np.concatenate([levels(each) for each in made])
    pixels = np.asarray(made)
    return (pixels if pixels.dtype == np.uint8 else np.round(255 * pixels)).astype(np.int64).ravel()


def run(pipe: Any, **inputs: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The levels of what a pipeline makes with `output_type="pil"`, always from the same seed."""
    generator = torch.Generator().manual_seed(0)
    with quiet():
        return levels(pipe(**{"num_inference_steps": 2} | inputs, generator=generator, output_type="pil")[0])


def assert_same(found: Any, expected: Any) -> None:
    """At most one level of 255 apart, of pixels that are not all alike."""
    assert found.shape == expected.shape
    assert expected.std() > 5
    assert np.abs(found - expected).max() <= 1
