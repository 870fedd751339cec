"""Find the files of a model: in a local folder, or in a repository of the Hugging Face Hub and its cache."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import errors as hub
from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE

from ...config import ModelEntry, Settings
from ...errors import ModelUnavailable

CONFIG = "config.json"
WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model-*-of-*.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SAFE_ONLY = "only safetensors weights are ever loaded, because a pickle file can run code"


def source_of(settings: Settings, name: str) -> Source:
    """Return the source of the files of the model with this name."""
    return Source(name, settings.models[name], settings.folder_of(name))


class Source:
    """The files of one model: a local folder, or a repository of the hub with its cache on this machine.

    All methods raise ModelUnavailable, whose `detail` is one sentence for the operator.

    name: the name of the model. entry: its entry in models.yaml.
    local: the folder, or None for a repository of the hub.
    label: the repository and subfolder, for messages.
    """

    def __init__(self, name: str, entry: ModelEntry, folder: Path | None) -> None:
        """folder: the local folder that `entry.repo` names; None if it is a repository of the hub."""
        self.name = name
        self.entry = entry
        self.local = folder / (entry.subfolder or "") if folder else None
        self.label = f"{entry.repo}" + (f", subfolder {entry.subfolder}" if entry.subfolder else "")

    def config(self, *, is_local_only: bool = False) -> dict[str, Any]:
        """Return config.json, without downloading the weights. is_local_only: use only files on this machine."""
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
        """Return the folder with config.json and the weights. They are downloaded if needed, unless `is_local_only`."""
        found = self.local or self._hub_snapshot(is_local_only)
        if not any(any(found.glob(pattern)) for pattern in WEIGHTS[:2]):
            names = [path.name for path in found.glob("*")] if self.local else self._hub_files(is_local_only)
            if is_local_only and not self.local and not any(name.endswith(PICKLES) for name in names):
                raise self.failure(f"its weights are not downloaded; run `python -m server download {self.name}`")
            raise self.failure(_no_weights(names))
        return found

    def commit_of(self, folder: Path) -> str | None:
        """Return the commit of a folder in the hub's cache, or None for a local folder."""
        if self.local:
            return None
        snapshot = folder.parent if self.entry.subfolder else folder
        return snapshot.name

    def is_here(self) -> bool:
        """Return whether the weights are on this machine."""
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
        except Exception as error:  # huggingface_hub, requests and the file system all raise here
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
        except Exception as error:  # the same many classes as for hf_hub_download
            raise self.failure(self._hub_sentence(error)) from error
        return Path(snapshot) / (self.entry.subfolder or "")

    def _hub_files(self, is_local_only: bool) -> list[str]:
        """Return the names of the files beside config.json: in the repository, or without the network in the cache."""
        config = self._hub_config(is_local_only)
        if is_local_only:
            return [path.name for path in config.parent.glob("*")]
        try:
            names = list_repo_files(self.entry.repo, revision=self.entry.revision)
        except Exception:  # noqa: BLE001  # the hub cannot be reached, so only the cache is known
            return [path.name for path in config.parent.glob("*")]
        return [Path(name).name for name in names if str(Path(name).parent) == (self.entry.subfolder or ".")]

    def _hub_sentence(self, error: Exception) -> str:
        """Return a sentence for an error.

        The most specific class comes first, because several are subclasses of later ones.
        """
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
        """Return the error whose detail is the model's name and repository, followed by this sentence."""
        return ModelUnavailable(self.name, f"{self.name} ({self.label}): {sentence}")


def _no_weights(names: list[str]) -> str:
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        return f"it has only pickle weights ({', '.join(pickles[:3])}) and {SAFE_ONLY}; convert it with save_pretrained"
    return f"it has no {WEIGHTS[0]}; {SAFE_ONLY}"
