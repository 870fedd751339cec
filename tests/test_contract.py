"""The contract's cases, put to a server by their command."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from server.config import load_settings
from tests.contract import __main__ as contract
from tests.vaes import LocalVae, build_all, read_all, write_entries

CASES_WANTED = 40


@pytest.fixture
def some(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few: all of them have run here already, as tests."""
    monkeypatch.setattr(contract, "CASES", contract.CASES[:5])


def test_there_are_cases_enough_each_with_a_name_of_its_own() -> None:
    names = {case.name for case in contract.CASES}
    assert len(names) == len(contract.CASES) > CASES_WANTED
    for word in (
        "png",
        "jpeg",
        "packed",
        "mp4",
        "every_kind_of_scaling[{}, flux]",
        "a_picture_encodes",
        "a_clip_encodes",
    ):
        assert any(word in name for name in names), word


def test_the_command_passes_a_good_server(some: None, url: str, vaes: dict[str, LocalVae]) -> None:
    told = CliRunner().invoke(contract.main, ["check", url.rstrip("/"), str(vaes["sd"].folder.parent)])
    assert (told.exit_code, told.output) == (0, "5 of 5 cases passed\n")


def test_the_command_names_what_fails(some: None, vaes: dict[str, LocalVae]) -> None:
    told = CliRunner().invoke(contract.main, ["check", "http://127.0.0.1:9/", str(vaes["sd"].folder.parent)])
    assert told.exit_code == 1
    assert "FAILED  a_batch_equals_its_latents_one_by_one: ConnectionError" in told.output
    assert told.output.endswith("0 of 5 cases passed\n")


def test_what_was_written_is_read_and_served_from_anywhere(tmp_path: Path) -> None:
    written = build_all(tmp_path / "there")
    write_entries(tmp_path / "there")
    (tmp_path / "there").rename(tmp_path / "here")
    settings = load_settings(config=tmp_path / "here" / "models.yaml")
    assert all(settings.path_of(name) for name in settings.models)
    for name, vae in read_all(tmp_path / "here").items():
        latents = vae.latents(*(4, 4) if name != "hunyuan" else (2, 4, 4))
        assert vae.decode(latents).equal(written[name].decode(latents))
