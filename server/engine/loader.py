"""A models.yaml entry to a VAE on its device: find the folder, read config.json, load safetensors. Never a pickle."""

from __future__ import annotations

import inspect
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import errors as hub
from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from safetensors import SafetensorError, safe_open

from server.config import ModelEntry, Settings
from server.engine.exact import preferred_cpu_dtype
from server.errors import ModelUnavailable
from server.families import FAMILIES, Family, family_of_class, plain_family
from server.families.known import known
from server.types import LatentSpec, Limits, ModelInfo, Operation, Weights

log = logging.getLogger(__name__)

CONFIG = "config.json"
WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model-*-of-*.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
OTHER_HALF = {
    Operation.DECODE: ("encoder", "quant_conv"),
    Operation.ENCODE: ("decoder", "post_quant_conv"),
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LFS_POINTER = b"version https://git-lfs"
NAMES_SHOWN = 3
SAFE_ONLY = "only safetensors weights are ever loaded, because a pickle file can run code"


class Source:
    """Where one model's files are: a local folder, or a hub repository and this machine's cache of it.

    Every failure is a ModelUnavailable whose `detail` is one sentence for the operator.
    """

    def __init__(self, name: str, entry: ModelEntry, folder: Path | None) -> None:
        self.name = name
        self.entry = entry
        self.local = folder / (entry.subfolder or "") if folder else None
        self.label = f"{entry.repo}" + (f", subfolder {entry.subfolder}" if entry.subfolder else "")

    def config(self, *, is_local_only: bool = False) -> dict[str, Any]:
        """config.json, without the weights; from this machine's files alone when told so."""
        path = self.local / CONFIG if self.local else self._hub_config(is_local_only)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise self.failure(self._missing_config()) from None
        except (OSError, ValueError) as error:
            raise self.failure(f"its {CONFIG} cannot be read ({error}); download or save the model again") from None
        if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
            raise self.failure(f"its {CONFIG} names no _class_name; is this the folder of a diffusers VAE?")
        return config

    def folder(self, *, is_local_only: bool = False) -> Path:
        """The folder with config.json and the weights, downloaded where it must be and may."""
        found = self.local or self._hub_snapshot(is_local_only)
        if not any(any(found.glob(pattern)) for pattern in WEIGHTS[:2]):
            names = [path.name for path in found.glob("*")] if self.local else self._hub_files(is_local_only)
            if is_local_only and not self.local and not any(name.endswith(PICKLES) for name in names):
                raise self.failure(f"its weights are not downloaded; run `python -m server download {self.name}`")
            raise self.failure(_no_weights(names))
        return found

    def commit_of(self, folder: Path) -> str | None:
        """The commit that a folder of the hub's cache is of; None for a local folder."""
        if self.local:
            return None
        snapshot = folder.parent if self.entry.subfolder else folder
        return snapshot.name

    def is_here(self) -> bool:
        """Whether the weights are on this machine."""
        try:
            self.folder(is_local_only=True)
        except ModelUnavailable:
            return False
        return True

    def _missing_config(self) -> str:
        assert self.local is not None
        if not self.local.is_dir():
            return "there is no such folder; check repo and subfolder in models.yaml"
        inside = sorted(path.parent.name for path in self.local.glob(f"*/{CONFIG}"))
        hint = (
            f"it has the subfolder {' and '.join(inside)}; set subfolder"
            if inside
            else "is it a diffusers VAE's folder?"
        )
        return f"the folder has no {CONFIG}; {hint}"

    def _in_repo(self, file: str) -> str:
        return f"{self.entry.subfolder}/{file}" if self.entry.subfolder else file

    def _hub_config(self, is_local_only: bool = False) -> Path:
        file = self._in_repo(CONFIG)
        try:
            found = hf_hub_download(self.entry.repo, file, revision=self.entry.revision, local_files_only=is_local_only)
            return Path(found)
        except Exception as error:  # huggingface_hub, requests and the file system raise alike here
            raise self.failure(self._hub_sentence(error)) from error

    def _hub_snapshot(self, is_local_only: bool) -> Path:
        patterns = [self._in_repo(file) for file in (CONFIG, *WEIGHTS)]
        try:
            snapshot = snapshot_download(
                self.entry.repo,
                revision=self.entry.revision,
                allow_patterns=patterns,
                local_files_only=is_local_only,
            )
        except Exception as error:  # raises as many kinds as hf_hub_download
            raise self.failure(self._hub_sentence(error)) from error
        return Path(snapshot) / (self.entry.subfolder or "")

    def _hub_files(self, is_local_only: bool) -> list[str]:
        """The files beside config.json in the repository, as far as this machine can tell."""
        config = self._hub_config(is_local_only)
        if is_local_only:
            return [path.name for path in config.parent.glob("*")]
        try:
            names = list_repo_files(self.entry.repo, revision=self.entry.revision)
        except Exception:  # noqa: BLE001  # offline: the cache is all that can be known
            return [path.name for path in config.parent.glob("*")]
        return [Path(name).name for name in names if str(Path(name).parent) == (self.entry.subfolder or ".")]

    def _hub_sentence(self, error: Exception) -> str:
        """The hub's errors, most specific first: several are subclasses of the next."""
        repo = self.entry.repo
        match error:
            case hub.GatedRepoError():
                return f"the repository is gated: accept its licence at the hub's page of {repo}, then set HF_TOKEN"
            case hub.RevisionNotFoundError():
                return f"the repository has no revision '{self.entry.revision}'; check revision in models.yaml"
            case hub.RepositoryNotFoundError():
                return "the hub has no such repository, or it is private: check the name, or set HF_TOKEN"
            case hub.HFValidationError():
                return f"'{repo}' is neither a folder here nor a hub id of the form owner/name"
            case hub.LocalEntryNotFoundError() if HF_HUB_OFFLINE:
                return (
                    "it is not in this machine's cache and HF_HUB_OFFLINE is set; "
                    f"run `python -m server download {self.name}` where the hub can be reached, and bring the cache"
                )
            case hub.LocalEntryNotFoundError() | hub.OfflineModeIsEnabled():
                return "it is not in this machine's cache and the hub cannot be reached; check the network"
            case hub.EntryNotFoundError():
                return f"the repository has no {self._in_repo(CONFIG)}; check subfolder in models.yaml"
            case OSError() if error.errno is not None:
                return f"its files cannot be stored ({os.strerror(error.errno)}); check the disk and HF_HOME"
            case _:
                return f"the download failed ({type(error).__name__}); check the network and try again"

    def failure(self, sentence: str) -> ModelUnavailable:
        """The error whose detail is this sentence, after the model's name and repository."""
        return ModelUnavailable(self.name, f"{self.name} ({self.label}): {sentence}")


def _no_weights(names: list[str]) -> str:
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        return f"it has only pickle weights ({', '.join(pickles[:3])}) and {SAFE_ONLY}; convert it with save_pretrained"
    return f"it has no {WEIGHTS[0]}; {SAFE_ONLY}"


def read_info(source: Source, *, is_local_only: bool = False) -> ModelInfo:
    """What config.json and models.yaml say, before any weight is read. Raises ModelUnavailable.

    Of a well-known checkpoint without the network, what is known of it.
    """
    name, entry = source.name, source.entry
    checkpoint = known(entry.repo, entry.subfolder) if source.local is None else None
    is_assumed = False
    try:
        config = source.config(is_local_only=is_local_only)
    except ModelUnavailable:
        if not (is_local_only and checkpoint):
            raise
        config, is_assumed = {"_class_name": checkpoint.class_name, **checkpoint.config}, True
    class_name = config["_class_name"]
    if not is_vae_class(class_name):
        sentence = f"{name} ({source.label}): this diffusers ({diffusers.__version__}) has no VAE class {class_name}"
        if is_assumed:  # a list of models without it would not say why
            log.warning("%s", sentence)
        raise ModelUnavailable(name, sentence)
    family = _family(name, entry, class_name, config)
    try:
        spec: LatentSpec = family.describe(whole_config(class_name, config))
        check_spec(spec)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        reason = str(error) if type(error) is ValueError else repr(error)
        raise ModelUnavailable(
            name, f"{name} ({source.label}): its {CONFIG} is not one of {class_name}: {reason}"
        ) from None
    return ModelInfo(
        name=name,
        latents=spec,
        limits=Limits(**entry.limits.model_dump()),
        class_name=class_name,
        is_assumed=is_assumed,
        licence=checkpoint.licence if checkpoint else None,
        is_gated=checkpoint is not None and checkpoint.gated,
    )


def weigh(source: Source, dtype: torch.dtype) -> Weights:
    """What the weights take on the disk, and each direction of them in memory in this dtype."""
    name = str(dtype).removeprefix("torch.")
    if source.is_here():
        folder = source.folder(is_local_only=True)
        files = [path for pattern in WEIGHTS[:2] for path in folder.glob(pattern)]
        encoder, decoder = _count(files)
        disk_mb = sum(path.stat().st_size for path in files) >> 20
        return Weights(True, name, disk_mb, decoder * dtype.itemsize >> 20, encoder * dtype.itemsize >> 20)
    checkpoint = known(source.entry.repo, source.entry.subfolder) if source.local is None else None
    if checkpoint is None:
        return Weights(False, name)
    counts = checkpoint.decoder_weights, checkpoint.encoder_weights
    disk_mb = sum(counts) * torch.float32.itemsize >> 20
    return Weights(False, name, disk_mb, *(count * dtype.itemsize >> 20 for count in counts))


def _count(files: Sequence[Path]) -> tuple[int, int]:
    """How many numbers the encoder and the decoder are, from the files' headers."""
    encoder = decoder = 0
    for path in files:
        with suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  # not a dictionary
                count = prod(file.get_slice(key).get_shape())
                is_encoder = key.split(".")[0] in OTHER_HALF[Operation.DECODE]
                encoder, decoder = encoder + count * is_encoder, decoder + count * (not is_encoder)
    return encoder, decoder


def whole_config(class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json over the diffusers class's own defaults, as `from_config` reads it."""
    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
    return defaults | dict(config)


def check_spec(spec: LatentSpec) -> None:
    """A config.json is somebody's file: what requests are checked against must be numbers. Raises ValueError."""
    whole = (spec.channels, spec.vae_scale_factor, spec.temporal_compression_ratio)
    if not all(isinstance(value, int) and value >= 1 for value in whole):
        raise ValueError("its channels and compression ratios must be whole numbers")
    if not all(isinstance(value, int | float | None) for value in (spec.scaling_factor, spec.shift_factor)):
        raise ValueError("scaling_factor and shift_factor must be numbers")
    if spec.scaling_factor == 0:
        raise ValueError("scaling_factor must not be 0")
    for statistics in (spec.latents_mean, spec.latents_std):
        if statistics is not None and len(statistics) % spec.channels:
            raise ValueError(f"latents_mean and latents_std must have {spec.channels} values, one a channel")


def is_vae_class(class_name: str) -> bool:
    """Whether this diffusers has it: an older one lacks the newer VAEs."""
    found = getattr(diffusers, class_name, None)
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        return False  # also the stand-ins of classes whose packages are missing, which raise when they are looked at
    return hasattr(found, "decode") and hasattr(found, "from_pretrained")


def _family(name: str, entry: ModelEntry, class_name: str, config: Mapping[str, Any]) -> Family:
    if entry.decoder == "plain":
        implied = plain_family(whole_config(class_name, config))
    elif (found := family_of_class(class_name)) is not None:
        implied = found
    else:
        raise ModelUnavailable(name, f"{name}: {_unknown_class(class_name)}")
    if entry.family is None:
        return implied
    chosen = FAMILIES.get(entry.family)
    if chosen is None:
        raise ModelUnavailable(name, f"{name}: unknown family '{entry.family}'; known: {', '.join(FAMILIES)}")
    if class_name not in chosen.class_names and chosen is not implied:
        raise ModelUnavailable(name, f"{name}: family '{entry.family}' does not fit a {class_name}; leave family out")
    return chosen


def _unknown_class(class_name: str) -> str:
    known = sorted(class_name for family in FAMILIES.values() for class_name in family.class_names)
    return (
        f"the VAE class {class_name} is not one whose range, scaling and noise this server knows, so its pixels could "
        f"be wrong; known classes: {', '.join(known)}. To serve it all the same, with diffusers' own decode and the "
        "statistics of its config.json, write `decoder: plain` into its entry of models.yaml"
    )


def choose_device(wanted: str) -> torch.device:
    """`auto` is the first CUDA device, then Apple's, then the CPU. Raises ValueError with a sentence."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(wanted)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {wanted}: this torch ({torch.__version__}) sees no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {wanted}: there are only {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps: not an Apple GPU; use --device cpu")
    return device


def choose_dtype(wanted: str, info: ModelInfo, device: torch.device, *, is_exact: bool) -> torch.dtype:
    """The dtype to compute in.

    `auto` on a CPU: bfloat16 where the exact decoder may run and the CPU multiplies it in hardware, else float32.
    `auto` on a GPU: the family's, but bfloat16 where the config asks to upcast (its activations overflow float16). An
    explicit float16 is upcast to float32 then, as `StableDiffusionXLPipeline` does.
    """
    must_upcast = info.latents.force_upcast
    if wanted == "float16" and must_upcast:
        return torch.float32
    if wanted != "auto":
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype
    if device.type == "cpu":
        return preferred_cpu_dtype() if is_exact else torch.float32
    usual = FAMILIES[info.latents.family].gpu_dtype
    if usual == "float32" or (usual == "float16" and not must_upcast):
        return torch.float32 if usual == "float32" else torch.float16
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32


# diffusers patches torch's modules while it builds one without memory; two at once would leave them patched for good.
BUILDING = threading.Lock()
# What diffusers says of missing and unused tensors takes several lines and advises to train; `_check` says it in one.
diffusers.utils.logging.set_verbosity_error()


def load_vae(info: ModelInfo, source: Source, dtype: torch.dtype, operation: Operation) -> torch.nn.Module:
    """Load the real diffusers module on the CPU, in evaluation mode, with the weights of one direction.

    The modules of the other direction stay, without weights, because some VAEs count theirs. The weights are copies in
    `dtype`: what happens to the file later changes nothing. Raises ModelUnavailable, also where a tensor of this
    direction is missing, is not finite, or overflows `dtype`.
    """
    folder = source.folder()
    model_class = getattr(diffusers, info.class_name)
    try:
        _check_files(folder)
        with BUILDING:
            vae, found = model_class.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=True, output_loading_info=True
            )
        let_go(vae, OTHER_HALF[operation])
        _check(vae, frozenset(found["missing_keys"]), operation, source)
        _convert(vae, dtype, source)
        loaded: torch.nn.Module = vae.eval().requires_grad_(False)
        return loaded
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        advice = "let this user read them" if isinstance(error, PermissionError) else "download the model again"
        raise source.failure(f"the weights do not load ({reason}); {advice}") from error


def _check_files(folder: Path) -> None:
    """Raise SafetensorError or ValueError for a damaged safetensors file; diffusers would not say what is wrong."""
    for path in sorted(path for pattern in WEIGHTS[:2] for path in folder.glob(pattern)):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            with path.open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise ValueError(f"{path.name} is a pointer of Git LFS; run `git lfs pull`") from None
            raise SafetensorError(f"{path.name}: {error}") from None


def let_go(vae: torch.nn.Module, parts: Sequence[str]) -> None:
    """Free the weights of these modules."""
    for part in parts:
        module = getattr(vae, part, None)
        if module is not None:
            module.to("meta")


def _tensors(vae: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the VAE with its name: parameters and buffers, which may be statistics of the latents."""
    yield from vae.named_parameters()
    yield from vae.named_buffers()


def _check(vae: torch.nn.Module, missing_keys: frozenset[str], operation: Operation, source: Source) -> None:
    """Raise ModelUnavailable unless all tensors of this direction were in the file, with finite values.

    missing_keys: what diffusers did not find. Counters, such as a batch norm's, are not used and may be missing.
    """
    ours = [(name, tensor) for name, tensor in _tensors(vae) if name.split(".")[0] not in OTHER_HALF[operation]]
    missing = [name for name, tensor in ours if name in missing_keys and tensor.is_floating_point()]
    if missing:
        sentence = f"the weights lack {_some(missing)}, which its {CONFIG} asks for; do both belong to the same model?"
        raise source.failure(sentence)
    bad = [name for name, tensor in ours if not torch.isfinite(tensor).all()]
    if bad:
        raise source.failure(f"the weights are NaN or infinite in {_some(bad)}; download or save the model again")


def _convert(vae: torch.nn.Module, dtype: torch.dtype, source: Source) -> None:
    """Copy every tensor, in this dtype if it holds floats. Raises ModelUnavailable where finite values overflow.

    Not by diffusers' torch_dtype, which sets torch's default dtype while another model may be decoding. `copy`, because
    a float32 tensor would stay a mapping of its file: a write to the file would change answers or end the process.
    """
    overflowing = []
    for name, tensor in _tensors(vae):
        if tensor.is_meta:
            continue
        tensor.data = tensor.data.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        if not torch.isfinite(tensor).all():
            overflowing.append(name)
    if overflowing:
        short = str(dtype).removeprefix("torch.")
        raise source.failure(
            f"the weights overflow {short} in {_some(overflowing)}; set dtype: bfloat16 or float32 in models.yaml"
        )


def _some(names: Sequence[str]) -> str:
    """The first of them, and how many there are."""
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"


def source_of(settings: Settings, name: str) -> Source:
    return Source(name, settings.models[name], settings.folder_of(name))
