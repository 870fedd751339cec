"""Complete a config.json by the defaults of its diffusers class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch

from ..coders.video.tiny_layers import TINY_CLASSES


def vae_class(class_name: str) -> Any:
    """Return the class of this name: one of diffusers', or of the tiny video VAEs, which diffusers does not have.

    The result is None, or something else than a class, if there is none.
    """
    return TINY_CLASSES.get(class_name) or getattr(diffusers, class_name, None)


def is_vae_class(class_name: str) -> bool:
    """Return whether the installed diffusers has a VAE class of this name. Older versions lack the newer VAEs."""
    found = vae_class(class_name)
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        # diffusers has stand-ins for classes whose packages are missing. Reading their attributes raises.
        return False
    return hasattr(found, "decode") and hasattr(found, "from_pretrained")


def whole_config(class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config completed by the defaults of the diffusers class, as `from_config` does."""
    return with_defaults(vae_class(class_name), config)


def with_defaults(made: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config completed by the defaults of the class `made`."""
    parameters = inspect.signature(made.__init__).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
    return defaults | dict(config)
