"""Find the files of a model: on this machine, or in a repository of the Hugging Face Hub and its cache."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape as glob_escape
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import errors as hub
from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.utils import disable_progress_bars

from ... import COMMAND
from ...config import ModelEntry, Settings
from ...errors import ModelUnavailable
from ...families.known import Checkpoint, known
from .headers import PICKLES, SAFE_ONLY, SAVE_AGAIN, UnreadableWeights
from .weight_files import SHARD, SUFFIX, choose_files, index_of

CONFIG = "config.json"
USUAL = (
    CONFIG,
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model-*-of-*.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
"""What is downloaded from a repository that does not tell its files."""

PIPELINE_PART = "vae"
"""The subfolder in which a pipeline has its VAE."""

if not sys.stderr.isatty():
    disable_progress_bars()  # of downloads; in a log or a script's output they are only noise


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a model that are on this machine. index: the index of its shards, if there is one."""

    folder: Path
    weights: tuple[Path, ...]
    index: Path | None = None


def source_of(settings: Settings, name: str) -> Source:
    """Return the source of the files of the model with this name."""
    return Source(name, settings.models[name], settings.path_of(name), settings.config_path_of(name))


class Source:
    """The files of one model: a local file or folder, or a repository of the hub with its cache on this machine.

    All methods raise ModelUnavailable, whose `detail` is one sentence for the operator.

    name: the name of the model. entry: its entry in models.yaml.
    local: the file or the folder, or None for a repository of the hub.
    label: the repository and subfolder, for messages.
    """

    def __init__(self, name: str, entry: ModelEntry, path: Path | None, config_path: Path | None = None) -> None:
        """Prepare to find the files.

        path: the local file or folder that `entry.repo` names; None if it is a repository of the hub.
        config_path: the file or folder that `entry.config` names; None if it names none.
        """
        self.name = name
        self.entry = entry
        self.local = _place(path, entry) if path else None
        parts = {"subfolder": entry.subfolder, "file": entry.file}
        self.label = ", ".join([entry.repo, *(f"{key} {value}" for key, value in parts.items() if value)])
        self._config_path = config_path

    def checkpoint(self) -> Checkpoint | None:
        """Return the facts about a well-known repository or file of the hub; None if it is another one, or local."""
        return None if self.local else known(self.entry.repo, self.entry.subfolder, self.entry.file)

    def given_config(self) -> dict[str, Any] | None:
        """Return the config.json that `config` in models.yaml names by its path; None if it names none."""
        if self._config_path is None:
            return None
        path = self._config_path / CONFIG if self._config_path.is_dir() else self._config_path
        if not path.is_file():
            raise self.failure(f"config: there is no file {path}")
        return self._read_config(path, "the file that config names")

    def config(self, *, is_local_only: bool = False) -> dict[str, Any] | None:
        """Return config.json, without downloading the weights; None if there are weights and no config.json.

        is_local_only: use only files on this machine.
        """
        try:
            path = self._local_config(self.local) if self.local else self._hub_config(is_local_only)
        except OSError as error:
            raise self.failure(f"its files cannot be read ({error.strerror}); let this user read them") from None
        return self._read_config(path, f"its {CONFIG}") if path else None

    def files(self, *, is_local_only: bool = False) -> Files:
        """Return the weights' files. They are downloaded if needed, unless `is_local_only`."""
        try:
            return self._local_files(self.local) if self.local else self._hub_files(is_local_only)
        except UnreadableWeights as error:
            raise self.failure(str(error)) from None
        except OSError as error:
            raise self.failure(f"its files cannot be read ({error.strerror}); let this user read them") from None

    def _read_config(self, path: Path, what: str) -> dict[str, Any]:
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self.failure(f"{what} cannot be read ({error}); download or save the model again") from None
        if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
            raise self.failure(
                f'{what} names no _class_name; if it is the config of a VAE, add its class, such as "_class_name": '
                '"AutoencoderKL", or set config to a well-known name, such as sd or sdxl'
            )
        return config

    def _local_config(self, path: Path) -> Path | None:
        if path.is_file():
            beside = path.parent / CONFIG
            return beside if beside.is_file() and b"_class_name" in beside.read_bytes() else None
        if (path / CONFIG).is_file():
            return path / CONFIG
        names = [file.name for file in path.glob("*")] if path.is_dir() else []
        inside = sorted(file.parent.name for file in path.glob(f"*/{CONFIG}")) if names else []
        if inside and not any(name.endswith((SUFFIX, *PICKLES)) for name in names):
            raise self.failure(
                f"the folder has no {CONFIG}; it has the subfolder {' and '.join(inside)}; set subfolder"
            )
        self.files()  # raises unless there are weights, whose keys may tell what they are
        return None

    def _local_files(self, path: Path) -> Files:
        if not path.exists():
            raise UnreadableWeights("there is no such file or folder; check repo and subfolder in models.yaml")
        if path.is_dir():
            return _files_in(path, choose_files(file.name for file in path.iterdir()))
        if path.suffix in PICKLES:
            raise UnreadableWeights(f"{path.name} is a pickle file by its name, and {SAFE_ONLY}; {SAVE_AGAIN}")
        if shard := SHARD.match(path.name):
            shards = [file.name for file in path.parent.glob(f"{glob_escape(shard['stem'])}-*-of-*.safetensors")]
            return _files_in(path.parent, choose_files(shards))
        return Files(path.parent, (path,))

    def commit_of(self, folder: Path) -> str | None:
        """Return the commit of a folder in the hub's cache, or None for a local folder."""
        if self.local:
            return None
        return folder.parts[folder.parts.index("snapshots") + 1]

    def beside(self, part: str) -> Source:
        """Return the source of another component of the same pipeline, in the folder `part` beside that of the VAE."""
        plain = {"file": None, "config": None}
        if self.local:
            folder = (self.local.parent if self.local.is_file() else self.local).parent / part
            entry = self.entry.model_copy(update=plain | {"repo": str(folder), "subfolder": None})
            return Source(self.name, entry, folder)
        subfolder = (PurePosixPath(self.entry.subfolder or "").parent / part).as_posix()
        return Source(self.name, self.entry.model_copy(update=plain | {"subfolder": subfolder}), None)

    def is_here(self) -> bool:
        """Return whether the weights are on this machine, complete or not."""
        try:
            self.files(is_local_only=True)
        except ModelUnavailable:
            return False
        return True

    def _in_repo(self, file: str, subfolder: str | None) -> str:
        return f"{subfolder}/{file}" if subfolder else file

    def _hub_config(self, is_local_only: bool) -> Path | None:
        """Return config.json; of a pipeline, that of its VAE; None if the repository has weights without one.

        The config.json of a repository with several models may belong to any of them, so it is not used if the entry
        names a file.
        """
        if self.entry.file:
            self.files(is_local_only=is_local_only)
            return None
        error: Exception | None = None
        for subfolder in self._subfolders():
            try:
                file = self._in_repo(CONFIG, subfolder)
                found = hf_hub_download(
                    self.entry.repo, file, revision=self.entry.revision, local_files_only=is_local_only
                )
                return Path(found)
            except hub.EntryNotFoundError as missing:
                error = error or missing
                if isinstance(missing, hub.LocalEntryNotFoundError) and not (is_local_only or HF_HUB_OFFLINE):
                    break  # the hub cannot be reached, which takes a while to find out
            except Exception as other:  # huggingface_hub, requests and the file system all raise here
                raise self.failure(self._hub_sentence(other)) from other
        assert error is not None
        try:
            self.files(is_local_only=isinstance(error, hub.LocalEntryNotFoundError))
        except ModelUnavailable:
            raise self.failure(self._hub_sentence(error)) from error
        return None

    def _subfolders(self) -> Sequence[str | None]:
        return (self.entry.subfolder,) if self.entry.subfolder else (None, PIPELINE_PART)

    def _hub_files(self, is_local_only: bool) -> Files:
        """Return the files in the cache, after downloading them. Raises UnreadableWeights, ModelUnavailable."""
        is_local_only = is_local_only or HF_HUB_OFFLINE
        if self.entry.file:
            return self._hub_file(self._in_repo(self.entry.file, self.entry.subfolder), is_local_only)
        listed = None if is_local_only else self._names_on_hub()
        if listed is None:
            snapshot = self._snapshot([self._in_repo(name, self.entry.subfolder) for name in USUAL], is_local_only)
            listed = [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file()]
            subfolder, names = self._beside_config(listed)
            if is_local_only and not any(name.endswith((SUFFIX, *PICKLES)) for name in names):
                raise self.failure(f"its weights are not downloaded; run `{COMMAND} download {self.name}`")
            return _files_in(snapshot / subfolder, choose_files(names))
        subfolder, names = self._beside_config(listed)
        chosen = choose_files(names)
        wanted = [name for name in (CONFIG, *chosen, index_of(chosen, names)) if name]
        snapshot = self._snapshot([self._in_repo(name, subfolder) for name in wanted], is_local_only=False)
        return _files_in(snapshot / subfolder, chosen)

    def _hub_file(self, name: str, is_local_only: bool) -> Files:
        """Return the file that the entry names. name: its path in the repository."""
        file = self._snapshot([name], is_local_only) / name
        if file.is_file():
            return Files(file.parent, (file,))
        if is_local_only:
            raise self.failure(f"its weights are not downloaded; run `{COMMAND} download {self.name}`")
        raise UnreadableWeights(f"the repository has no {name}; check file and subfolder in models.yaml")

    def _names_on_hub(self) -> list[str] | None:
        """Return the names of all files in the repository; None if the hub does not tell, so that the cache decides."""
        try:
            return list(list_repo_files(self.entry.repo, revision=self.entry.revision))
        except Exception:  # noqa: BLE001  # the cache may be complete, and if not, the download tells the reason
            return None

    def _beside_config(self, paths: Sequence[str]) -> tuple[str, list[str]]:
        """Return the subfolder of the VAE and the names of the files in it. paths: of all files in the repository."""
        subfolder = self.entry.subfolder or ""
        if not subfolder and CONFIG not in paths and f"{PIPELINE_PART}/{CONFIG}" in paths:
            subfolder = PIPELINE_PART
        inside = [PurePosixPath(path) for path in paths]
        return subfolder, [path.name for path in inside if path.parent == PurePosixPath(subfolder)]

    def _snapshot(self, patterns: list[str], is_local_only: bool) -> Path:
        try:
            return Path(
                snapshot_download(
                    self.entry.repo,
                    revision=self.entry.revision,
                    allow_patterns=patterns,
                    local_files_only=is_local_only,
                )
            )
        except Exception as error:  # the same many classes as for hf_hub_download
            raise self.failure(self._hub_sentence(error)) from error

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
                    f"run `{COMMAND} download {self.name}` where the hub can be reached, and bring the cache"
                )
            case hub.LocalEntryNotFoundError() | hub.OfflineModeIsEnabled():
                return "it is not in this machine's cache and the hub cannot be reached; check the network"
            case hub.EntryNotFoundError():
                file = self._in_repo(CONFIG, self.entry.subfolder)
                return f"the repository has no {file}; check subfolder in models.yaml"
            case OSError() if error.errno is not None:
                return f"its files cannot be stored ({os.strerror(error.errno)}); check the disk and HF_HOME"
            case _:
                return f"the download failed ({type(error).__name__}); check the network and try again"

    def failure(self, sentence: str) -> ModelUnavailable:
        """Return the error whose detail is the model's name and repository, followed by this sentence."""
        return ModelUnavailable(self.name, f"{self.name} ({self.label}): {sentence}")


def _place(path: Path, entry: ModelEntry) -> Path:
    """Return the local file or folder of an entry whose `repo` is this path."""
    folder = path / (entry.subfolder or "")
    return folder / entry.file if entry.file else _vae_in(folder, entry.subfolder)


def _vae_in(path: Path, subfolder: str | None) -> Path:
    """Return the folder of the VAE. In a pipeline's folder that is its subfolder vae, unless a subfolder is given."""
    inner = path / PIPELINE_PART
    return inner if not subfolder and not (path / CONFIG).is_file() and (inner / CONFIG).is_file() else path


def _files_in(folder: Path, weights: Sequence[str]) -> Files:
    index = index_of(weights, [path.name for path in folder.iterdir()])
    return Files(folder, tuple(folder / name for name in weights), folder / index if index else None)
