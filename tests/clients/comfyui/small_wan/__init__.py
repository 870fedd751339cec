"""A node for the tests that makes a small diffusion model with seeded weights, and what its sampler needs beside it."""

import comfy.ldm.wan.model
import comfy.ops
import comfy.sd
import torch


class SmallWan:
    """Wan 2.1 with one layer. It denoises nothing, but ComfyUI samples with it."""

    CATEGORY = "tests"
    FUNCTION = "run"
    RETURN_TYPES = ("MODEL", "CONDITIONING", "LATENT")

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802  # the name that ComfyUI calls
        return {"required": {"frames": ("INT", {"default": 3})}}

    def run(self, frames):
        torch.manual_seed(0)
        sizes = {"model_type": "t2v", "dim": 128, "ffn_dim": 64, "num_heads": 1, "num_layers": 1}
        model = comfy.ldm.wan.model.WanModel(**sizes, operations=comfy.ops.disable_weight_init)
        weights = {
            name: 0.02 * torch.randn_like(each, dtype=torch.float32) for name, each in model.state_dict().items()
        }
        patcher = comfy.sd.load_diffusion_model_state_dict(weights)
        return patcher, [[torch.zeros(1, 4, 4096), {}]], {"samples": torch.zeros(1, 16, frames, 8, 8)}


NODE_CLASS_MAPPINGS = {"SmallWan": SmallWan}
