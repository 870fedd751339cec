"""models.yaml, flags and environment: each mistake is one sentence with file, line, key and the nearest known key."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from server import config
from server.config import SHIPPED_MODELS_YAML, forget_keys, load_settings
from server.errors import ConfigError

GOOD = """\
default: a
models:
  a: {repo: owner/name, aliases: [b]}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "models.yaml"
    path.write_text(text, encoding="utf-8")
    return path


BROKEN = {
    "not YAML": ("models: [", r":1: not YAML"),
    "empty": ("", r":1: the file: expected"),
    "a list": ("- a", r":1: the file: expected"),
    "no models": ("default: a", r": models: this key is required"),
    "no entries": ("models: {}", r":1: models: .*at least 1"),
    "an unknown top key": (GOOD + "modles: {}", r":4: modles: unknown key, did you mean 'models'"),
    "a key that is misspelt, and so missing": ("models:\n  a:\n    rebo: o/n", r":3: models.a.rebo: unknown key, did you mean 'repo'"),
    "an unknown key": ("models:\n  a: {repo: o/n}\n  b:\n    repo: o/n\n    preloaded: true", r":5: models.b.preloaded: unknown key, did you mean 'preload'\?; known: repo, subfolder"),
    "an unknown limit": ("models:\n  a:\n    repo: o/n\n    limits: {max_pixel: 1}", r":4: models.a.limits.max_pixel: .*'max_pixels'"),
    "no repo": ("models: {a: {preload: true}}", r":1: models.a.repo: this key is required"),
    "a text for a boolean": ("models: {a: {repo: o/n, preload: 'yes'}}", r"models.a.preload: expected a valid boolean, got 'yes'"),
    "a number for a text": ("models: {a: {repo: o/n, revision: 123}}", r"models.a.revision: expected a valid string, got 123"),
    "a text for a list": ("models: {a: {repo: o/n, aliases: b}}", r"models.a.aliases: expected a valid"),
    "an unknown dtype": ("models: {a: {repo: o/n, dtype: float8}}", r"models.a.dtype: expected 'auto', 'float32'"),
    "an unknown device": ("models: {a: {repo: o/n, device: gpu}}", r"models.a.device: expected auto, cpu, mps, cuda or cuda:N, got 'gpu'"),
    "a limit of zero": ("models: {a: {repo: o/n, limits: {max_batch: 0}}}", r"max_batch: expected greater than or equal to 1"),
    "a warmup that is no size": ("models: {a: {repo: o/n, warmup: [[512]]}}", r"models.a.warmup.0"),
    "an unknown default": ("default: x\nmodels: {a: {repo: o/n}}", r": default: there is no model 'x'; known: a"),
    "a key twice": ("models:\n  a: {repo: o/n}\n  a: {repo: o/m}", r":3: models.a: this key is there twice"),
    "an alias that is a name": ("models:\n  a: {repo: o/n}\n  b: {repo: o/n, aliases: [a]}", r"the name 'a' is used twice"),
    "a route's name": ("models: {health: {repo: o/n}}", r"'health' cannot be a model's name: it is a route"),
    "a name that is no URL": ("models: {'a b': {repo: o/n}}", r"'a b' cannot be a model's name"),
    "binary": ("\x00\x01", r"cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_sentence(case: str, tmp_path: Path) -> None:
    text, words = BROKEN[case]
    with pytest.raises(ConfigError, match=words) as caught:
        load_settings(config=write(tmp_path, text))
    assert str(caught.value).startswith(str(tmp_path / "models.yaml"))
    assert "\n" not in str(caught.value)


def test_the_shipped_file_is_good_and_its_default_is_embedded() -> None:
    settings = load_settings(config=SHIPPED_MODELS_YAML)
    assert settings.default == "demo"
    assert settings.path_of("demo") == SHIPPED_MODELS_YAML.parent / "server" / "demo"
    assert {"demo", "sd-v1", "sd-xl", "flux", "hunyuan-video"} <= set(settings.models)
    assert settings.path_of("flux") is None


def test_a_flag_wins_over_the_environment_over_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path, GOOD)
    assert load_settings(config=config).options.port == 8000
    monkeypatch.setenv("VAE_SERVER_PORT", "8001")
    assert load_settings(config=config).options.port == 8001
    assert load_settings(config=config, port="8002").options.port == 8002


def test_our_own_variable_wins_over_a_platforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path, GOOD)
    for port, name in [(1, "SAGEMAKER_BIND_TO_PORT"), (2, "AIP_HTTP_PORT"), (3, "VAE_SERVER_PORT")]:
        monkeypatch.setenv(name, str(port))
        assert load_settings(config=config).options.port == port
    monkeypatch.setenv("AIP_HEALTH_ROUTE", "/theirs/")
    assert load_settings(config=config).options.health_route == "/theirs"
    assert load_settings(config=config, health_route="/ours").options.health_route == "/ours"


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The second folder where a model may be mounted, empty; the first is not there."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    monkeypatch.setattr(config, "MOUNTED", (tmp_path / "lost", folder))
    return folder


def test_a_mounted_vae_is_served_alone_and_before_it_is_asked_for(mounted: Path) -> None:
    (mounted / "vae").mkdir()
    (mounted / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    settings = load_settings()
    assert (list(settings.models), settings.default) == (["model"], "model")
    assert settings.path_of("model") == mounted / "vae"
    assert settings.models["model"].preload
    (mounted / "config.json").write_text('{"model_type": "clip"}')
    assert load_settings().path_of("model") == mounted / "vae", "another library's config is none of a VAE"
    (mounted / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert load_settings().path_of("model") == mounted, "of a VAE and a pipeline's, the VAE"


def test_a_mounted_folder_that_may_not_be_read_is_told(mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ConfigError, match="mounted: Permission denied; the user of this process"):
        load_settings()


def test_a_platforms_variable_is_named_when_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIP_HTTP_PORT", "abc")
    with pytest.raises(ConfigError, match=r"^AIP_HTTP_PORT: expected a valid integer"):
        load_settings()


def test_a_mounted_models_yaml_is_read(mounted: Path) -> None:
    write(mounted, "models: {theirs: {repo: ./theirs}}")
    assert load_settings().path_of("theirs") == mounted / "theirs"


def test_a_mounted_folder_that_is_empty_counts_as_none(
    mounted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_settings().source == SHIPPED_MODELS_YAML
    monkeypatch.chdir(write(tmp_path, GOOD).parent)
    assert load_settings().source == tmp_path / "models.yaml"


def test_a_mounted_folder_without_a_model_is_an_error_that_config_ends(mounted: Path, tmp_path: Path) -> None:
    (mounted / "README.md").touch()
    with pytest.raises(
        ConfigError,
        match=r"mounted contains no config\.json of a diffusers VAE, no vae/config\.json, no safetensors file and no",
    ):
        load_settings()
    assert load_settings(config=write(tmp_path, GOOD)).source == tmp_path / "models.yaml"


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        ({"port": "x"}, {}, r"--port: expected a valid integer.*, got 'x'"),
        ({"max_queue": "0"}, {}, r"--max-queue: expected greater than or equal to 1"),
        ({}, {"VAE_SERVER_DEVICE": "gpu"}, r"VAE_SERVER_DEVICE: .*got 'gpu'"),
        ({}, {"VAE_SERVER_PORT": "x"}, r"^VAE_SERVER_PORT: expected a valid integer"),
        ({"health_route": "ready"}, {}, r"--health-route: .*got 'ready'"),
        ({}, {"VAE_SERVER_PREDICT_ROUTE": "/{model}"}, r"^VAE_SERVER_PREDICT_ROUTE: .*got '/\{model\}'"),
        ({"config": "/nowhere.yaml"}, {}, r"/nowhere.yaml: no such file"),
        ({"api_key_file": "/nowhere"}, {}, r"--api-key-file /nowhere: No such file"),
    ],
)
def test_a_broken_flag_or_variable_is_named(
    flags: dict[str, Any], environment: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        load_settings(**{"config": write(tmp_path, GOOD), **flags})


def test_named_models_are_kept_in_order_and_aliases_count(tmp_path: Path) -> None:
    config = write(tmp_path, "models:\n  a: {repo: o/a}\n  b: {repo: o/b, aliases: [bb]}\n  c: {repo: o/c}")
    settings = load_settings(("BB", "a"), config=config)
    assert (settings.default, list(settings.models)) == ("b", ["b", "a"])
    with pytest.raises(ConfigError, match=r"no model 'd' in .*; known: a, b, c"):
        load_settings(("d",), config=config)


def test_a_key_never_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAE_SERVER_API_KEY", "hush-hush")
    settings = load_settings(config=write(tmp_path, GOOD))
    assert settings.api_keys[0].key.get_secret_value() == "hush-hush"
    assert "hush-hush" not in repr(settings)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("k1\n\n  k2  \n", [("key-1", "k1"), ("key-3", "k2")]),
        ("alice: k1\nbob:\tk2", [("alice", "k1"), ("bob", "k2")]),
        ("alice:k1", [("key-1", "alice:k1")]),
        ("alice: old\nalice: new", [("alice", "old"), ("alice", "new")]),
    ],
)
def test_a_key_may_have_a_name(text: str, keys: list[tuple[str, str]], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    settings = load_settings(config=write(tmp_path, GOOD), api_key_file=tmp_path / "keys")
    assert [(known.name, known.key.get_secret_value()) for known in settings.api_keys] == keys


@pytest.mark.parametrize("text", ["two words", "a b: hush", "a: hush hush", "alice:", "al/ice: hush"])
def test_a_line_that_is_no_key_is_an_error_that_does_not_show_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match=r"entry \d: expected KEY or NAME: KEY") as caught:
        load_settings(config=write(tmp_path, GOOD), api_key_file=tmp_path / "keys")
    assert "hush" not in str(caught.value)


def test_the_environment_holds_several_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAE_SERVER_API_KEY", "k1, ci: k2")
    settings = load_settings(config=write(tmp_path, GOOD))
    assert [known.name for known in settings.api_keys] == ["key-1", "ci"]
    monkeypatch.setenv("VAE_SERVER_API_KEY", " , ")
    with pytest.raises(ConfigError, match="VAE_SERVER_API_KEY: is set but empty"):
        load_settings(config=write(tmp_path, GOOD))


@pytest.mark.parametrize(("alias", "model"), [
    ("pixartalpha", "sd-v1"), ("pixartsigma", "sd-xl"), ("hunyuandit", "sd-xl"), ("auraflow", "sd-xl"), ("omnigen", "sd-xl"),
    ("h1", "flux"), ("chroma", "flux"), ("zimage", "flux"), ("lumina2", "flux"), ("kolors", "sd-xl"), ("wan2.1", "wan"),
])  # fmt: skip
def test_the_names_that_clients_use_are_known(alias: str, model: str) -> None:
    assert load_settings(config=SHIPPED_MODELS_YAML).name_of(alias) == model


@pytest.mark.parametrize("route", [{"predict_route": "/encode"}, {"health_route": "/models"}])
def test_a_platforms_route_takes_no_other_ones_place(route: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="is another route of the server"):
        load_settings(**route)


@pytest.mark.parametrize("name", ["VAE_SERVER_API_KEY", "vae_server_api_key"])
def test_keys_leave_the_environment_once_they_are_read(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "secret")
    settings = load_settings()
    assert [each.key.get_secret_value() for each in settings.api_keys] == ["secret"]
    forget_keys()
    assert "secret" not in os.environ.values()


@pytest.fixture
def vae_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file of weights, a folder of a VAE, a pipeline and a models.yaml, which is the working folder."""
    (tmp_path / "My VAE.safetensors").touch()
    for name in ("diffusers", "pipeline/vae"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "ae.safetensors").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("word", "name", "repo"),
    [
        ("My VAE.safetensors", "my-vae", "My VAE.safetensors"),
        ("./diffusers", "diffusers", "diffusers"),
        ("pipeline", "pipeline", "pipeline"),
        ("loose/ae.safetensors", "ae", "loose/ae.safetensors"),
    ],
)
def test_a_path_on_the_command_line_is_a_model(word: str, name: str, repo: str, vae_files: Path) -> None:
    settings = load_settings((word,), config=SHIPPED_MODELS_YAML)
    assert (list(settings.models), settings.default, settings.models[name].preload) == ([name], name, True)
    assert settings.path_of(name) == vae_files / repo
    both = load_settings((word, "flux"), config=SHIPPED_MODELS_YAML)
    assert list(both.models) == [name, "flux"]


def test_a_repository_on_the_command_line_is_a_model_with_what_is_known_of_it() -> None:
    settings = load_settings(("owner/Some_VAE", "black-forest-labs/FLUX.1-schnell"), config=SHIPPED_MODELS_YAML)
    assert list(settings.models) == ["some_vae", "flux.1-schnell"]
    assert settings.path_of("some_vae") is None
    known = settings.models["flux.1-schnell"]
    assert (known.subfolder, known.family, known.aliases) == ("vae", "flux", ())


def test_a_name_of_a_model_wins_over_a_folder(vae_files: Path) -> None:
    (vae_files / "flux").mkdir()
    assert load_settings(("flux",), config=SHIPPED_MODELS_YAML).path_of("flux") is None


def test_the_vae_config_is_for_what_is_given_by_its_path(vae_files: Path) -> None:
    file = "My VAE.safetensors"
    assert load_settings((file,), vae_config="sdxl", config=SHIPPED_MODELS_YAML).models["my-vae"].config == "sdxl"
    settings = load_settings((file,), vae_config="./diffusers")
    assert settings.config_path_of("my-vae") == vae_files / "diffusers"
    assert load_settings(config=vae_files / file, vae_config="sdxl").models["model"].config == "sdxl"
    with pytest.raises(ConfigError, match=r"--vae-config is for a file, a folder or a repository"):
        load_settings(("flux",), vae_config="sdxl", config=SHIPPED_MODELS_YAML)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("./nowhere", r"\./nowhere: no such file or folder"),
        ("nowhere.safetensors", r"nowhere\.safetensors: no such file or folder"),
        ("./empty", r"\./empty contains no config\.json of a diffusers VAE and no safetensors file$"),
        ("./both", r"\./both contains no .*; for its models\.yaml, write --config \./both"),
    ],
)
def test_a_path_without_a_vae_is_one_sentence(word: str, words: str, vae_files: Path) -> None:
    (vae_files / "both").mkdir()
    write(vae_files / "both", GOOD)
    with pytest.raises(ConfigError, match=words):
        load_settings((word,), config=SHIPPED_MODELS_YAML)


def test_a_mounted_file_of_weights_is_a_model(mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (mounted / "ae.safetensors").touch()
    monkeypatch.setenv("VAE_SERVER_VAE_CONFIG", "flux")
    settings = load_settings()
    assert settings.path_of("model") == mounted
    assert (settings.models["model"].config, settings.models["model"].preload) == ("flux", True)
