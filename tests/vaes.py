"""Real diffusers VAEs at small seeded configs, one for every kind of model the hosted service had."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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


def build(name: str, folder: Path) -> LocalVae:
    """Seeded weights; the norms' too, which diffusers starts at 1 and 0, where a lost affine would not show."""
    torch.manual_seed(sum(map(ord, name)))
    vae_class = AutoencoderKLHunyuanVideo if name == "hunyuan" else AutoencoderKL
    module = vae_class(**MODELS[name]).eval()
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if "norm" in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
    module.save_pretrained(folder)
    return LocalVae(name, folder, module)
