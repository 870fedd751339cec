"""The forms in which people have the weights of a VAE: the same tensors as diffusers' folder, or one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file

from server.config import ModelEntry
from server.engine.weights import loading
from server.engine.weights.agreement import vae_class
from server.engine.weights.config_json import directions_of, read_info
from server.engine.weights.hub import Source
from server.engine.weights.loading import check_weights
from server.errors import ModelUnavailable
from server.families.named import named_config
from server.model_info import Direction
from tests.engine.weights import original_names
from tests.engine.weights.test_loading import hub_cache, offline
from tests.pipelines import vaes as small

Tensors = dict[str, torch.Tensor]
Vae = torch.nn.Module
PLAIN = "diffusion_pytorch_model.safetensors"
__all__ = ["offline"]


def source(repo: Path | str, config: Path | str | None = None, **keys: Any) -> Source:
    entry = ModelEntry(repo=str(repo), config=str(config) if config else None, **keys)
    return Source("m", entry, entry.local_path(Path("/")), entry.config_path(Path("/")))


def load(found: Source, direction: Direction = Direction.DECODE, dtype: torch.dtype = torch.float32) -> Tensors:
    check_weights(found)
    return dict(loading.load_vae(read_info(found), found, dtype, direction).state_dict())


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        call()
    assert "\n" not in caught.value.detail
    return caught.value.detail


def assert_same(loaded: Tensors, vae: Vae, change: Callable[[torch.Tensor], torch.Tensor] = lambda each: each) -> None:
    """The tensors of the direction that was loaded are those of the VAE, and there are some."""
    wanted = vae.state_dict()
    here = {name: value for name, value in loaded.items() if not value.is_meta}
    assert loaded.keys() == wanted.keys()
    assert len(here) > 10
    assert [name for name, value in here.items() if not torch.equal(value, change(wanted[name]))] == []


def contiguous(tensors: Tensors) -> Tensors:
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}


@pytest.fixture
def kl(tmp_path: Path) -> Any:
    """A VAE, saved by diffusers in the folder `kl`."""
    vae = small.kl()
    vae.save_pretrained(tmp_path / "kl")
    return vae


def folder_of(tmp_path: Path, tensors: Tensors, name: str, folder: str = "form") -> Path:
    """A folder with the config.json of `kl` and one file."""
    path = tmp_path / folder
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text((tmp_path / "kl" / "config.json").read_text())
    save_file(contiguous(tensors), path / name)
    return path


ORIGINAL: dict[str, tuple[Callable[[], Any], Callable[[Tensors], Tensors]]] = {
    "kl": (small.kl, original_names.ldm),
    "kl16": (small.kl16, original_names.ldm),
    "flux2": (small.flux2, original_names.flux2),
    "wan": (lambda: small.wan(num_res_blocks=2, dim_mult=[1, 2, 4, 4]), original_names.wan),
    "wan-2.2": (small.wan_22, original_names.wan_22),
    "qwen-image": (
        lambda: small.seeded(
            diffusers.AutoencoderKLQwenImage, **small.WAN | {"num_res_blocks": 2, "dim_mult": [1, 2, 4, 4]}
        ),
        original_names.wan,
    ),
    "hunyuan-video": (small.hunyuan_video, lambda state: original_names.ldm(state, axes=3)),
    "hunyuan-video-1.5": (small.hunyuan_video_15, original_names.hunyuan_video_15),
    "hunyuan-image": (small.hunyuan_image, original_names.hunyuan_image),
    "ltx": (small.ltx, original_names.ltx),
    "ltx-2": (small.ltx2, original_names.ltx2),
    "dc": (small.dc, original_names.dc),
}


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize("name", ORIGINAL)
def test_a_file_with_original_names_gives_the_same_tensors(name: str, prefix: str, tmp_path: Path) -> None:
    """By itself, and in a whole checkpoint of which the rest is not read."""
    make, rename = ORIGINAL[name]
    vae = make()
    vae.save_config(tmp_path / "config")
    original = rename(vae.state_dict())
    assert original.keys() != vae.state_dict().keys()
    whole = {prefix + key: value for key, value in original.items()}
    others = {"model.diffusion_model.out.weight": torch.zeros(2)} if prefix else {}
    save_file(contiguous(whole | others), tmp_path / "model.safetensors")
    found = source(tmp_path / "model.safetensors", tmp_path / "config")
    for direction in Direction:
        assert_same(load(found, direction), vae)


@pytest.mark.parametrize("name", ORIGINAL)
@pytest.mark.parametrize("direction", Direction)
def test_half_of_a_file_with_original_names_serves_one_direction(
    name: str, direction: Direction, tmp_path: Path
) -> None:
    make, rename = ORIGINAL[name]
    vae = make()
    vae.save_config(tmp_path / "config")
    own = {Direction.DECODE: "encoder.", Direction.ENCODE: "decoder."}[direction]
    kept = {key: value for key, value in rename(vae.state_dict()).items() if not key.startswith(own)}
    save_file(contiguous(kept), tmp_path / "half.safetensors")
    found = source(tmp_path / "half.safetensors", tmp_path / "config")
    assert check_weights(found) == directions_of(found) == (direction,)
    assert_same(load(found, direction), vae)
    (other,) = set(Direction) - {direction}
    said = refused(lambda: loading.load_vae(read_info(found), found, torch.float32, other))
    assert f"half.safetensors has no weights to {other} with" in said


def test_both_files_of_taesd_and_each_by_itself(tmp_path: Path) -> None:
    vae = small.tiny()
    vae.save_config(tmp_path / "config")
    folder = tmp_path / "weights"
    folder.mkdir()
    files = {Direction.ENCODE: original_names.taesd_encoder, Direction.DECODE: original_names.taesd_decoder}
    for direction, rename in files.items():
        file = folder / f"taesd_{'encoder' if direction is Direction.ENCODE else 'decoder'}.safetensors"
        save_file(contiguous(rename(vae.state_dict())), file)
        alone = source(file, tmp_path / "config")
        assert check_weights(alone) == (direction,)
        assert_same(load(alone, direction), vae)


FILES: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "the variant fp16": ("diffusion_pytorch_model.fp16.safetensors", lambda state: state),
    "the variant bf16 of transformers": ("model.bf16.safetensors", lambda state: state),
    "transformers' name": ("model.safetensors", lambda state: state),
    "another name": ("vae-ft-mse-840000-ema-pruned.safetensors", original_names.ldm),
    "diffusers' name, original names": (PLAIN, original_names.ldm),
    "extra tensors": (PLAIN, lambda state: state | {"model_ema.decay": torch.zeros(()), "loss.logvar": torch.zeros(1)}),
}


@pytest.mark.parametrize("case", FILES)
def test_a_folder_with_one_file_of_any_name(case: str, kl: Any, tmp_path: Path) -> None:
    name, rename = FILES[case]
    folder = folder_of(tmp_path, rename(kl.state_dict()), name)
    for found in (source(folder), source(folder / name)):
        assert_same(load(found), kl)
        assert_same(load(found, Direction.ENCODE), kl)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_weights_that_are_stored_in_less_than_float32(dtype: torch.dtype, kl: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {name: value.to(dtype) for name, value in kl.state_dict().items()}, PLAIN)
    assert_same(load(source(folder)), kl, lambda each: each.to(dtype).float())


def test_the_file_in_float32_is_preferred_to_its_variant(kl: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, kl.state_dict(), PLAIN)
    save_file({"x": torch.zeros(1)}, folder / "diffusion_pytorch_model.fp16.safetensors")
    assert_same(load(source(folder)), kl)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("has_index", [True, False])
def test_shards_with_and_without_an_index(variant: str | None, has_index: bool, kl: Any, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    kl.save_pretrained(folder, max_shard_size="60KB", variant=variant)
    assert len(list(folder.glob("*-of-*"))) > 1
    if not has_index:
        next(folder.glob("*.index*.json")).unlink()
    assert_same(load(source(folder)), kl)
    assert_same(load(source(sorted(folder.glob("*-of-*"))[1]), Direction.ENCODE), kl)


def test_a_variant_in_the_hub_cache(kl: Any, tmp_path: Path, offline: Path) -> None:
    folder = folder_of(tmp_path, kl.state_dict(), "diffusion_pytorch_model.fp16.safetensors")
    hub_cache(offline, "owner/half", folder, "vae")
    assert source("owner/half", subfolder="vae").is_here()
    assert_same(load(source("owner/half", subfolder="vae")), kl)
    assert_same(load(source("owner/half")), kl)  # a pipeline's VAE is in the subfolder vae


def test_a_file_without_a_config_in_the_hub_cache(kl: Any, tmp_path: Path, offline: Path) -> None:
    folder = folder_of(tmp_path, original_names.ldm(kl.state_dict()), "ae.safetensors")
    (folder / "config.json").unlink()
    hub_cache(offline, "owner/original", folder, "split_files/vae")
    found = source("owner/original", tmp_path / "kl", subfolder="split_files/vae")
    assert_same(load(found), kl)


def test_a_pipelines_folder_serves_its_vae(kl: Any, tmp_path: Path) -> None:
    kl.save_pretrained(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert_same(load(source(tmp_path / "pipeline")), kl)


def test_the_attention_names_of_old_files(kl: Any, tmp_path: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, value in kl.state_dict().items():
        renamed = next((key.replace(new, name) for new, name in old.items() if f"attentions.0.{new}." in key), key)
        tensors[renamed] = value
    assert_same(load(source(folder_of(tmp_path, tensors, PLAIN))), kl)


def test_a_config_in_the_metadata_of_a_file(kl: Any, tmp_path: Path) -> None:
    config = (tmp_path / "kl" / "config.json").read_text()
    save_file(contiguous(kl.state_dict()), tmp_path / "told.safetensors", metadata={"config": config})
    assert_same(load(source(tmp_path / "told.safetensors")), kl)


def full_size(
    path: Path,
    name: str,
    rename: Callable[[Tensors], Tensors],
    extra: Sequence[str] = (),
    **metadata: str,
) -> Path:
    """A file with the header of a well-known VAE in its real size, whose values are a hole in the file."""
    named = named_config(name)
    assert named is not None
    with init_empty_weights():
        vae = vae_class(named.config["_class_name"]).from_config(dict(named.config))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for key, tensor in (rename(vae.state_dict()) | {key: torch.zeros(1) for key in extra}).items():
        start, end = end, end + tensor.numel() * 4
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + end)
    return path


def wan_22(state: Tensors) -> Tensors:
    return original_names.wan_22(state, layers_per_block=2)


ALIKE = {
    "sd": (original_names.ldm, "sd-v1 or sd-xl"),
    "flux": (original_names.ldm, "sd3 or flux"),
    "wan": (original_names.wan, "qwen-image or wan"),
    "cogvideox": (lambda state: state, "cogvideox-2b or cogvideox"),
    "flux-2": (original_names.flux2, "flux-2 or ernie-image or ideogram-4"),
    "wan-2.2": (lambda state: wan_22(state), "fibo or wan-2.2"),
    "ltx-2": (original_names.ltx2, "ltx-2 or sana-video-720p"),
}


@pytest.mark.parametrize("name", ALIKE)
def test_a_file_that_may_be_of_several_models_is_refused_with_their_names(name: str, tmp_path: Path) -> None:
    rename, names = ALIKE[name]
    file = full_size(tmp_path / "vae.safetensors", name, rename)
    said = refused(lambda: read_info(source(file)))
    assert f"may be the VAE of {names}: " in said
    assert said.endswith(f"set config, or --vae-config, to {names}")


def test_the_name_of_a_configuration_decides(tmp_path: Path) -> None:
    file = full_size(tmp_path / "vae.safetensors", "sd", original_names.ldm)
    scaling = {name: read_info(source(file, name)).latents.scaling_factor for name in ("sd", "sdxl", "SDXL")}
    assert scaling == {"sd": 0.18215, "sdxl": 0.13025, "SDXL": 0.13025}
    assert check_weights(source(file, "sdxl")) == tuple(Direction)
    said = refused(lambda: check_weights(source(file, "flux")))
    assert re.search(r"has the shape \S+, and config: flux asks for \S+; do both belong to the same model", said)
    assert "there is no configuration 'sdx'; known: sd-v1, sd-xl, sd3" in refused(
        lambda: read_info(source(file, "sdx"))
    )


DECIDED: dict[str, Callable[[Tensors], Tensors]] = {
    "hunyuan-video": lambda state: original_names.ldm(state, axes=3),
    "hunyuan-video-1.5": original_names.hunyuan_video_15,
    "hunyuan-image": lambda state: original_names.hunyuan_image(state, layers_per_block=2),
    "ltx-video": original_names.ltx,
    "ltx-video-0.9.5": original_names.ltx_095,
    "sana": original_names.dc,
    "taesd": original_names.taesd_decoder,
    "taef1": original_names.taesd_encoder,
}


@pytest.mark.parametrize("name", DECIDED)
def test_tensors_that_only_one_model_has_need_no_name(name: str, tmp_path: Path) -> None:
    """In the real size of each model: two that are used alike count as one."""
    found = source(full_size(tmp_path / "vae.safetensors", name, DECIDED[name]))
    named = named_config(name)
    assert named is not None
    info = read_info(found)
    assert info.class_name == named.config["_class_name"]
    assert info.latents == read_info(source(found.entry.repo, name)).latents
    assert check_weights(found)


@pytest.mark.parametrize(
    ("extra", "metadata", "scaling"),
    [
        (["conditioner.embedders.0.x"], {}, 0.13025),
        (["cond_stage_model.transformer.x"], {}, 0.18215),
        ([], {"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"}, 0.13025),
        ([], {"modelspec.architecture": "stable-diffusion-v1/vae"}, 0.18215),
    ],
)
def test_what_a_checkpoint_says_of_itself_decides(
    extra: list[str], metadata: dict[str, str], scaling: float, tmp_path: Path
) -> None:
    def rename(state: Tensors) -> Tensors:
        return {f"first_stage_model.{name}": value for name, value in original_names.ldm(state).items()}

    file = full_size(tmp_path / "checkpoint.safetensors", "sd", rename, extra, **metadata)
    assert read_info(source(file)).latents.scaling_factor == scaling


def test_a_checkpoint_that_scales_in_its_own_way_is_refused(tmp_path: Path) -> None:
    def rename(state: Tensors) -> Tensors:
        return {f"first_stage_model.{name}": value for name, value in original_names.ldm(state).items()}

    extra = ["conditioner.embedders.0.x", "edm_mean"]
    file = full_size(tmp_path / "playground.safetensors", "sd", rename, extra)
    assert "playground.safetensors scales its latents in its own way" in refused(lambda: read_info(source(file)))


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 334643276\n"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pointer of Git LFS": (
        lambda file: file.write_text(LFS),
        "is a pointer of Git LFS, not the weights; run `git lfs",
    ),
    "a cut header": (lambda file: file.write_bytes(file.read_bytes()[:100]), "is cut short: its header needs"),
    "cut tensors": (lambda file: file.write_bytes(file.read_bytes()[:-4]), "is cut short: it should have"),
    "empty": (lambda file: file.write_bytes(b""), "is empty; download it again"),
    "torch.save": (lambda file: torch.save({"x": torch.zeros(1)}, file), "is a pickle file of torch.save"),
    "an old pickle": (lambda file: file.write_bytes(b"\x80\x02}q\x00."), "is a pickle file, whatever its name says"),
    "a web page": (lambda file: file.write_text("<!doctype html><p>404</p>"), "is a web page"),
    "GGUF": (lambda file: file.write_bytes(b"GGUF\x03" + bytes(20)), "is a GGUF file"),
    "noise": (lambda file: file.write_bytes(b"noisenoisenoise"), "is not a safetensors file"),
    "a damaged header": (
        lambda file: file.write_bytes(file.read_bytes()[:8] + b"{" + b"x" * 30000),
        "has a damaged header",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_by_check_and_by_the_load(case: str, kl: Any, tmp_path: Path) -> None:
    damage, words = BROKEN[case]
    damage(tmp_path / "kl" / PLAIN)
    found = source(tmp_path / "kl")
    assert f"{PLAIN} {words}" in refused(lambda: check_weights(found))
    assert f"{PLAIN} {words}" in refused(
        lambda: loading.load_vae(read_info(found), found, torch.float32, Direction.DECODE)
    )


def test_files_that_are_missing_or_several(kl: Any, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    kl.save_pretrained(folder, max_shard_size="60KB")
    sorted(folder.glob("*-of-*"))[1].unlink()
    assert "diffusion_pytorch_model-00002-of-0000" in (said := refused(source(folder).files))
    assert "is missing, one of the" in said
    for shard in folder.glob("*-of-*"):
        shard.unlink()
    assert "and none of the files that it lists" in refused(source(folder).files)
    (folder / f"{PLAIN}.incomplete").touch()
    (folder / f"{PLAIN}.index.json").unlink()
    assert f"the download of {PLAIN}.incomplete was not finished" in refused(source(folder).files)
    several = folder_of(tmp_path, kl.state_dict(), "a.safetensors")
    folder_of(tmp_path, kl.state_dict(), "b.safetensors")
    assert "several files of weights (a.safetensors, b.safetensors); give the path" in refused(source(several).files)
    assert_same(load(source(several / "b.safetensors")), kl)
    assert_same(load(source(several, file="b.safetensors")), kl)
    assert "there is no such file or folder" in refused(source(several, file="c.safetensors").files)


def test_an_index_that_does_not_fit_its_shards(kl: Any, tmp_path: Path) -> None:
    kl.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    index = next((tmp_path / "shards").glob("*.index.json"))
    told = json.loads(index.read_text())
    told["weight_map"]["decoder.new.weight"] = sorted(set(told["weight_map"].values()))[0]
    index.write_text(json.dumps(told))
    assert "says that decoder.new.weight is in" in refused(lambda: check_weights(source(tmp_path / "shards")))


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.pth", "model.bin"])
def test_a_pickle_by_its_name(name: str, tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / name)
    assert f"{name} is a pickle file by its name" in refused(source(tmp_path / name, "sd").files)
    assert f"only pickle weights ({name})" in refused(source(tmp_path, "sd").files)


OTHERS = {
    "model.diffusion_model.input_blocks.0.0.weight": "a diffusion model without its VAE",
    "lora_unet_down_blocks_0.lora_up.weight": "a LoRA",
    "text_model.encoder.layers.0.mlp.fc1.weight": "a text encoder",
}


@pytest.mark.parametrize("key", OTHERS)
def test_files_of_something_else_are_told_what_they_are(key: str, kl: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {key: torch.zeros(2)}, "thing.safetensors")
    assert f"thing.safetensors is {OTHERS[key]} ({key})" in refused(lambda: check_weights(source(folder)))
    (folder / "config.json").unlink()
    assert f"thing.safetensors is {OTHERS[key]} ({key})" in refused(lambda: read_info(source(folder)))


def test_tensors_of_another_architecture(kl: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, original_names.wan_22(small.wan_22().state_dict()), PLAIN)
    said = refused(lambda: check_weights(source(folder)))
    assert "are of another architecture than AutoencoderKL, which its config.json names" in said


def test_a_config_of_a_smaller_model_is_not_used_for_a_larger_one(kl: Any, tmp_path: Path) -> None:
    """Its tensors would all be there."""
    small.kl(layers_per_block=2).save_pretrained(tmp_path / "larger")
    said = refused(lambda: check_weights(source(tmp_path / "larger", tmp_path / "kl")))
    assert re.search(rf"{PLAIN} has \S+resnets\S+, .* which the file that config names does not know", said)


def test_quantized_weights_are_refused(kl: Any, tmp_path: Path) -> None:
    state = {name: value.to(torch.float8_e4m3fn) for name, value in kl.state_dict().items()}
    scaled = folder_of(tmp_path, state | {"decoder.conv_in.scale_weight": torch.ones(1)}, PLAIN)
    said = refused(lambda: check_weights(source(scaled)))
    assert "has scaled fp8 weights (decoder.conv_in.scale_weight)" in said
    whole = {name: value.to(torch.int8) for name, value in kl.state_dict().items()}
    said = refused(lambda: check_weights(source(folder_of(tmp_path, whole, PLAIN, "int8"))))
    assert "as I8, which is quantized" in said


def test_a_config_without_a_class_says_what_to_add(kl: Any, tmp_path: Path) -> None:
    config = json.loads((tmp_path / "kl" / "config.json").read_text())
    del config["_class_name"]
    (tmp_path / "kl" / "config.json").write_text(json.dumps(config))
    assert 'add its class, such as "_class_name": "AutoencoderKL"' in refused(
        lambda: read_info(source(tmp_path / "kl"))
    )
