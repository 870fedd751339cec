"""Train the demo VAE on the photographs in the packages scikit-image and scikit-learn, or check the shipped files.

`python server/demo/train.py` rewrites the model and its sample latents. With `--check` it only prints a table of the
PSNR of the shipped files. It does not depend on the server.
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
# The share of the steps that train on crops only. The later steps also train on whole images, because the statistics of
# GroupNorm span the image: a model that is trained only on crops shifts the colours of whole images.
CROP_PART = 0.6
PEAK_LEARNING_RATE = 1e-3
WARM_UP_STEPS = 200
EMA_DECAY = 0.999
L1_WEIGHT = 0.05
KL_WEIGHT = 1e-5
# Each sample is in the list of photos this many times.
SAMPLE_REPEATS = 4
# safetensors writes files that only their owner can read, but a server in a container runs as another user.
READABLE = 0o644


@dataclass(frozen=True)
class Photo:
    """A photograph inside an installed package, with its licence."""

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
    """Return a photo of scikit-image."""
    return Photo(name, "scikit-image", f"skimage/data/{file}", licence, attribution)


def sklearn_photo(name: str, attribution: str) -> Photo:
    """Return a photo of scikit-learn."""
    return Photo(name, "scikit-learn", f"sklearn/datasets/images/{name}.jpg", "CC-BY-2.0", attribution)


# The licences are stated in the docstrings of skimage/data/_fetchers.py and in sklearn/datasets/images/README.txt.
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
    """Return the path of a photo. The package is not imported, because that takes seconds."""
    package, _, rest = photo.file.partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{photo.name} is a photo of the package {photo.package}: pip install {photo.package}")
    return Path(spec.origin).parent / rest


def read_photo(photo: Photo) -> Image.Image:
    """Read a photo as an RGB image."""
    with Image.open(photo_path(photo)) as image:
        return image.convert("RGB")


def read_sample(sample: Sample) -> Image.Image:
    """Read the region of a sample, resized to its size."""
    region = read_photo(sample.photo).crop(sample.box)
    return region if region.size == sample.size else region.resize(sample.size, Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """Return an image as a float tensor `[3, H, W]` in [-1, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1  # [3, H, W] in [-1, 1]


def to_image(sample: Tensor) -> Image.Image:
    """Return a sample `[1, 3, H, W]` in about [-1, 1] as an image."""
    pixels = ((sample[0].float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)  # [1, 3, H, W] -> [3, H, W]
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def psnr(image: Image.Image, original: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of two 8-bit images, in dB."""
    error = np.asarray(image, np.float64) - np.asarray(original, np.float64)
    return 10 * math.log10(255**2 / float(np.mean(error**2)))


def build_model() -> AutoencoderKL:
    """Build an untrained AutoencoderKL that compresses 8 times, with 4 latent channels."""
    # 16 groups, not 32: with 32 channels, each group would be one channel, and the norm would erase its mean and
    # thereby the brightness.
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
    """Return a random square of a photo `[3, H, W]` as `[1, 3, side, side]`.

    Half of the crops keep the scale of the photo; the others are scaled by a factor between 1/2 and 2. Half of all
    crops are mirrored.
    """
    height, width = photo.shape[-2:]
    zoom = 1.0 if rng.random() < 0.5 else 2.0 ** rng.uniform(-1, 1)
    span = min(round(side * zoom), height, width)
    top, left = int(rng.integers(height - span + 1)), int(rng.integers(width - span + 1))
    patch = photo[None, :, top : top + span, left : left + span]
    if span != side:
        patch = F.interpolate(patch, (side, side), mode="bilinear", antialias=True)
    return patch.flip(-1) if rng.random() < 0.5 else patch  # [1, 3, side, side]


def random_crops(photos: list[Tensor], count: int, side: int, rng: np.random.Generator) -> Tensor:
    """Return a batch of `count` random crops of random photos."""
    return torch.cat([random_crop(photos[int(rng.integers(len(photos)))], side, rng) for _ in range(count)])


def whole_images(images: list[Tensor], rng: np.random.Generator) -> Tensor:
    """Return all images of one random shape as a batch, each mirrored at random.

    The probability of a shape is proportional to its number of images.
    """
    shape = images[int(rng.integers(len(images)))].shape
    same = [image for image in images if image.shape == shape]
    return torch.stack([image.flip(-1) if rng.random() < 0.5 else image for image in same])


class Loss(torch.nn.Module):
    """The loss of a model. It is a module, because torch records CUDA graphs of modules."""

    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor) -> Tensor:
        """Return the loss for a batch `[B, 3, H, W]` in [-1, 1]: squared and absolute error, and a KL term."""
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda, cache_enabled=False):
            posterior = self.model.encode(batch).latent_dist
            error = self.model.decode(posterior.sample()).sample.float() - batch
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        loss: Tensor = error.square().mean() + L1_WEIGHT * error.abs().mean() + KL_WEIGHT * kl
        return loss


def loss_for(model: AutoencoderKL, batch: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that computes the loss of batches of this shape.

    On a GPU it is a CUDA graph, because launching the kernels one by one takes longer than running them.
    """
    loss = Loss(model).train()
    # On one H100 with 8 crops of 256², a step takes 24 ms with the graph and 39 ms without; in channels_last it takes
    # 32 ms, in float32 36 ms.
    return torch.cuda.make_graphed_callables(loss, (batch,)) if batch.is_cuda else loss


def learning_rate_factor(steps: int) -> Callable[[int], float]:
    """Return the schedule of the learning rate: a linear warm-up, then half a cosine down to 0."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))

    return factor


def train(steps: int, batch_size: int, seed: int, device: torch.device) -> AutoencoderKL:
    """Train a model and return the exponential moving average of its weights, in float32 on `device`.

    batch_size: crops of CROP_PIXELS in a step. A batch of crops of LARGE_CROP_PIXELS has a quarter as many.
    """
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
            batch = whole_images(samples, rng)
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
    """Return how many steps fit into the time.

    The time of a step is the difference of two short runs, so that it does not include the time to start.
    """

    def seconds(steps: int) -> float:
        started = time.monotonic()
        train(steps, batch_size, seed, device)
        return time.monotonic() - started

    seconds(20)
    seconds_per_step = (seconds(120) - seconds(20)) / 100
    return max(100, int(minutes * 60 / seconds_per_step))


@torch.inference_mode()
def encode(model: AutoencoderKL, image: Image.Image) -> Tensor:
    """Return the mode of the posterior, `[1, 4, H/8, W/8]`, not scaled."""
    mode: Tensor = model.encode(to_tensor(image)[None].to(model.device)).latent_dist.mode()
    return mode


@torch.inference_mode()
def decode(model: AutoencoderKL, latents: Tensor) -> Image.Image:
    """Decode scaled latents to an image."""
    return to_image(model.decode(latents.to(model.device, torch.float32) / model.config.scaling_factor).sample)


def save_model(model: AutoencoderKL, out: Path) -> None:
    """Write the model with float16 weights.

    Its scaling_factor is the one that gives the latents of the samples a standard deviation of 1.
    """
    latents = torch.cat([encode(model, read_sample(sample)).flatten() for sample in SAMPLES])
    model.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    model.half().save_pretrained(out)
    (out / "diffusion_pytorch_model.safetensors").chmod(READABLE)


def load_model(folder: Path) -> AutoencoderKL:
    """Load the model in float32."""
    model: AutoencoderKL = AutoencoderKL.from_pretrained(folder, use_safetensors=True, torch_dtype=torch.float32)
    return model.eval()


def latents_path(folder: Path, sample: Sample) -> Path:
    """Return the path of the latents of a sample."""
    return folder / "latents" / f"{sample.photo.name}.safetensors"


def save_latents(model: AutoencoderKL, sample: Sample, out: Path) -> None:
    """Write the scaled float16 latents of a sample, with the source and licence of its photo as metadata."""
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
    """Read the scaled latents of a sample."""
    with safe_open(latents_path(folder, sample), framework="pt") as file:
        latents: Tensor = file.get_tensor("latents")
    return latents


def check(folder: Path) -> None:
    """Print the PSNR of every shipped sample and of the held-out photo, decoded in float32 on the CPU."""
    model = load_model(folder)
    for sample in SAMPLES:
        report(sample, decode(model, load_latents(folder, sample)), "")
    held_out = encode(model, read_sample(HELD_OUT)) * model.config.scaling_factor
    report(HELD_OUT, decode(model, held_out), "  (held out of training)")


def report(sample: Sample, decoded: Image.Image, note: str) -> None:
    """Print the PSNR of one decoded sample."""
    width, height = sample.size
    print(f"{sample.photo.name:10} {width}x{height}  {psnr(decoded, read_sample(sample)):.2f} dB{note}")


def make_reproducible() -> None:
    """Make torch use deterministic algorithms only."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling memory took a third of the time of a step


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the model and the latents")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="default: %(default)s")
    length.add_argument("--minutes", type=float, help="train for about this long; a short run is timed first")
    parser.add_argument("--batch", type=int, default=DEFAULT_BATCH, help="crops in a step; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="print the PSNR table of the files in --out; no training")
    return parser.parse_args()


def main() -> None:
    """Train the model and write its files, or check the files with `--check`."""
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
