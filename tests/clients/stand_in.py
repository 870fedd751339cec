"""A stand-in for the few functions of ComfyUI that the nodes use: a progress bar, a cancel button and folders."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file


class Cancelled(BaseException):
    """ComfyUI's exception for the cancel button."""


class ComfyUI:
    """bars, previews: what the progress bars showed. on_look: called whenever a node looks at the cancel button."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bars: list[list[float]] = []
        self.previews: list[Image.Image] = []
        self.on_look: Callable[[], None] = lambda: None

    @property
    def settings_file(self) -> Path:
        return self.folder / "user" / "remote_vae.json"

    @property
    def kept(self) -> list[Path]:
        """The files with latents of decodes that failed."""
        return sorted((self.folder / "output").rglob("*.latent"))

    def modules(self) -> dict[str, ModuleType]:
        comfy = self

        class ProgressBar:
            def __init__(self, total: float) -> None:
                self.shown: list[float] = []
                comfy.bars.append(self.shown)

            def update_absolute(self, value: float, total: float, preview: Any = None) -> None:
                self.shown.append(value / total)
                if preview is not None:
                    comfy.previews.append(preview[1])

        def get_save_image_path(prefix: str, folder: str) -> tuple[str, str, int, str, str]:
            place = Path(folder) / prefix
            place.parent.mkdir(parents=True, exist_ok=True)
            return str(place.parent), place.name, 1 + len(comfy.kept), "", prefix

        def save_torch_file(content: dict[str, torch.Tensor], path: str) -> None:
            save_file(content, path)

        class VideoFromFile:
            def __init__(self, file: Any) -> None:
                self.file = file

        found = {name: ModuleType(name) for name in ("comfy", "comfy.utils", "comfy.model_management")}
        found |= {name: ModuleType(name) for name in ("comfy.patcher_extension", "folder_paths")}
        found |= {name: ModuleType(name) for name in ("comfy_api", "comfy_api.latest")}
        found["comfy_api.latest"].__dict__["InputImpl"] = SimpleNamespace(VideoFromFile=VideoFromFile)
        found["comfy.utils"].__dict__.update(ProgressBar=ProgressBar, save_torch_file=save_torch_file)
        looks = {"throw_exception_if_processing_interrupted": lambda: comfy.on_look()}
        found["comfy.model_management"].__dict__.update(looks)
        found["comfy.patcher_extension"].__dict__["WrappersMP"] = SimpleNamespace(OUTER_SAMPLE="outer_sample")
        for name in ("utils", "model_management", "patcher_extension"):
            setattr(found["comfy"], name, found[f"comfy.{name}"])
        found["folder_paths"].__dict__.update(
            get_user_directory=lambda: str(comfy.folder / "user"),
            get_output_directory=lambda: str(comfy.folder / "output"),
            get_save_image_path=get_save_image_path,
        )
        return found


def load(comfy: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import the package of the nodes as ComfyUI does, with the stand-in in place of ComfyUI; it is undone after a test."""
    for name, module in comfy.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in [name for name in sys.modules if name.startswith("clients.comfyui")]:
        monkeypatch.delitem(sys.modules, name)
    package = importlib.import_module("clients.comfyui")
    for part in ("remote", "found", "latents", "vae", "preview", "nodes", "host"):
        monkeypatch.setitem(sys.modules, f"clients.comfyui.{part}", sys.modules[f"clients.comfyui.{part}"])
    monkeypatch.setitem(sys.modules, "clients.comfyui", package)
    return package
