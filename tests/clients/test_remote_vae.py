"""RemoteVAE as a module: its place in a pipeline, what it sends, and its modular blocks."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from copy import copy, deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import requests
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.modular_pipelines import SequentialPipelineBlocks
from remote_vae import RemoteDecodeStep, RemoteEncodeStep, RemoteVAE

from tests.clients import pipes
from tests.clients.scripted import scripted
from tests.conftest import REPOSITORY, running
from tests.pipelines import SAMPLES
from tests.pipelines.sample import quiet
from tests.vaes import LocalVae

HALF_LEVEL = 0.51 / 127.5


def remote(url: str, name: str = "sd", **options: Any) -> RemoteVAE:
    return RemoteVAE(url + name, **options)


def stable_diffusion(vae: Any) -> tuple[Any, dict[str, Any]]:
    """The pipeline of tests/pipelines with another VAE, and the inputs of its call."""
    case = pipes.whole("stable-diffusion")
    pipe = copy(case.pipe)
    pipe.vae = vae
    return pipe, case.inputs


def test_it_moves_like_a_module_and_gives_its_result_where_the_latents_are(url: str, vaes: dict[str, LocalVae]) -> None:
    vae = remote(url)
    latents = vaes["sd"].latents(6, 8)
    assert (vae.to(torch.bfloat16).dtype, vae.to("meta").device.type) == (torch.bfloat16, "meta")
    assert vae.half().dtype is torch.float16
    assert not sum(each.numel() for each in vae.parameters())
    assert vae.decode(latents).sample.dtype is torch.float32
    for dtype in (torch.bfloat16, torch.float16):  # float16 holds every level, and bfloat16 does not
        sample = vae.decode(latents.to(dtype)).sample
        assert sample.dtype is torch.float16
        expected = vaes["sd"].decode(latents.to(dtype)).clamp(-1, 1)
        torch.testing.assert_close(sample.float(), expected, atol=1.5 / 127.5, rtol=0)


@pytest.mark.parametrize("receive", ["uint8", "float16", "float32"])
def test_it_receives_what_was_asked_for(url: str, vaes: dict[str, LocalVae], receive: str) -> None:
    latents = 4 * vaes["sd"].latents(6, 8)
    expected = vaes["sd"].decode(latents)
    assert expected.abs().max() > 1
    sample = remote(url, receive=receive).decode(latents).sample
    if receive == "uint8":
        torch.testing.assert_close(sample, expected.clamp(-1, 1), atol=HALF_LEVEL, rtol=0)
    else:
        torch.testing.assert_close(sample, expected, atol=1e-4 if receive == "float32" else 2e-3, rtol=0)
    with pytest.raises(ValueError, match="receive must be uint8, float16 or float32, not 'png'"):
        remote(url, receive="png")


def test_views_are_sent_as_they_look(url: str, vaes: dict[str, LocalVae]) -> None:
    latents = vaes["sd"].latents(8, 8).mT
    assert not latents.is_contiguous()
    sample = remote(url).decode(latents).sample
    torch.testing.assert_close(sample, vaes["sd"].decode(latents).clamp(-1, 1), atol=HALF_LEVEL, rtol=0)


def test_the_ways_to_call_and_to_read_the_result(url: str, vaes: dict[str, LocalVae]) -> None:
    vae, latents = remote(url), vaes["sd"].latents(6, 8)
    sample = vae.decode(latents).sample
    for other in (vae.decode(latents)[0], *vae.decode(latents, return_dict=False), *vae.decode(latents, False)):
        assert torch.equal(other, sample)
    encoded = vae.encode(sample)
    assert torch.equal(vae.encode(sample, return_dict=False)[0].mean, encoded.latent_dist.mode())
    assert torch.equal(vae._encode(sample), encoded.latent_dist.parameters)
    assert torch.equal(vae(sample).sample, vae.decode(encoded.latent_dist.mode()).sample)


def test_the_posterior_is_the_local_one(url: str, vaes: dict[str, LocalVae]) -> None:
    local = vaes["sd"]
    pixels = local.decode(local.latents(6, 8, batch=2)).clamp(-1, 1)
    with torch.no_grad():
        expected = local.module.encode(pixels).latent_dist
    found = remote(url).encode(pixels).latent_dist
    for name in ("mean", "logvar", "std", "var"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-4, rtol=1e-4)

    def seeded(*seeds: int) -> Any:
        made = [torch.Generator().manual_seed(seed) for seed in seeds]
        return made if len(made) > 1 else made[0]

    for seeds in ((5,), (5, 6)):
        torch.testing.assert_close(found.sample(seeded(*seeds)), expected.sample(seeded(*seeds)), atol=1e-4, rtol=1e-4)
    torch.manual_seed(7)
    drawn = expected.sample()
    torch.manual_seed(7)
    torch.testing.assert_close(found.sample(), drawn, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("query", ["sample=True&seed=1", "do_scaling=True", "scaling_factor=2"])
def test_the_server_refuses_a_posterior_that_is_sampled_or_scaled(url: str, query: str) -> None:
    about = "shape=[1,3,8,8]&dtype=float32&posterior=True"
    answer = requests.post(f"{url}sd/encode?{about}&{query}", bytes(4 * 3 * 64), timeout=300)
    assert answer.status_code == 400
    assert "posterior=True returns the distribution before sampling and scaling" in answer.json()["error"]


def test_more_latents_than_the_server_takes_at_once_are_sent_in_parts(url: str, vaes: dict[str, LocalVae]) -> None:
    with scripted(url) as (script, address):
        vae, latents = remote(address), vaes["sd"].latents(6, 8, batch=6)
        assert vae._entry["limits"]["max_batch"] == 4
        expected = vaes["sd"].decode(latents).clamp(-1, 1)
        sample = vae.decode(latents).sample
        torch.testing.assert_close(sample, expected, atol=HALF_LEVEL, rtol=0)
        assert len(script.posts) == 2
        with torch.no_grad():
            mode = vaes["sd"].module.encode(sample).latent_dist.mode()
        torch.testing.assert_close(vae.encode(sample).latent_dist.mode(), mode, atol=1e-4, rtol=1e-4)
        assert len(script.posts) == 4


def test_two_videos_are_sent_one_by_one(url: str, vaes: dict[str, LocalVae]) -> None:
    latents = vaes["hunyuan"].latents(2, 4, 6, batch=2)
    found = remote(url, "hunyuan").decode(latents).sample
    assert found.shape == (2, 3, 5, 32, 48)
    torch.testing.assert_close(found, vaes["hunyuan"].decode(latents).clamp(-1, 1), atol=0.02, rtol=0)


def test_without_a_name_it_is_the_default_model(url: str) -> None:
    assert RemoteVAE(url)._entry["name"] == "sd"
    assert RemoteVAE(url, model="FLUX")._entry["name"] == "flux"
    assert RemoteVAE(url + "sd-v1/")._entry["name"] == "sd"  # an alias


def test_parameters_of_the_address_are_sent_with_every_request(url: str, vaes: dict[str, LocalVae]) -> None:
    latents = vaes["sd"].latents(6, 8)
    sample = RemoteVAE(f"{url}sd?scaling_factor=0.5").decode(latents).sample
    torch.testing.assert_close(sample, vaes["sd"].decode(latents / 0.5).clamp(-1, 1), atol=HALF_LEVEL, rtol=0)


def test_decodes_run_side_by_side(url: str, vaes: dict[str, LocalVae]) -> None:
    vae = remote(url)

    async def all_of_them() -> list[torch.Tensor]:
        latents = [vaes["sd"].latents(6, 8, seed=seed) for seed in range(4)]
        decoded = await asyncio.gather(*(vae.adecode(each) for each in latents))
        encoded = await asyncio.gather(*(vae.aencode(each.sample) for each in decoded))
        return [each.latent_dist.mode() for each in encoded]

    for seed, found in enumerate(asyncio.run(all_of_them())):
        sample = vae.decode(vaes["sd"].latents(6, 8, seed=seed)).sample
        torch.testing.assert_close(found, vae.encode(sample).latent_dist.mode(), atol=1e-4, rtol=1e-4)


def test_switches_have_no_effect_and_a_gradient_is_refused(url: str, vaes: dict[str, LocalVae]) -> None:
    vae, latents = remote(url).eval().requires_grad_(False), vaes["sd"].latents(6, 8)
    before = vae.decode(latents).sample
    vae.enable_tiling(tile_sample_min_height=8)
    vae.enable_slicing()
    vae.fuse_qkv_projections()
    assert torch.equal(vae.decode(latents).sample, before)
    with pytest.raises(ValueError, match="a remote VAE has no gradient"):
        vae.decode(latents.requires_grad_())
    with torch.no_grad():
        vae.decode(latents)
    with pytest.raises(ValueError, match="cannot take image, mask"):
        vae.decode(latents.detach(), image=latents, mask=latents)


def test_an_error_in_the_progress_function_ends_the_decode(url: str, vaes: dict[str, LocalVae]) -> None:
    def stop(stage: str, done: float, total: float | None) -> None:
        if stage == "send":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        remote(url, progress=stop).decode(vaes["sd"].latents(6, 8))


def test_a_copy_decodes_too(url: str, vaes: dict[str, LocalVae]) -> None:
    vae, latents = remote(url), vaes["sd"].latents(6, 8)
    assert torch.equal(deepcopy(vae).decode(latents).sample, vae.decode(latents).sample)


def test_a_pipeline_that_offloads_its_models_makes_the_same(tmp_path: Path, one_core: None) -> None:
    """accelerate's hook also moves the model before the VAE away from the device."""
    case = pipes.whole("stable-diffusion")
    with running(pipes.with_vaes(tmp_path, {"sd": case.vae})) as address:
        pipe, inputs = stable_diffusion(remote(address))
        pipe.unet = deepcopy(pipe.unet)
        expected = pipes.run(case.pipe, **inputs)
        with quiet():
            pipe.enable_model_cpu_offload(device="cpu")
        pipes.assert_same(pipes.run(pipe, **inputs), expected)
        hook = pipe.vae._hf_hook
        with patch.object(hook, "pre_forward", wraps=hook.pre_forward) as called:
            pipe.vae.decode(torch.zeros(1, 4, 8, 8))
        called.assert_called_once()


def test_it_decodes_with_its_weights_offloaded_one_by_one(url: str, vaes: dict[str, LocalVae]) -> None:
    """As `enable_sequential_cpu_offload` does."""
    vae, latents = remote(url), vaes["sd"].latents(6, 8)
    expected = vae.decode(latents).sample
    cpu_offload(vae, torch.device("cpu"), offload_buffers=True)
    assert torch.equal(vae.decode(latents).sample, expected)


def test_from_pretrained_takes_it_and_the_pipeline_can_be_saved(tmp_path: Path, one_core: None) -> None:
    case = pipes.whole("stable-diffusion")
    with running(pipes.with_vaes(tmp_path / "served", {"sd": case.vae})) as address:
        vae = remote(address)
        pipe, inputs = stable_diffusion(vae)
        with pytest.warns(UserWarning, match="a RemoteVAE is not saved"), quiet():
            pipe.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved" / "vae").exists()
        absent = dict.fromkeys(["feature_extractor", "image_encoder", "safety_checker", "text_encoder", "tokenizer"])
        with quiet():
            loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", vae=vae, **absent)
        loaded.set_progress_bar_config(disable=True)
        assert loaded.vae is vae
        assert isinstance(vae, AutoencoderKL)
        pipes.assert_same(pipes.run(loaded.to("cpu"), **inputs), pipes.run(case.pipe, **inputs))


def run_step(step: Any, vae: RemoteVAE, **inputs: Any) -> Any:
    with quiet():
        pipe = SequentialPipelineBlocks.from_blocks_dict({"step": step}).init_pipeline()
        pipe.update_components(vae=vae)
        return pipe(**inputs)


@pytest.mark.parametrize("name", ["stable-diffusion", "flux", "flux2", "qwen-image", "wan", "ltx", "cogvideox-1.5"])
def test_the_decode_step_takes_the_latents_as_the_pipeline_holds_them(
    tmp_path: Path, one_core: None, name: str
) -> None:
    sample = SAMPLES[name]()
    inputs = {"latents": sample.latents, "height": sample.height, "width": sample.width}
    if sample.pixels.ndim == 5:
        inputs["num_frames"] = sample.num_frames
    with running(pipes.with_vaes(tmp_path, {name: sample.vae})) as address:
        vae = remote(address, name)
        kind = "videos" if sample.pixels.ndim == 5 else "images"
        for output_type in ("pil", "pt", "np"):
            state = run_step(RemoteDecodeStep(), vae, **inputs, output_type=output_type)
            made = state.get(kind)
            assert state.get({"videos": "images", "images": "videos"}[kind]) is None
            if output_type == "pt":
                assert made.shape == sample.pixels.shape
                made = made.movedim(-3, -1)
            pipes.assert_same(pipes.levels(made), pipes.levels(sample.pixels.movedim(-3, -1)))


def test_the_encode_step_gives_scaled_latents(tmp_path: Path, one_core: None) -> None:
    sample = SAMPLES["flux"]()
    vae = sample.vae
    picture = pipes.whole("flux").pipe.image_processor.postprocess(2 * sample.pixels - 1)
    with running(pipes.with_vaes(tmp_path, {"flux": vae})) as address:
        found = run_step(RemoteEncodeStep(), remote(address, "flux"), image=picture, output="image_latents")
    pixels = torch.round(255 * sample.pixels) / 255 * 2 - 1
    with torch.no_grad():
        mode = vae.encode(pixels).latent_dist.mode()
    expected = (mode - vae.config.shift_factor) * vae.config.scaling_factor
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_pip_installs_it(url: str, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "clients" / "remote_vae", tmp_path / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", tmp_path / "installed", tmp_path / "source"], check=True)
    program = f"""
import sys, torch, remote_vae
assert "installed" in remote_vae.__file__
sys.modules["diffusers"] = None
print(remote_vae.RemoteVAE({url!r} + "sd").decode(torch.zeros(1, 4, 8, 8)).sample.shape)
"""
    environment = {"PYTHONPATH": str(tmp_path / "installed")}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "torch.Size([1, 3, 64, 64])" in ran.stdout, ran.stderr


def test_a_model_whose_config_the_server_has_not_read_yet_is_described_after_a_request(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a model of the Hub that nobody has asked for yet."""
    find, found = RemoteVAE._find, []

    def not_read_at_first(self: RemoteVAE) -> dict[str, Any]:
        entry = find(self)
        found.append(entry)
        return entry if len(found) > 1 else {key: entry[key] for key in ("name", "repo", "aliases", "limits")}

    monkeypatch.setattr(RemoteVAE, "_find", not_read_at_first)
    with scripted(url) as (script, address):
        assert remote(address).config.latent_channels == 4
        assert len(script.posts) == 1
