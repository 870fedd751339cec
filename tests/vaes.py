"""Real diffusers VAEs at small seeded configs, one for every kind of model the hosted service had."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo

KL_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}

MODELS: dict[str, dict[str, Any]] = {
    "sd": {**KL_BLOCKS, "latent_channels": 4},
    "sdxl": {
        **KL_BLOCKS,
        "latent_channels": 4,
        "scaling_factor": 0.5,
        "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
        "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
        "force_upcast": True,
    },
    "sd3": {
        **KL_BLOCKS,
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "flux": {
        **KL_BLOCKS,
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "hunyuan": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
}


# What models.yaml says of each beside its folder and its dtype.
ENTRIES: dict[str, dict[str, Any]] = {
    "sd": {"aliases": ["sd-v1"], "limits": {"max_pixels": 128 * 1024, "max_batch": 4}, "preload": True},
    "flux": {"family": "flux"},
    "hunyuan": {"limits": {"max_frames": 17, "max_batch": 2}},
}


@dataclass(frozen=True)
class LocalVae:
    """A VAE as a user has it locally: the weights in a folder, and the module to compare with."""

    name: str
    folder: Path
    module: Any

    @property
    def channels(self) -> int:
        return int(self.module.config.latent_channels)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The stock float32 decode of already unscaled latents."""
        with torch.no_grad():
            sample: torch.Tensor = self.module.decode(latents.float(), return_dict=False)[0]
        return sample

    def latents(self, *size: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
        return torch.randn(batch, self.channels, *size, generator=torch.Generator().manual_seed(seed))


def class_of(name: str) -> Any:
    return AutoencoderKLHunyuanVideo if name == "hunyuan" else AutoencoderKL


def build(name: str, folder: Path) -> LocalVae:
    """Seeded weights; the norms' too, which diffusers starts at 1 and 0, where a lost affine would not show."""
    torch.manual_seed(sum(map(ord, name)))
    module = class_of(name)(**MODELS[name]).eval()
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if "norm" in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
    module.save_pretrained(folder)
    return LocalVae(name, folder, module)


def build_all(folder: Path) -> dict[str, LocalVae]:
    return {name: build(name, folder / name) for name in MODELS}


def read_all(folder: Path) -> dict[str, LocalVae]:
    """What `build_all` wrote."""
    return {name: LocalVae(name, folder / name, class_of(name).from_pretrained(folder / name)) for name in MODELS}


def write_entries(folder: Path) -> Path:
    """A models.yaml beside them, of relative paths, so that the folder may be served from anywhere."""
    models = {name: {"repo": f"./{name}", "dtype": "float32", **ENTRIES.get(name, {})} for name in MODELS}
    models["sdxl-half"] = {"repo": "./sdxl", "dtype": "float16"}
    models["sd-bf16"] = {"repo": "./sd", "dtype": "bfloat16"}
    path = folder / "models.yaml"
    path.write_text(yaml.safe_dump({"default": "sd", "models": models}))
    return path
