"""The cases, the answers and the requests of `benchmarks.server`, and the checks of answers. Knows no server."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from benchmarks.load import WrongAnswer
from server.config import SHIPPED_MODELS_YAML
from server.inprocess.direct import Direct
from server.values import Request

DEMO = SHIPPED_MODELS_YAML.parent / "server" / "demo"
PHOTOS = ("astronaut", "chelsea", "coffee")
FACTOR = 0.37304  # the scaling factor of the demo's latents, which the tiny model decodes too
LEAST_PSNR_DB = 25.0  # two bf16 decodes of the same latents must be at least so similar
LENGTH_TOLERANCE = 0.05  # the relative difference of two encoded images whose pixels are rounded differently


@dataclass(frozen=True)
class Case:
    """A model at a size.

    side: the side of the image, in pixels.
    most_clients: bounds the time of a cell. With the largest model, 64 clients would take a minute.
    """

    model: str
    side: int
    most_clients: int


CASES = {
    "tiny-64": Case("tiny", 64, 64),
    "tiny-256": Case("tiny", 256, 64),
    "demo-256": Case("demo", 256, 64),
    "demo-512": Case("demo", 512, 16),
}
ANSWERS: dict[str, dict[str, str]] = {
    "JPEG": {"output_type": "pil", "image_format": "jpg", "Accept": "image/jpeg"},
    "PNG": {"output_type": "pil", "image_format": "png", "Accept": "image/png"},
    "tensor": {"output_type": "pt", "image_format": "png", "Accept": "tensor/binary"},
}


class Work:
    """The requests of one case and kind of answer, as bytes for a server and parsed for the bare loop."""

    def __init__(self, direct: Direct, case: Case, answer: str) -> None:
        """Make the requests and the expected answers. answer: a key of ANSWERS."""
        self.direct = direct
        self.shape = (1, 4, case.side // 8, case.side // 8)
        self.answer = answer
        latents = [photo_latents(name, self.shape) for name in PHOTOS]
        self.sent = [self._request(case.model, data) for data in latents]
        self.jobs = [self._job(case.model, data) for data in latents]
        self.expected = [bytes(direct.render(job, direct.run(job)).body) for job in self.jobs]

    def _parameters(self, model: str) -> dict[str, Any]:
        wanted = {key: value for key, value in ANSWERS[self.answer].items() if key != "Accept"}
        return {"shape": list(self.shape), "dtype": "float16", "scaling_factor": FACTOR, "model": model, **wanted}

    def _request(self, model: str, data: bytes) -> bytes:
        query = urlencode(self._parameters(model), doseq=True)
        head = (
            f"POST /predict?{query} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: tensor/binary\r\n"
            f"Accept: {ANSWERS[self.answer]['Accept']}\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data

    def _job(self, model: str, data: bytes) -> Request:
        return self.direct.parse(model, self._parameters(model), data, ANSWERS[self.answer]["Accept"])

    def check_length(self, index: int, body: bytes, lengths: dict[int, int]) -> None:
        """Compare the length of an answer with that of the first answer to the same latents. Raises WrongAnswer.

        lengths: the lengths of the first answers of the same server, because servers use different encoders.
        """
        wanted = lengths.setdefault(index, len(body))
        if abs(len(body) - wanted) > (0 if self.answer == "tensor" else LENGTH_TOLERANCE * wanted):
            raise WrongAnswer(f"an answer of {len(body)} bytes, the first one had {wanted}")

    def check_picture(self, index: int, body: bytes) -> None:
        """Compare the image in an answer with the bare decode. Raises WrongAnswer."""
        quality = psnr(self.pixels(body), self.pixels(self.expected[index]))
        if quality < LEAST_PSNR_DB:
            raise WrongAnswer(f"the PSNR of an image is {quality:.1f} dB against the bare decode")

    def pixels(self, body: bytes) -> NDArray[np.float32]:
        """Return the pixels of an answer, in [0, 255]."""
        if self.answer != "tensor":
            return np.asarray(Image.open(io.BytesIO(body)), np.float32)
        dtype = {2: torch.bfloat16, 4: torch.float32}[len(body) // (3 * 64 * self.shape[2] * self.shape[3])]
        sample = torch.frombuffer(bytearray(body), dtype=dtype).float()
        return ((sample / 2 + 0.5).clamp(0, 1) * 255).numpy()


def write_models(folder: Path) -> Path:
    """Write two models and their models.yaml into a folder, and return the models.yaml.

    They are the demo, and a model with random weights that is so small that the costs of the server dominate.
    """
    torch.manual_seed(0)
    tiny = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=FACTOR,
    )
    tiny.save_pretrained(folder / "tiny")
    AutoencoderKL.from_pretrained(DEMO).save_pretrained(folder / "demo")
    models = {name: {"repo": str(folder / name), "preload": True} for name in ("tiny", "demo")}
    path = folder / "models.yaml"
    path.write_text(yaml.safe_dump({"default": "tiny", "models": models}))
    return path


def photo_latents(name: str, shape: Sequence[int]) -> bytes:
    """Return the bytes of the middle of a photograph's latents, in float16."""
    latents = load_file(DEMO / "latents" / f"{name}.safetensors")["latents"]  # [1, 4, 64, 64]
    top, left = ((have - want) // 2 for have, want in zip(latents.shape[2:], shape[2:], strict=True))
    return latents[..., top : top + shape[2], left : left + shape[3]].contiguous().numpy().tobytes()


def psnr(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return the PSNR of two images in dB."""
    return 10 * math.log10(255**2 / max(1e-9, float(((one - other) ** 2).mean())))
