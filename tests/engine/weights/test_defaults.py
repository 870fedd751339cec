"""What is read from the source of the VAE classes is what the imported classes say."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines import ltx2

from server.engine.coders.video import tiny_layers
from server.engine.weights import defaults
from server.engine.weights.agreement import vae_class
from server.engine.weights.defaults import is_vae_class, whole_config
from server.engine.weights.which_config import COMPANIONS


def is_imported_vae(found: Any) -> bool:
    is_module = isinstance(found, type) and issubclass(found, torch.nn.Module)
    return is_module and hasattr(found, "decode") and hasattr(found, "from_pretrained")


CLASSES = sorted({name for name in dir(diffusers) if is_imported_vae(getattr(diffusers, name))})


def test_the_tiny_classes_are_those_of_their_file() -> None:
    assert set(defaults.TINY_CLASSES) == tiny_layers.TINY_CLASSES.keys()


@pytest.mark.parametrize("name", [*CLASSES, *defaults.TINY_CLASSES])
def test_the_defaults_are_those_of_the_class(name: str) -> None:
    parameters = inspect.signature(vae_class(name).__init__).parameters.values()
    expected = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
    assert is_vae_class(name)
    assert whole_config(name, {}) == expected
    assert whole_config(name, {"latent_channels": 99}) == expected | {"latent_channels": 99}


def test_the_defaults_of_companions_are_those_of_the_class() -> None:
    for name in COMPANIONS:
        parameters = inspect.signature(getattr(ltx2, name).__init__).parameters.values()
        expected = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
        assert whole_config(name, {}) == expected


def test_other_classes_are_no_vaes() -> None:
    others = {name for name in dir(diffusers) if name[0].isupper()} - set(CLASSES)
    assert len(others) > 100
    assert [
        name for name in (*others, "Encoder", "DiagonalGaussianDistribution", "ModelMixin") if is_vae_class(name)
    ] == []
