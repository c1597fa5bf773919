"""Behaviour of dccapi, over real connections to a real Hypercorn, in the order of dccapi.py's sections.

The engine of most tests is scripted, for faults and for determinism; the last section runs the real embedded model.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import re
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import h2.errors
import httpx
import hypercorn.asyncio
import orjson
import pytest
from hyperframe.frame import DataFrame, HeadersFrame, PriorityFrame, RstStreamFrame
from hypothesis import given, settings as hypothesis_settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import dccapi
from testkit import (
    H2Client,
    Script,
    ScriptedEngine,
    ScriptedOllama,
    ScriptedOpenAI,
    Server,
    badge_json,
    badge_pieces,
    eventually,
    exceeds_context,
    free_port,
    parse_sse,
    rss_kib,
    split,
    trusting_tls,
)

HERE = Path(__file__).resolve().parent
COURSE = {"content": "Knots for climbers: figure eight, clove hitch, prusik. Practical exam on the wall."}
COURSES = [json.loads(line) for line in (HERE / "examples" / "courses.jsonl").read_text("utf-8").splitlines()]
MODEL = HERE / "model" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SLOW = Script(pieces=badge_pieces() * 40, delay=0.02)


@dataclass
class Service:
    """dccapi on a real Hypercorn in this event loop, its scripted engine, and what tests look at."""

    port: int
    engine: ScriptedEngine
    queue: dccapi.GenerationQueue

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def connect(self, **options: Any) -> H2Client:
        return await H2Client.connect("127.0.0.1", self.port, **options)

    async def idle(self, timeout: float = 5) -> None:
        """Wait until nothing is left of any generation."""
        await eventually(lambda: not self.queue.running and not self.queue.waiting, timeout, "an idle queue")
        await eventually(lambda: self.engine.open_calls == 0, timeout, "no open engine call")


@contextlib.asynccontextmanager
async def serving(
    engine: ScriptedEngine | None = None, script: Any = None, tls: bool = False, **settings: Any
) -> AsyncIterator[Service]:
    async with engine or ScriptedOllama() as engine:
        if script is not None:
            engine.script = script if callable(script) else lambda body, index: script
        if isinstance(engine, ScriptedOpenAI):
            settings = {"engine": "openai", "openai_base_url": engine.base_url, **settings}
        app = dccapi.create_app(dccapi.Settings(**{"ollama_url": engine.url, **settings}))
        listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        port = listening.getsockname()[1]
        config = dccapi.load_config(str(HERE / "hypercorn.toml"))
        config.bind = [f"fd://{listening.detach()}"]
        config.errorlog = None
        if tls:
            config.certfile, config.keyfile = certificate()
        stop = asyncio.Event()
        server = asyncio.create_task(hypercorn.asyncio.serve(app, config, shutdown_trigger=stop.wait))
        await eventually(lambda: app.queue in dccapi.RUNNING or server.done(), what="the start")
        try:
            yield Service(port, engine, app.queue)
        finally:
            stop.set()
            await server


def certificate() -> tuple[str, str]:
    directory = HERE / "certs"
    dccapi.make_certificate(directory)
    return str(directory / "cert.pem"), str(directory / "key.pem")


def client(service: Service, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=service.url, timeout=20, **options)


async def events_of(connection: H2Client, stream: int, timeout: float = 20) -> list[dict[str, Any]]:
    return [event async for event in connection.events(stream, timeout)]


def named(events: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event["data"] for event in events if event.get("data", {}).get("type") == kind]
