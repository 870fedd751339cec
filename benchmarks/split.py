"""A prototype: one image decoded by several workers, each with its own rows, bit by bit as one worker decodes it.

    python -m benchmarks.split --size 512
    python -m benchmarks.split --count

The first command decodes an image with one worker and with two, on a CPU, compares the pixels and prints what the
workers sent each other. The second one computes for several sizes what they would send. docs/several-devices.md says
what the numbers mean. The server does not use this program.

Each worker has the rows of its share in every layer. A 3x3 convolution needs one row of the share above and one of the
share below, which neighbours send each other after every norm. A GroupNorm needs the statistics of all shares, and the
attention needs the keys and values of all positions; these are gathered from all workers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, multiprocessing

from benchmarks.decode import MEGA, full_size_vae
from server.engine.coders.image.decoder import ExactKLDecoder
from server.engine.coders.image.layers import Attention, Conv, DecoderWeights, Resnet, Upsample
from server.engine.coders.image.passes import decode
from server.engine.coders.image.plan import CPU_BAND_BYTES, SCORES_BYTES, SMALLEST_BAND_BYTES, Plan
from server.engine.coders.interface import go_on
from server.engine.kernels.moments import Affine, GroupNorm, Moments
from server.engine.kernels.reference import Kernels

MOST_WAIT = timedelta(minutes=5)
HEADER = "| size | halo rows MB | statistics MB | keys and values MB | exchanges |\n| --- | --- | --- | --- | --- |"


@dataclass
class Sent:
    """What one worker sent to each of its neighbours, in bytes, and how often workers waited for each other."""

    halo: int = 0
    statistics: int = 0
    attention: int = 0
    exchanges: int = 0


@dataclass
class Team:
    """This worker among others, in the order of their rows. sent: what it has sent so far."""

    rank: int
    count: int
    sent: Sent = field(default_factory=Sent)

    def with_halo(self, x: Tensor) -> Tensor:  # [B, n, W, C] -> [B, n + 2, W, C]
        """Return the rows of this worker with one row of each neighbour, or zeros outside the image."""
        batch, rows, width, channels = x.shape
        y = x.new_zeros(batch, rows + 2, width, channels)  # [B, n + 2, W, C]
        y[:, 1:-1] = x
        above, below = torch.empty_like(y[:, :1]), torch.empty_like(y[:, :1])  # [B, 1, W, C]
        pairs = []
        if self.rank > 0:
            pairs += [(dist.isend, y[:, 1:2].contiguous(), self.rank - 1), (dist.irecv, above, self.rank - 1)]
        if self.rank < self.count - 1:
            pairs += [(dist.isend, y[:, -2:-1].contiguous(), self.rank + 1), (dist.irecv, below, self.rank + 1)]
        waiting = [call(_bytes(tensor), peer) for call, tensor, peer in pairs]
        for one in waiting:
            one.wait()
        if self.rank > 0:
            y[:, :1] = above
        if self.rank < self.count - 1:
            y[:, -1:] = below
        self.sent.halo += above.nbytes
        self.sent.exchanges += 1
        return y

    def all_rows(self, x: Tensor) -> Tensor:  # [B, n, ...] -> [B, sum of all n, ...]
        """Return the rows of all workers. Each has as many."""
        parts = [torch.empty_like(x) for _ in range(self.count)]
        dist.all_gather([_bytes(part) for part in parts], _bytes(x.contiguous()))
        self.sent.attention += x.nbytes
        self.sent.exchanges += 1
        return torch.cat(parts, 1)

    def affine(self, kernels: Kernels, norm: GroupNorm, moments: Moments, offset: Tensor | None = None) -> Affine:
        """Merge the statistics of all workers in the order of the rows, as one worker merges those of its bands."""
        mine = torch.cat([moments.count[:, None, None].expand(-1, *moments.mean.shape[1:])[None],
                          moments.mean[None], moments.m2[None]])  # [3, K, B, C]  # fmt: skip
        parts = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(parts, mine)
        self.sent.statistics += moments.count.nbytes + moments.mean.nbytes + moments.m2.nbytes
        self.sent.exchanges += 1
        return kernels.affine(norm, [Moments(part[0, :, 0, 0], part[1], part[2]) for part in parts], offset)


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


def decode_share(network: DecoderWeights, kernels: Kernels, plan: Plan, latents: Tensor, team: Team) -> Tensor:
    """Decode the rows of this worker: latents `[B, C, h, w]` of the whole image, of which it takes its share.

    Return its rows `[B, n, W, 3]`. The share has to consist of whole units of rows in every layer (`Plan.unit_rows`).
    """
    share = latents.shape[2] // team.count
    rows = slice(team.rank * share, (team.rank + 1) * share)
    x = latents[:, :, rows].permute(0, 2, 3, 1).contiguous()  # [B, n, w, C]
    if network.post_quant is not None:
        x = F.linear(x, network.post_quant.weight, network.post_quant.bias)  # [B, n, w, C]
    x = kernels.conv(team.with_halo(x), network.conv_in.weight, network.conv_in.bias)  # [B, n, w, C]
    unit = plan.unit_rows(x.shape[2], x.shape[3])
    moments = kernels.moments(x, unit)
    for step in network.steps:
        match step:
            case Resnet():
                x, moments = _resnet(step, kernels, team, x, moments, unit)
            case Attention():
                x, moments = _attention(step, kernels, plan, team, x, moments, unit)
            case Upsample():
                unit = plan.unit_rows(2 * x.shape[2], step.conv.out_channels)
                phases = kernels.conv(team.with_halo(x), step.conv.weight, None)  # [B, n + 1, W + 1, 4 C]
                x, moments = kernels.interleave(phases, step.conv.bias, unit)  # [B, 2 n, 2 W, C]
    y = _normalized(network.norm_out, kernels, team, x, moments)  # [B, n + 2, W, C]
    return kernels.conv(y, network.conv_out.weight, network.conv_out.bias)  # [B, n, W, 3]


def _resnet(
    block: Resnet, kernels: Kernels, team: Team, x: Tensor, moments: Moments, unit: int
) -> tuple[Tensor, Moments]:  # [B, n, W, C]
    hidden = kernels.conv(_normalized(block.norm1, kernels, team, x, moments), block.conv1.weight, None)
    y = _normalized(block.norm2, kernels, team, hidden, kernels.moments(hidden, unit), block.conv1.bias)
    total = x if block.shortcut is None else F.linear(x, block.shortcut.weight, block.shortcut.bias)  # [B, n, W, C']
    return total, kernels.add_conv_(total, y, block.conv2.weight, block.conv2.bias, unit)


def _normalized(
    norm: GroupNorm, kernels: Kernels, team: Team, x: Tensor, moments: Moments, offset: Tensor | None = None
) -> Tensor:  # [B, n, W, C] -> [B, n + 2, W, C]
    y = torch.empty_like(x)
    kernels.normalize(x, team.affine(kernels, norm, moments, offset), y, silu=True)
    return team.with_halo(y)


def _attention(
    block: Attention, kernels: Kernels, plan: Plan, team: Team, x: Tensor, moments: Moments, unit: int
) -> tuple[Tensor, Moments]:  # [B, n, w, C]
    tokens = torch.empty_like(x)
    kernels.normalize(x, team.affine(kernels, block.norm, moments), tokens, silu=False)
    tokens = tokens.flatten(1, 2)  # [B, n w, C]
    key = team.all_rows(F.linear(tokens, block.key.weight))  # [B, N, C]
    value = team.all_rows(F.linear(tokens, block.value.weight))  # [B, N, C]
    residual = x.flatten(1, 2)  # [B, n w, C]
    chunk = plan.query_rows(key.shape[1])
    for start in range(0, tokens.shape[1], chunk):
        query = F.linear(tokens[:, start : start + chunk], block.query.weight, block.query.bias)  # [B, t, C]
        residual[:, start : start + chunk] += kernels.attend(query, key, value).add_(block.bias)
    return x, kernels.moments(x, unit)


def decode_whole(network: DecoderWeights, kernels: Kernels, plan: Plan, latents: Tensor) -> Tensor:  # [B, C, h, w]
    """Decode with one worker, as the server does. Return `[B, H, W, 3]`."""
    bands: list[Tensor] = []
    decode(network, kernels, plan, latents, lambda _top, band: bands.append(band), go_on)
    return torch.cat(bands, 1)


def plan_for(network: DecoderWeights, unit_bytes: int) -> Plan:
    """Return a plan with ample memory. unit_bytes: as `Plan` says."""
    return Plan(1, network.dtype.itemsize, CPU_BAND_BYTES, SCORES_BYTES, unit_bytes)


def split(
    vae: AutoencoderKL, latents: Tensor, workers: int = 2, unit_bytes: int = SMALLEST_BAND_BYTES
) -> tuple[Tensor, Sent, float]:  # [B, C, h, w] -> [B, H, W, 3]
    """Decode with several workers. Return the image, what the first one sent, and the seconds of the slowest one."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (workers, Path(folder), vae, latents, unit_bytes)
        multiprocessing.spawn(_work, arguments, nprocs=workers)  # type: ignore[no-untyped-call]  # torch leaves it so
        made = [torch.load(Path(folder) / str(rank), weights_only=True) for rank in range(workers)]
    return torch.cat([rows for rows, _, _ in made], 1), Sent(**made[0][1]), max(seconds for _, _, seconds in made)


def _work(rank: int, workers: int, folder: Path, vae: AutoencoderKL, latents: Tensor, unit_bytes: int) -> None:
    """Decode one share, and save it with what was sent and the seconds."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=workers, timeout=MOST_WAIT)
    coder, team = ExactKLDecoder(vae), Team(rank, workers)
    dist.barrier()
    began = time.perf_counter()
    rows = decode_share(coder.network, coder.kernels, plan_for(coder.network, unit_bytes), latents, team)
    torch.save((rows, vars(team.sent), time.perf_counter() - began), folder / str(rank))
    dist.destroy_process_group()


def count(network: DecoderWeights, height: int, width: int, workers: int, unit_bytes: int) -> Sent:
    """Compute what a worker sends to each neighbour for latents of height x width, without decoding."""
    sent, plan = Sent(), plan_for(network, unit_bytes)
    height //= workers  # of this worker's share
    channels = network.conv_in.out_channels
    unit = plan.unit_rows(width, channels)
    _count_halo(sent, plan, width, _inputs(network.conv_in))
    for step in network.steps:
        match step:
            case Resnet():
                for inputs in (channels, step.conv1.out_channels):
                    _count_norm(sent, -(-height // unit), inputs)
                    _count_halo(sent, plan, width, inputs)
                channels = step.conv2.out_channels
            case Attention():
                _count_norm(sent, -(-height // unit), channels)
                sent.attention += 2 * height * width * channels * plan.itemsize
                sent.exchanges += 2
            case Upsample():
                _count_halo(sent, plan, width, channels)
                height, width, channels = 2 * height, 2 * width, step.conv.out_channels
                unit = plan.unit_rows(width, channels)
    _count_norm(sent, -(-height // unit), channels)
    _count_halo(sent, plan, width, channels)
    return sent


def _count_halo(sent: Sent, plan: Plan, width: int, channels: int) -> None:
    sent.halo += width * channels * plan.itemsize
    sent.exchanges += 1


def _count_norm(sent: Sent, parts: int, channels: int) -> None:
    sent.statistics += parts * (2 * channels + 1) * torch.float32.itemsize
    sent.exchanges += 1


def _inputs(conv: Conv) -> int:
    """Return the input channels of conv_in, whose weight is packed unless it is made for counting."""
    return int(conv.weight.shape[1])


def line(size: int, sent: Sent) -> str:
    """Return one row of the table."""
    figures: Sequence[float] = [value / MEGA for value in (sent.halo, sent.statistics, sent.attention)]
    return f"| {size}² | {' | '.join(f'{figure:.3g}' for figure in figures)} | {sent.exchanges} |"


def counted(sizes: Sequence[int]) -> Iterator[str]:
    """Yield the rows for two workers in bfloat16."""
    network = ExactKLDecoder(full_size_vae().to(torch.bfloat16)).network
    for size in sizes:
        yield line(size, count(network, size // 8, size // 8, 2, SMALLEST_BAND_BYTES))


def main() -> None:
    """Run the program from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="the side of the image in pixels")
    parser.add_argument("--count", action="store_true", help="only compute what would be sent, for several sizes")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    print(HEADER)
    if arguments.count:
        for row in counted((512, 1024, 2048, 4096)):
            print(row)
        return
    vae = full_size_vae().to(torch.bfloat16)
    side = arguments.size // 8
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, sent, seconds = split(vae, latents)
    print(line(arguments.size, sent))
    torch.set_num_threads(1)
    coder = ExactKLDecoder(vae)
    began = time.perf_counter()
    expected = decode_whole(coder.network, coder.kernels, plan_for(coder.network, SMALLEST_BAND_BYTES), latents)
    print(f"one worker {time.perf_counter() - began:.2f} s, two workers {seconds:.2f} s, one thread each")
    print("the same bits" if torch.equal(found, expected) else "NOT the same bits")


if __name__ == "__main__":
    main()
