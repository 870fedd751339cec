"""GET /models lists all models, or those of a kind or of a name."""

from __future__ import annotations

from typing import Any

import pytest
import requests


def names(url: str, **query: str) -> list[str]:
    answer = requests.get(url + "models", params=query, timeout=300)
    assert answer.ok, answer.text
    return [model["name"] for model in answer.json()["models"]]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"kind": "video"}, ["hunyuan"]),
        ({"kind": "preview"}, []),
        ({"name": "SD-V"}, ["sd"]),  # by its alias sd-v1
        ({"name": "sdxl"}, ["sdxl", "sdxl-half"]),
        ({"kind": "Image", "name": "hun"}, []),
    ],
    ids=str,
)
def test_kind_and_name_choose_models(url: str, query: dict[str, Any], expected: list[str]) -> None:
    assert names(url, **query) == expected


def test_nothing_sent_chooses_all(url: str) -> None:
    assert set(names(url)) == set(names(url, kind="image")) | set(names(url, kind="video"))
    assert names(url, kind="", name="") == names(url)


def test_an_unknown_kind_is_refused(url: str) -> None:
    answer = requests.get(url + "models", params={"kind": "sound"}, timeout=300)
    assert answer.status_code == 400
    assert "kind must be one of image, video, audio, preview, not 'sound'" in answer.json()["error"]
