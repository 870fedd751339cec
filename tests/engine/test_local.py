"""The engine in this process."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import torch

from server.config import load_settings
from server.engine.local import LocalEngine
from server.model_info import CoderId


def test_a_model_that_is_not_used_is_unloaded(models_yaml: Path) -> None:
    async def is_unloaded() -> bool:
        engine = LocalEngine(load_settings(config=models_yaml, idle_unload_s=0.1))
        await engine.start(lambda: None)
        try:
            await engine.load(CoderId("sd"))
            assert engine.loaded("sd")
            for _ in range(100):
                await asyncio.sleep(0.1 if engine.loaded("sd") else 0)
        finally:
            await engine.close()
        return engine.loaded("sd") is None

    assert asyncio.run(is_unloaded())


def test_a_device_holds_no_more_than_it_may_however_many_load_at_once(models_yaml: Path) -> None:
    async def held() -> int:
        engine = LocalEngine(load_settings(config=models_yaml, max_loaded=1))
        names = ["sd", "sd-bf16", "flux"]
        try:
            await asyncio.gather(*(engine.load(CoderId(name)) for name in names))
            return sum(engine.loaded(name) is not None for name in names)
        finally:
            await engine.close()

    for _ in range(3):
        assert asyncio.run(held()) == 1
    assert not torch.nn.Linear(1, 1).weight.is_meta, "diffusers left torch's modules patched"


def test_a_load_whose_caller_is_cancelled_ends_without_an_error(models_yaml: Path) -> None:
    failed: list[threading.ExceptHookArgs] = []

    async def cancelled_then_loaded() -> bool:
        engine = LocalEngine(load_settings(config=models_yaml))
        try:
            loading = asyncio.create_task(engine.load(CoderId("sd")))
            await asyncio.sleep(0)
            loading.cancel()
            for _ in range(3000):
                if engine.loaded("sd"):
                    break
                await asyncio.sleep(0.1)
            await engine.load(CoderId("sd"))
            return engine.loaded("sd") is not None
        finally:
            await engine.close()

    usual, threading.excepthook = threading.excepthook, failed.append
    try:
        assert asyncio.run(cancelled_then_loaded())
    finally:
        threading.excepthook = usual
    assert failed == []
