"""What these nodes use of ComfyUI: its progress bar, its cancel button, its folders and its latent files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch

STEPS = 1000
"""How many steps the progress bar of a request has."""


def check_cancelled(_share: float = 0) -> None:
    """Raise ComfyUI's exception if the user cancelled."""
    comfy.model_management.throw_exception_if_processing_interrupted()


class Bar:
    """The progress bar of the running node, which also notices the cancel button."""

    def __init__(self) -> None:
        """Show an empty bar."""
        self._bar = comfy.utils.ProgressBar(STEPS)
        self._shown = 0

    def show(self, share: float) -> None:
        """Show a share from 0 to 1, and never less than before. Raises ComfyUI's exception if the user cancelled."""
        check_cancelled()
        step = int(STEPS * min(1.0, share))
        if step > self._shown:
            self._shown = step
            self._bar.update_absolute(step, STEPS)


def video(mp4: bytes | bytearray) -> Any:
    """Return the VIDEO of an MP4."""
    try:
        from comfy_api.latest import InputImpl
    except ModuleNotFoundError:  # an older ComfyUI
        from comfy_api.input_impl import VideoFromFile
    else:
        VideoFromFile = InputImpl.VideoFromFile  # noqa: N806  # a class
    return VideoFromFile(io.BytesIO(mp4))


def settings_file() -> Path:
    """Return the path of the settings of these nodes, in ComfyUI's user folder."""
    return Path(folder_paths.get_user_directory()) / "remote_vae.json"


def save_latents(samples: torch.Tensor, prefix: str = "latents/remote_vae") -> Path:
    """Save latents as Save Latent does, in ComfyUI's output folder, and return the path. Raises OSError."""
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    path = Path(folder) / f"{name}_{counter:05}_.latent"
    # The empty tensor tells Load Latent that the latents are not scaled by the factor of Stable Diffusion 1.
    content: dict[str, Any] = {
        "latent_tensor": samples.detach().cpu().contiguous(),
        "latent_format_version_0": torch.tensor([]),
    }
    comfy.utils.save_torch_file(content, str(path))
    return path
