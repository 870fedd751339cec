"""Trains the demo VAE on the photographs that scikit-image and scikit-learn carry, or checks the shipped files.

`python server/demo/train.py` rewrites the model and its sample latents; `--check` prints their PSNR table alone.
It knows diffusers and photographs, and nothing of the server.
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

HERE = Path(__file__).parent
DEFAULT_STEPS = 7228
CROP_PIXELS = 256
DEFAULT_BATCH = 8
LARGE_CROP_PIXELS = 512
# GroupNorm sees the whole picture, so the last steps train on whole pictures: on crops alone the colours shift.
CROP_PART = 0.6
PEAK_LEARNING_RATE = 1e-3
WARM_UP_STEPS = 200
EMA_DECAY = 0.999
L1_WEIGHT = 0.05
KL_WEIGHT = 1e-5
# The samples come up this many times as often as the other photos.
SAMPLE_REPEATS = 4
# safetensors writes files that their owner alone can read; a server in a container runs as another user.
READABLE = 0o644


@dataclass(frozen=True)
class Photo:
    """A photograph inside an installed package, with the terms it came under."""

    name: str
    package: str
    file: str
    licence: str
    attribution: str


@dataclass(frozen=True)
class Sample:
    """A region of a photo (left, top, right, bottom), resized to (width, height)."""

    photo: Photo
    box: tuple[int, int, int, int]
    size: tuple[int, int]


def skimage_photo(name: str, file: str, licence: str, attribution: str) -> Photo:
    return Photo(name, "scikit-image", f"skimage/data/{file}", licence, attribution)


def sklearn_photo(name: str, attribution: str) -> Photo:
    return Photo(name, "scikit-learn", f"sklearn/datasets/images/{name}.jpg", "CC-BY-2.0", attribution)


# Terms as the docstrings of skimage/data/_fetchers.py and sklearn/datasets/images/README.txt state them.
ASTRONAUT = skimage_photo("astronaut", "astronaut.png", "public domain", "NASA: Eileen Collins")
CHELSEA = skimage_photo("chelsea", "chelsea.png", "CC0-1.0", "Stefan van der Walt")
COFFEE = skimage_photo("coffee", "coffee.png", "CC0-1.0", "Rachel Michetti, courtesy of Pikolo Espresso Bar")
CHINA = sklearn_photo("china", "danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035/")
ROCKET = skimage_photo("rocket", "rocket.jpg", "public domain", "SpaceX: DSCOVR on Falcon 9")
PHOTOS = (
    ASTRONAUT,
    CHELSEA,
    COFFEE,
    CHINA,
    sklearn_photo("flower", "vultilion, https://www.flickr.com/photos/vultilion/6056698931/"),
    skimage_photo("hubble_deep_field", "hubble_deep_field.jpg", "public domain", "NASA: Hubble eXtreme Deep Field"),
    skimage_photo("retina", "retina.jpg", "CC0-1.0", "Mikael Häggström, doi:10.15347/wjm/2014.008"),
    skimage_photo("camera", "camera.png", "CC0-1.0", "Lav Varshney"),
    skimage_photo("clock", "clock_motion.png", "public domain", "Stefan van der Walt"),
    skimage_photo("brick", "brick.png", "CC0-1.0", "CC0Textures, Bricks25"),
    skimage_photo("coins", "coins.png", "no known copyright restrictions", "Brooklyn Museum Collection"),
    skimage_photo("immunohistochemistry", "ihc.png", "no known copyright restrictions", "CMMI"),
)
SAMPLES = (
    Sample(ASTRONAUT, (0, 0, 512, 512), (512, 512)),
    Sample(COFFEE, (100, 0, 500, 400), (512, 512)),
    Sample(CHELSEA, (75, 0, 375, 300), (512, 512)),
    Sample(CHINA, (0, 1, 640, 425), (640, 424)),
)
HELD_OUT = Sample(ROCKET, (0, 1, 640, 425), (640, 424))


def photo_path(photo: Photo) -> Path:
    """The photo's file; the package is found and not imported, which would take seconds."""
    package, _, rest = photo.file.partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{photo.name} is a photo of the package {photo.package}: pip install {photo.package}")
    return Path(spec.origin).parent / rest


def read_photo(photo: Photo) -> Image.Image:
    with Image.open(photo_path(photo)) as image:
        return image.convert("RGB")


def read_sample(sample: Sample) -> Image.Image:
    region = read_photo(sample.photo).crop(sample.box)
    return region if region.size == sample.size else region.resize(sample.size, Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1  # [3, H, W] in [-1, 1]


def to_image(sample: Tensor) -> Image.Image:
    pixels = ((sample[0].float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)  # [1, 3, H, W] -> [3, H, W]
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def psnr(image: Image.Image, original: Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures, in dB."""
    error = np.asarray(image, np.float64) - np.asarray(original, np.float64)
    return 10 * math.log10(255**2 / float(np.mean(error**2)))


def build_model() -> AutoencoderKL:
    # 16 groups, not 32: at 32 channels a group of one channel would erase that channel's mean, so the brightness.
    return AutoencoderKL(
        block_out_channels=(32, 64, 96, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=512,
        force_upcast=False,
    )


def random_crop(photo: Tensor, side: int, rng: np.random.Generator) -> Tensor:
    """A square of the photo, half the time at its own scale, else zoomed up to twofold; mirrored at random."""
    height, width = photo.shape[-2:]
    zoom = 1.0 if rng.random() < 0.5 else 2.0 ** rng.uniform(-1, 1)
    span = min(round(side * zoom), height, width)
    top, left = int(rng.integers(height - span + 1)), int(rng.integers(width - span + 1))
    patch = photo[None, :, top : top + span, left : left + span]
    if span != side:
        patch = F.interpolate(patch, (side, side), mode="bilinear", antialias=True)
    return patch.flip(-1) if rng.random() < 0.5 else patch  # [1, 3, side, side]


def random_crops(photos: list[Tensor], count: int, side: int, rng: np.random.Generator) -> Tensor:
    return torch.cat([random_crop(photos[int(rng.integers(len(photos)))], side, rng) for _ in range(count)])


def whole_pictures(pictures: list[Tensor], rng: np.random.Generator) -> Tensor:
    """All pictures of one shape, each mirrored at random; a shape comes up as often as it has pictures."""
    shape = pictures[int(rng.integers(len(pictures)))].shape
    same = [picture for picture in pictures if picture.shape == shape]
    return torch.stack([picture.flip(-1) if rng.random() < 0.5 else picture for picture in same])


class Loss(torch.nn.Module):
    """The loss of a batch `[B, 3, H, W]`; a module because CUDA graphs are recorded from modules."""

    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor) -> Tensor:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda, cache_enabled=False):
            posterior = self.model.encode(batch).latent_dist
            error = self.model.decode(posterior.sample()).sample.float() - batch
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        loss: Tensor = error.square().mean() + L1_WEIGHT * error.abs().mean() + KL_WEIGHT * kl
        return loss


def loss_for(model: AutoencoderKL, batch: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss of batches of this shape; on a GPU a CUDA graph, for launching its kernels one by one outlasts them."""
    loss = Loss(model).train()
    # One H100, 8 crops of 256²: 24 ms a step with the graph, 39 ms without; in channels_last 32 ms, in float32 36 ms.
    return torch.cuda.make_graphed_callables(loss, (batch,)) if batch.is_cuda else loss


def learning_rate_factor(steps: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        return min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))

    return factor


def train(steps: int, batch_size: int, seed: int, device: torch.device) -> AutoencoderKL:
    """The exponential average of the weights, float32 on `device`. Large crops count as four small ones."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    samples = [to_tensor(read_sample(sample)).to(device) for sample in SAMPLES]
    photos = [to_tensor(read_photo(photo)).to(device) for photo in PHOTOS] + samples * SAMPLE_REPEATS
    model = build_model().to(device).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = torch.optim.Adam(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99), fused=True)
    schedule = LambdaLR(optimizer, learning_rate_factor(steps))
    losses: dict[torch.Size, Callable[[Tensor], Tensor]] = {}
    started = time.monotonic()
    for step in range(steps):
        if step < CROP_PART * steps:
            batch = random_crops(photos, batch_size, CROP_PIXELS, rng)
        elif step % 2:
            batch = random_crops(photos, max(1, batch_size // 4), LARGE_CROP_PIXELS, rng)
        else:
            batch = whole_pictures(samples, rng)
        if batch.shape not in losses:
            losses[batch.shape] = loss_for(model, batch)
        loss = losses[batch.shape](batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        if (step + 1) % max(1, steps // 20) == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.5f}  {time.monotonic() - started:.0f} s", flush=True)
    return average.module.eval()


def steps_in(minutes: float, batch_size: int, seed: int, device: torch.device) -> int:
    """How many steps fit into the time, by the difference of two short runs: it leaves out the start."""

    def seconds(steps: int) -> float:
        started = time.monotonic()
        train(steps, batch_size, seed, device)
        return time.monotonic() - started

    seconds(20)
    seconds_per_step = (seconds(120) - seconds(20)) / 100
    return max(100, int(minutes * 60 / seconds_per_step))


@torch.inference_mode()
def encode(model: AutoencoderKL, image: Image.Image) -> Tensor:
    """The posterior's mode, not scaled: `[1, 4, H/8, W/8]`."""
    mode: Tensor = model.encode(to_tensor(image)[None].to(model.device)).latent_dist.mode()
    return mode


@torch.inference_mode()
def decode(model: AutoencoderKL, latents: Tensor) -> Image.Image:
    """The picture of scaled latents."""
    return to_image(model.decode(latents.to(model.device, torch.float32) / model.config.scaling_factor).sample)


def save_model(model: AutoencoderKL, out: Path) -> None:
    """Writes float16 weights, and the scaling_factor that gives the samples' latents a standard deviation of 1."""
    latents = torch.cat([encode(model, read_sample(sample)).flatten() for sample in SAMPLES])
    model.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    model.half().save_pretrained(out)
    (out / "diffusion_pytorch_model.safetensors").chmod(READABLE)


def load_model(folder: Path) -> AutoencoderKL:
    model: AutoencoderKL = AutoencoderKL.from_pretrained(folder, use_safetensors=True, torch_dtype=torch.float32)
    return model.eval()


def latents_path(folder: Path, sample: Sample) -> Path:
    return folder / "latents" / f"{sample.photo.name}.safetensors"


def save_latents(model: AutoencoderKL, sample: Sample, out: Path) -> None:
    scaling_factor = model.config.scaling_factor
    latents = (encode(model, read_sample(sample)) * scaling_factor).half().cpu().contiguous()
    metadata = {
        "photo": sample.photo.name,
        "package": sample.photo.package,
        "file": sample.photo.file,
        "licence": sample.photo.licence,
        "attribution": sample.photo.attribution,
        "box": ",".join(map(str, sample.box)),
        "size": ",".join(map(str, sample.size)),
        "scaling_factor": str(scaling_factor),
    }
    path = latents_path(out, sample)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"latents": latents}, path, metadata)
    path.chmod(READABLE)


def load_latents(folder: Path, sample: Sample) -> Tensor:
    with safe_open(latents_path(folder, sample), framework="pt") as file:
        latents: Tensor = file.get_tensor("latents")
    return latents


def check(folder: Path) -> None:
    """Prints the PSNR of every shipped sample and of the held-out photo, decoded in float32 on the CPU."""
    model = load_model(folder)
    for sample in SAMPLES:
        report(sample, decode(model, load_latents(folder, sample)), "")
    held_out = encode(model, read_sample(HELD_OUT)) * model.config.scaling_factor
    report(HELD_OUT, decode(model, held_out), "  (held out of training)")


def report(sample: Sample, decoded: Image.Image, note: str) -> None:
    width, height = sample.size
    print(f"{sample.photo.name:10} {width}x{height}  {psnr(decoded, read_sample(sample)):.2f} dB{note}")


def make_reproducible() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling took a third of a step's time


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="where the model and the latents go")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="default: %(default)s")
    length.add_argument("--minutes", type=float, help="as many steps as fit, by a short timed run")
    parser.add_argument("--batch", type=int, default=DEFAULT_BATCH, help="crops a step; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="print the PSNR table of the files in --out; no training")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.check:
        return check(arguments.out)
    make_reproducible()
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if arguments.device == "auto" else arguments.device)
    batch, seed = arguments.batch, arguments.seed
    steps = arguments.steps if arguments.minutes is None else steps_in(arguments.minutes, batch, seed, device)
    save_model(train(steps, batch, seed, device), arguments.out)
    model = load_model(arguments.out)
    for sample in SAMPLES:
        save_latents(model, sample, arguments.out)
    return check(arguments.out)


if __name__ == "__main__":
    main()
