"""What is measured on a GPU, and the small sizes with which the report tests itself on a CPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The sizes of all sections.

    dtypes: names of the dtypes of torch to compare.
    matrix: side of the square matrices. convolution: rows and columns, and channels, of the convolved images.
    image_sides: of square images, in pixels.
    steady_runs: how many runs of a decode or encode are timed after the second one, at most.
    clip: frames, height and width of a video, in pixels.
    shape_step: step between the heights of the twelve shapes, in latent pixels.
    memory_sides: sides of the images that are decoded beside another process.
    left_mb: how much memory the other process leaves, from one step to the next.
    large_side: side of the image that is decoded after four models were used.
    clients: how many clients send requests at the same time.
    cell_s: how long each number of clients is measured for each format.
    """

    dtypes: tuple[str, ...]
    matrix: int
    convolution: tuple[tuple[int, int], ...]
    image_sides: tuple[int, ...]
    steady_runs: int
    clip: tuple[int, int, int]
    shape_step: int
    memory_sides: tuple[int, ...]
    left_mb: tuple[int, ...]
    large_side: int
    clients: tuple[int, ...]
    cell_s: float


ON_GPU = Sizes(
    dtypes=("bfloat16", "float16", "float32"),
    matrix=8192,
    convolution=((1024, 128), (512, 256), (128, 512)),
    image_sides=(512, 1024, 2048, 4096),
    steady_runs=5,
    clip=(17, 320, 512),
    shape_step=8,
    memory_sides=(1024, 2048, 4096),
    left_mb=(8000, 3000, 1200, 400),
    large_side=2048,
    clients=(1, 4, 16),
    cell_s=4.0,
)
ON_CPU = Sizes(
    dtypes=("float32", "bfloat16"),
    matrix=512,
    convolution=((64, 32),),
    image_sides=(64, 128),
    steady_runs=1,
    clip=(9, 64, 64),
    shape_step=1,
    memory_sides=(64, 1024),
    left_mb=(400, 40, 20),
    large_side=1024,
    clients=(1, 4, 16),
    cell_s=0.3,
)


def sizes_for(device: str) -> Sizes:
    """Return the sizes for a device, `cpu` or `cuda`."""
    return ON_CPU if device == "cpu" else ON_GPU
