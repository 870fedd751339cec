"""What the exact decoder and the exact encoder of causal video VAEs have in common."""

from __future__ import annotations

from ....model_info import EXACT
from ...kernels.causal_kernels import CausalKernels
from ..interface import Check
from .causal_encoder_layers import CausalEncoder
from .causal_layers import CausalDecoder
from .causal_passes import Run
from .causal_plan import Network, Plan, Planner, Size
from .causal_run import Piece, VideoRun, Write

CPU_BAND_BYTES = 4 << 20
GPU_BAND_BYTES = 256 << 20
# The size of the largest activation of the frames that are computed together.
CPU_PIECE_BYTES = 1  # as few frames as possible: longer pieces do not make bands of rows faster
GPU_PIECE_BYTES = 1 << 30
QUERY_BYTES = 256 << 20


class CausalCoder:
    """The weights of one direction of a VAE, with the kernels that run them on their device in their dtype."""

    name = EXACT
    heeds_budget = True

    def __init__(self, weights: CausalDecoder | CausalEncoder, kernels: CausalKernels) -> None:
        self.network = Network(weights)
        self.kernels = kernels

    def free_caches(self) -> None:
        """Do nothing, because this coder caches nothing between calls."""

    def plan(self, frames: int, height: int, width: int, budget_bytes: int) -> Plan:
        """Plan a run with so many latent frames of this size. budget_bytes: the limit of everything but the output."""
        on_cpu = self.network.weights.device.type == "cpu"
        planner = Planner(self.network, Size(frames, height, width), CPU_PIECE_BYTES if on_cpu else GPU_PIECE_BYTES)
        return planner.plan(budget_bytes, CPU_BAND_BYTES if on_cpu else GPU_BAND_BYTES)

    def run(self, plan: Plan, pieces: list[Piece], write: Write, check: Check) -> None:
        """Run a plan on the latents or pixels of one video, in pieces. write: receives the output."""
        on_cpu = self.network.weights.device.type == "cpu"  # whose attention stores no scores and may take more queries
        query_bytes = QUERY_BYTES if on_cpu else min(QUERY_BYTES, 2 * plan.band_bytes)
        video = VideoRun(self.network, Run(self.kernels, plan.band_bytes, query_bytes, check), pieces, write)
        for leg in plan.legs:
            video.run_leg(leg)
