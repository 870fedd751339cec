"""Frames per second: the request's, else --fps, else the model's in models.yaml, else 10; the file plays at that rate."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
import requests
from click.testing import CliRunner

from server.commands import cli
from server.config import load_settings
from server.inprocess.direct import Direct
from tests.conftest import REPOSITORY, Serve, write_models_yaml
from tests.vaes import LocalVae

PIPELINES = Path(__import__("diffusers").__file__).parent / "pipelines"


def rate_of(mp4: bytes, folder: Path) -> float:
    """What ffmpeg says of the file."""
    path = folder / "video.mp4"
    path.write_bytes(mp4)
    told = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-i", path], capture_output=True, text=True, check=False
    ).stderr
    found = re.search(r"([\d.]+) fps", told)
    assert found, told
    return float(found[1])


def ask(url: str, vaes: dict[str, LocalVae], **query: Any) -> bytes:
    latents = vaes["hunyuan"].latents(2, 4, 4)
    params = {"shape": list(latents.shape), "dtype": "float32", "output_type": "mp4", **query}
    answer = requests.post(url, latents.numpy().tobytes(), params=params, timeout=60)
    assert answer.ok, answer.text
    return answer.content


def test_a_request_wins_over_the_flag_and_the_flag_over_the_model(
    serve: Serve, vaes: dict[str, LocalVae], tmp_path: Path
) -> None:
    folder = str(vaes["hunyuan"].folder)
    models = {"own": {"repo": folder, "fps": 24}, "silent": {"repo": folder}, "sd": {"repo": str(vaes["sd"].folder)}}
    url = serve(models)
    assert rate_of(ask(url + "own", vaes), tmp_path) == 24
    assert rate_of(ask(url + "silent", vaes), tmp_path) == 10
    assert rate_of(ask(url + "own", vaes, fps=12.5), tmp_path) == 12.5
    listed = {model["name"]: model["fps"] for model in requests.get(url + "models", timeout=10).json()["models"]}
    assert listed == {"own": 24, "silent": 10, "sd": None}
    flagged = serve(models, fps=30)
    assert rate_of(ask(flagged + "own", vaes), tmp_path) == 30
    assert rate_of(ask(flagged + "own", vaes, fps=5), tmp_path) == 5


def test_without_a_server_it_is_the_same(vaes: dict[str, LocalVae], tmp_path: Path) -> None:
    config = write_models_yaml(
        tmp_path / "models.yaml", {"own": {"repo": str(vaes["hunyuan"].folder), "fps": 24}}, "own"
    )
    latents = vaes["hunyuan"].latents(2, 4, 4)
    parameters = {"shape": list(latents.shape), "dtype": "float32", "output_type": "mp4"}
    for flags, expected in (({}, 24), ({"fps": 30}, 30)):
        direct = Direct(load_settings(config=config, **flags))
        assert direct.parse("own", parameters, latents.numpy().tobytes(), "*/*").job.render.fps == expected


def example_rates(pipeline: str) -> set[float]:
    """Of `export_to_video` in the docstring of a pipeline's file."""
    source = (PIPELINES / pipeline).read_text()
    return {float(rate) for rate in re.findall(r"export_to_video\([^)]*fps=(\d+)", source)}


FROM_EXAMPLES = {
    "wan": "wan/pipeline_wan.py",
    "ltx-video": "ltx/pipeline_ltx.py",
    "ltx-video-0.9.5": "ltx/pipeline_ltx_condition.py",
    "hunyuan-video-1.5": "hunyuan_video1_5/pipeline_hunyuan_video1_5_image2video.py",
    "cogvideox": "cogvideo/pipeline_cogvideox.py",
    "cogvideox-2b": "cogvideo/pipeline_cogvideox.py",
    "cosmos": "cosmos/pipeline_cosmos_text2world.py",
    "svd": "stable_video_diffusion/pipeline_stable_video_diffusion.py",
    "allegro": "allegro/pipeline_allegro.py",
    "easyanimate": "easyanimate/pipeline_easyanimate.py",
}


@pytest.mark.parametrize("name", FROM_EXAMPLES)
def test_the_shipped_rate_is_that_of_the_pipelines_example(name: str) -> None:
    assert example_rates(FROM_EXAMPLES[name]) == {load_settings(config=REPOSITORY / "models.yaml").fps_of(name)}


def test_every_shipped_video_model_has_a_rate_and_the_hosted_one_has_10() -> None:
    settings = load_settings(config=REPOSITORY / "models.yaml")
    with_rate = {name for name, entry in settings.models.items() if entry.fps}
    assert {*FROM_EXAMPLES, "hunyuan-video", "wan-2.2", "ltx-2", "mochi"} <= with_rate
    assert [settings.fps_of(name) for name in ("hunyuan-video", "wan-2.2", "ltx-2", "mochi")] == [10, 24, 24, 30]


def test_the_command_models_shows_it() -> None:
    def shown(name: str) -> str:
        return CliRunner().invoke(cli.main, ["models", name, "--config", str(REPOSITORY / "models.yaml")]).stdout

    assert "videos, 16 frames per second\n" in shown("wan")
    assert "frames per second" not in shown("demo")
