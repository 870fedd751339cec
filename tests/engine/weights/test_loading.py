"""Where weights come from: local folders, a hub cache with no network, and every way in which that fails."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from copy import deepcopy as copy_module
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from server.config import ModelEntry, load_settings
from server.engine.coders.build import build_coder
from server.engine.kernels.cpu import preferred_cpu_dtype
from server.engine.models import LoadedModels
from server.engine.weights import defaults, hub, loading, placement
from server.engine.weights.config_json import read_info
from server.engine.weights.defaults import whole_config
from server.engine.weights.hub import Source
from server.engine.weights.placement import choose_precision
from server.engine.weights.stored import OTHER_PARTS
from server.errors import ModelUnavailable
from server.families import FAMILIES
from server.model_info import Direction
from server.values import Layout
from tests.conftest import write_models_yaml
from tests.pipelines import vaes as vaes_of_families
from tests.vaes import LocalVae

CPU = torch.device("cpu")


def source(repo: str | Path, **keys: Any) -> Source:
    entry = ModelEntry(repo=str(repo), **keys)
    return Source("m", entry, entry.local_path(Path("/")))


def detail(call: Callable[[], object]) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        call()
    assert "\n" not in caught.value.detail
    assert "log says why" in str(caught.value), "clients must not read paths"
    return caught.value.detail


@pytest.fixture
def copy(vaes: dict[str, LocalVae], tmp_path: Path) -> Path:
    return Path(shutil.copytree(vaes["sd"].folder, tmp_path / "copy"))


def load(found: Source, dtype: torch.dtype = torch.float32, direction: Direction = Direction.DECODE) -> torch.nn.Module:
    return loading.load_vae(read_info(found), found, dtype, direction)


@pytest.mark.parametrize("direction", Direction)
def test_a_local_folder_loads_the_same_weights_of_one_direction(
    vaes: dict[str, LocalVae], direction: Direction
) -> None:
    loaded = load(source(vaes["sd"].folder), direction=direction).state_dict()
    for key, value in vaes["sd"].module.state_dict().items():
        is_other = key.split(".")[0] in OTHER_PARTS[direction]
        assert loaded[key].is_meta if is_other else torch.equal(loaded[key], value), key


def test_a_subfolder_is_found(copy: Path) -> None:
    assert load(source(copy.parent, subfolder="copy"))


def hub_cache(home: Path, repo: str, folder: Path, subfolder: str = "") -> None:
    """The layout that huggingface_hub gives its cache."""
    root = home / ("models--" + repo.replace("/", "--"))
    shutil.copytree(folder, root / "snapshots" / ("0" * 40) / subfolder)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What HF_HUB_OFFLINE=1 and HF_HOME do at import, for this process."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_an_offline_hub_cache_loads(vaes: dict[str, LocalVae], offline: Path) -> None:
    hub_cache(offline, "owner/name", vaes["flux"].folder, "vae")
    found = source("owner/name", subfolder="vae", family="flux")
    assert found.is_here()
    assert read_info(found).latents.shift_factor == 0.1159
    assert load(found)


def test_offline_and_not_in_the_cache(offline: Path) -> None:
    said = detail(lambda: read_info(source("owner/name")))
    assert "not in this machine's cache and HF_HUB_OFFLINE is set; run `python -m server download m`" in said


def test_only_pickle_weights_in_a_folder(copy: Path) -> None:
    (copy / "diffusion_pytorch_model.safetensors").rename(copy / "diffusion_pytorch_model.bin")
    said = detail(source(copy).files)
    assert "only pickle weights (diffusion_pytorch_model.bin)" in said
    assert "a pickle file can run code" in said


def test_only_pickle_weights_on_the_hub(copy: Path, offline: Path) -> None:
    (copy / "diffusion_pytorch_model.safetensors").rename(copy / "diffusion_pytorch_model.bin")
    hub_cache(offline, "owner/pickles", copy)
    assert "only pickle weights" in detail(source("owner/pickles").files)


def test_no_weights_at_all(copy: Path) -> None:
    (copy / "diffusion_pytorch_model.safetensors").unlink()
    assert "has no diffusion_pytorch_model.safetensors" in detail(source(copy).files)


def test_a_missing_folder_and_a_missing_subfolder(copy: Path) -> None:
    assert "there is no such file or folder" in detail(lambda: read_info(source(copy / "x")))
    assert "has the subfolder copy; set subfolder" in detail(lambda: read_info(source(copy.parent)))


@pytest.mark.parametrize("class_name", ["UNet2DConditionModel", "AutoencoderOfTomorrow"])
def test_a_class_that_is_no_vae_of_this_diffusers_is_refused(copy: Path, class_name: str) -> None:
    change(copy, _class_name=class_name)
    assert f"has no VAE class {class_name}" in detail(lambda: read_info(source(copy)))


def test_a_well_known_model_without_its_class_is_said_to_lack_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, offline: Path
) -> None:
    """As an older diffusers lacks the newer classes; the other models are served all the same."""
    exported = defaults._exported() - {"AutoencoderKLWan"}
    monkeypatch.setattr(defaults, "_exported", lambda: exported)
    settings = load_settings()
    engine = LoadedModels(settings)
    with pytest.raises(ModelUnavailable):
        engine.describe("wan", is_local_only=True)
    assert "this diffusers" in caplog.text
    assert "has no VAE class AutoencoderKLWan" in caplog.text
    assert engine.describe("sd-xl", is_local_only=True).class_name == "AutoencoderKL"


def test_a_config_that_is_not_a_vaes(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    assert "config.json cannot be read" in detail(lambda: read_info(source(copy)))
    (copy / "config.json").write_text("[1]")
    assert "names no _class_name" in detail(lambda: read_info(source(copy)))


def test_a_family_that_is_unknown_or_does_not_fit(copy: Path) -> None:
    assert "unknown family 'sd'; known: kl, flux, flux2" in detail(lambda: read_info(source(copy, family="sd")))
    said = detail(lambda: read_info(source(copy, family="hunyuan_video")))
    assert "'hunyuan_video' does not fit a AutoencoderKL" in said


def test_damaged_weights(copy: Path) -> None:
    weights = copy / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "diffusion_pytorch_model.safetensors is cut short: its header needs" in detail(lambda: load(source(copy)))
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 334643276\n")
    assert "is a pointer of Git LFS, not the weights; run `git lfs pull`" in detail(lambda: load(source(copy)))


def test_weights_of_another_shape(copy: Path) -> None:
    change(copy, block_out_channels=[8, 8, 8, 8])
    assert "has the shape 16x8x3x3, and its config.json asks for 8x8x3x3" in detail(lambda: load(source(copy)))


def test_weights_that_lack_a_layer(copy: Path) -> None:
    change(copy, layers_per_block=2)
    said = detail(lambda: load(source(copy)))
    assert re.search(r"the weights lack decoder\.\S+, decoder\.\S+, decoder\.\S+ and \d+ more, which its config", said)


def test_weights_that_lack_statistics_of_the_latents(tmp_path: Path) -> None:
    """diffusers would take its own, mean 0 and deviation 1, and say nothing."""
    vaes_of_families.flux2().save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop("bn.running_mean"))
    assert "the weights lack bn.running_mean" in detail(lambda: load(source(tmp_path)))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    change(weights)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("direction", Direction)
def test_a_file_of_one_direction_serves_that_direction(copy: Path, direction: Direction) -> None:
    others = OTHER_PARTS[direction]

    def remove_the_other(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if name.split(".")[0] in others]:
            del weights[name]

    change_weights(copy, remove_the_other)
    assert load(source(copy), direction=direction)
    (other,) = set(Direction) - {direction}
    assert f"has no weights to {other} with" in detail(lambda: load(source(copy), direction=other))


BAD = [
    "decoder.conv_in.weight",
    "decoder.conv_out.bias",
    "decoder.mid_block.resnets.0.conv1.bias",
    "post_quant_conv.bias",
]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_that_are_not_finite_fail_to_load_in_their_direction(
    copy: Path, dtype: torch.dtype, value: float
) -> None:
    change_weights(copy, lambda weights: [weights[name].view(-1)[:1].fill_(value) for name in BAD])
    said = detail(lambda: load(source(copy), dtype))
    assert re.search(r"the weights are NaN or infinite in \S+, \S+, \S+ and 1 more; download or save", said)
    assert set(re.findall(r"(?:decoder|post_quant_conv)\.[\w.]+\w", said)) < set(BAD)
    assert load(source(copy), dtype, Direction.ENCODE)


def test_statistics_that_are_not_finite_fail_to_load_in_both_directions(tmp_path: Path) -> None:
    vaes_of_families.flux2().save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights["bn.running_var"][3:4].fill_(torch.nan))
    for direction in Direction:
        assert "infinite in bn.running_var;" in detail(lambda: load(source(tmp_path), direction=direction))  # noqa: B023  # used up within the turn


def test_weights_that_overflow_half_precision_fail_to_load_in_it(copy: Path) -> None:
    change_weights(copy, lambda weights: weights["decoder.conv_in.weight"].view(-1)[:1].fill_(1e6))
    said = detail(lambda: load(source(copy), torch.float16))
    assert "the weights overflow float16 in decoder.conv_in.weight; set dtype: bfloat16 or float32" in said
    for dtype in (torch.bfloat16, torch.float32):
        assert load(source(copy), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("decoder", ["auto", "diffusers"])
def test_what_happens_to_the_file_after_the_load_changes_nothing(copy: Path, dtype: str, decoder: str) -> None:
    models = {"m": {"repo": str(copy), "dtype": dtype, "decoder": decoder}}
    engine = LoadedModels(load_settings(config=write_models_yaml(copy / "models.yaml", models, "m")))
    weights = copy / "diffusion_pytorch_model.safetensors"
    latents, pixels = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 16, 16)
    decode, encode = engine.load("m").coder.decode, engine.load("m", Direction.ENCODE).coder.encode
    before = decode(latents, Layout.SAMPLE).tensor, encode(pixels).tensor
    assert str(weights) not in Path("/proc/self/maps").read_text()

    with weights.open("r+b") as file:  # the same file, unlike write_bytes' new one
        file.write(bytes(weights.stat().st_size))
    after = decode(latents, Layout.SAMPLE).tensor, encode(pixels).tensor
    with weights.open("r+b") as file:
        file.truncate(10)
    decode(latents, Layout.SAMPLE)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_a_failed_load_is_one_line_of_log(copy: Path, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    change(copy, layers_per_block=2)
    detail(lambda: load(source(copy)))
    assert caplog.text == ""
    assert capfd.readouterr().err == "", "diffusers has a handler of its own"


def change(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def hub_error(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    """As huggingface_hub raises them; no hub can be asked here."""
    return kind("no", response=httpx.Response(status, request=httpx.Request("GET", "http://127.0.0.1")))


HUB_ERRORS = {
    "gated": (hub_error(errors.GatedRepoError, 403), "is gated: accept its licence at the hub's page of owner/name, then set HF_TOKEN"),
    "missing": (hub_error(errors.RepositoryNotFoundError, 404), "no such repository, or it is private"),
    "no revision": (hub_error(errors.RevisionNotFoundError, 404), "no revision 'abc'"),
    "no subfolder": (hub_error(errors.RemoteEntryNotFoundError, 404), "has no vae/config.json; check subfolder"),
    "no network": (errors.LocalEntryNotFoundError("no"), "the hub cannot be reached; check the network"),
    "disk full": (OSError(28, "No space left on device"), "cannot be stored (No space left on device)"),
    "anything else": (RuntimeError("x"), "the download failed (RuntimeError)"),
}  # fmt: skip


@pytest.mark.parametrize("case", HUB_ERRORS)
def test_a_hub_failure_is_one_sentence(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, words = HUB_ERRORS[case]

    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    monkeypatch.setattr(hub, "snapshot_download", fail)
    found = source("owner/name", subfolder="vae", revision="abc")
    assert words in detail(found.config)
    assert words in detail(found.files)


def test_a_repo_that_is_neither_a_folder_nor_a_hub_id() -> None:
    assert "neither a folder here nor a hub id" in detail(source("a/b/c").config)


def test_what_a_config_leaves_out_is_diffusers_default() -> None:
    """Old config.json files leave scaling_factor out: sd-vae-ft-mse does."""
    config = whole_config("AutoencoderKL", {"latent_channels": 16})
    assert (config["scaling_factor"], config["latent_channels"]) == (0.18215, 16)


@pytest.mark.parametrize(
    ("wanted", "is_exact", "force_upcast", "expected"),
    [
        ("auto", True, True, preferred_cpu_dtype()),
        ("auto", False, True, torch.float32),
        ("float16", True, False, torch.float16),
        ("float16", True, True, torch.float32),
        ("bfloat16", False, True, torch.bfloat16),
    ],
)
def test_the_dtype_on_a_cpu(copy: Path, wanted: str, is_exact: bool, force_upcast: bool, expected: torch.dtype) -> None:
    change(copy, force_upcast=force_upcast)
    assert choose_precision(wanted, read_info(source(copy)), CPU, is_exact=is_exact).dtype is expected


GPU = torch.device("cuda")


@pytest.mark.parametrize("wanted", ["auto", "cuda", "cuda:1"])
def test_a_gpu_has_a_number(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cuda` and `cuda:0` are the same device, but compare as different: graphs and models are looked for by it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert placement.choose_device(wanted) == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("wanted", "family", "force_upcast", "has_bf16", "expected", "allows_tf32"),
    [
        ("auto", "wan", False, True, torch.bfloat16, False),
        ("auto", "wan", False, False, torch.float32, True),
        ("auto", "allegro", False, True, torch.float32, True),
        ("auto", "kl", False, True, torch.float16, False),
        ("auto", "kl", True, True, torch.bfloat16, False),
        ("auto", "kl", True, False, torch.float32, True),
        ("float32", "wan", False, True, torch.float32, False),
    ],
)
def test_the_dtype_on_a_gpu(
    copy: Path,
    wanted: str,
    family: str,
    force_upcast: bool,
    has_bf16: bool,
    expected: torch.dtype,
    allows_tf32: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`auto` never means float32 without TensorFloat-32; a float32 that was asked for does."""
    change(copy, force_upcast=force_upcast)
    info = read_info(source(copy))
    info = replace(info, latents=replace(info.latents, family=family))
    monkeypatch.setattr(placement, "has_bfloat16", lambda _: has_bf16)
    chosen = choose_precision(wanted, info, GPU, is_exact=True)
    assert (chosen.dtype, chosen.allows_tf32) == (expected, allows_tf32)
    assert chosen.reason.endswith(".")


def test_a_dtype_that_an_old_gpu_lacks_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "has_bfloat16", lambda _: False)
    with pytest.raises(ValueError, match="dtype bfloat16: this GPU is too old to compute in it; set dtype: auto"):
        choose_precision("bfloat16", read_info(source(copy)), GPU, is_exact=True)


@pytest.mark.parametrize("name", ["sd", "hunyuan"])
@pytest.mark.parametrize(
    ("keys", "runs", "note"),
    [
        ({}, "exact", None),
        ({"decoder": "diffusers"}, "diffusers", "models.yaml asks for diffusers' own decoder"),
        ({"tiling": "diffusers"}, "diffusers", "models.yaml asks for diffusers' tiles"),
    ],
)
def test_the_decoder_is_chosen_and_says_why(
    vaes: dict[str, LocalVae], tmp_path: Path, name: str, keys: dict[str, str], runs: str, note: str | None
) -> None:
    models = {"m": {"repo": str(vaes[name].folder), "dtype": "float32", **keys}}
    engine = LoadedModels(load_settings(config=write_models_yaml(tmp_path / "models.yaml", models, "m")))
    loaded = engine.load("m")
    assert (loaded.info.decoder, loaded.info.note) == (runs, note)
    if runs == "diffusers":  # bit for bit what the library decodes, with the tiles it would take
        local = copy_module(vaes[name].module)
        if keys.get("tiling"):
            local.enable_tiling()
        latents = vaes[name].latents(*([6, 36, 36] if name == "hunyuan" else [72, 72]))
        with torch.inference_mode():
            expected = local.decode(latents, return_dict=False)[0]
            assert torch.equal(loaded.coder.decode(latents, Layout.SAMPLE).tensor, expected)


BUILDERS = {
    name: getattr(vaes_of_families, name) for name in ("mochi", "wan", "hunyuan_video_15", "cogvideox", "ltx", "dc")
}


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_diffusers_own_decoder_is_bit_identical(tmp_path: Path, name: str, frames: int) -> None:
    """As the library loads and runs it, with weights that require gradients."""
    BUILDERS[name]().save_pretrained(tmp_path / name)
    models = {"m": {"repo": str(tmp_path / name), "dtype": "float32", "decoder": "diffusers"}}
    engine = LoadedModels(load_settings(config=write_models_yaml(tmp_path / "models.yaml", models, "m")))
    loaded = engine.load("m")
    local = type(loaded.coder.vae).from_pretrained(tmp_path / name)
    size = (5, 7) if loaded.spec.kind == "image" else (frames, 5, 7)
    latents = torch.randn(1, loaded.spec.channels, *size, generator=torch.Generator().manual_seed(frames))
    with torch.no_grad():
        expected = local.decode(latents, return_dict=False)[0]
    assert torch.equal(loaded.coder.decode(latents, Layout.SAMPLE).tensor, expected)


def test_an_unknown_structure_runs_diffusers_and_says_so(vaes: dict[str, LocalVae]) -> None:
    changed = copy_module(vaes["sd"].module)
    changed.decoder.conv_act = torch.nn.GELU()
    decoder, note = build_coder(changed, FAMILIES["kl"], Direction.DECODE, "auto", "none")
    assert (decoder.name, note) == ("diffusers", "conv_act is a GELU, not SiLU.")


BAD_CONFIGS = [
    {"latent_channels": "four"},
    {"block_out_channels": []},
    {"latents_mean": [0.0, 0.0], "latents_std": [1.0, 1.0]},
    {"scaling_factor": 0},
    {"scaling_factor": "big"},
]


@pytest.mark.parametrize("keys", BAD_CONFIGS, ids=str)
def test_a_config_that_no_vae_has_is_one_sentence(copy: Path, keys: dict[str, Any]) -> None:
    change(copy, **keys)
    assert "its config.json is not one of AutoencoderKL" in detail(lambda: read_info(source(copy)))


def test_a_failing_constructor_leaves_the_other_models_alone(
    vaes: dict[str, LocalVae], copy: Path, tmp_path: Path
) -> None:
    """diffusers sets torch's default dtype while it builds a module, and a constructor that raises leaves it so."""
    change(copy, norm_num_groups=5)
    models = {
        "good": {"repo": str(vaes["flux"].folder), "dtype": "bfloat16"},
        "bad": {"repo": str(copy), "dtype": "bfloat16"},
    }
    engine = LoadedModels(load_settings(config=write_models_yaml(tmp_path / "models.yaml", models, "good")))
    good, latents = engine.load("good"), vaes["flux"].latents(8, 8)
    before = good.coder.decode(latents, Layout.SAMPLE).tensor
    detail(lambda: engine.load("bad"))
    assert torch.get_default_dtype() is torch.float32
    assert torch.equal(good.coder.decode(latents, Layout.SAMPLE).tensor, before)
