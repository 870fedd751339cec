"""Kernels that always work are used where the fastest ones do not, and say so."""

from __future__ import annotations

import pytest
import torch

from server.engine.coders.build import build_coder
from server.engine.kernels import choice, cpu
from server.engine.kernels.choice import causal_kernels_for, kernels_for
from server.engine.kernels.reference import Kernels
from server.families import family_of_class
from server.model_info import Direction
from server.values import Layout
from tests.engine.coders.image.networks import build, latents_for, stock

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def tried_anew() -> None:
    choice.triton_problem.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton works here")
def test_where_triton_does_not_work_plain_kernels_run(caplog: pytest.LogCaptureFixture) -> None:
    """Triton is installed for the tests, but finds no driver."""
    kernels = kernels_for(CUDA, torch.float16)
    assert type(kernels) is Kernels
    assert kernels.note is not None
    assert kernels.note.startswith("Triton does not work here (")
    assert kernels.note.endswith("so plain torch kernels run, which are slower.")
    assert kernels.note in caplog.text


def test_without_triton_plain_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda _name: None)
    assert (
        kernels_for(CUDA, torch.float16).note
        == "Triton is not installed, so plain torch kernels run, which are slower."
    )


def test_the_fastest_kernels_have_no_note() -> None:
    assert kernels_for(CPU, torch.float32).note is None
    assert causal_kernels_for(CPU, torch.float32).note is None


def test_without_packing_a_model_decodes_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_has_onednn", lambda: False)
    vae = build("sd")
    latents = latents_for(vae, 1, 4, 4)
    expected = stock(vae, latents)
    family = family_of_class("AutoencoderKL")
    assert family is not None
    decoder, note = build_coder(vae, family, Direction.DECODE, "auto", "none")
    assert note == "oneDNN cannot pack weights in float32 here, so plain convolutions run, which are slower."
    assert decoder.name == "exact"
    torch.testing.assert_close(decoder.decode(latents, Layout.SAMPLE).tensor, expected, atol=1e-4, rtol=0)  # type: ignore[union-attr]  # a decoder was asked for


def test_float16_on_a_cpu_says_why_it_is_slow() -> None:
    note = kernels_for(CPU, torch.float16).note
    assert note == "oneDNN cannot pack weights in float16 here, so plain convolutions run, which are slower."
