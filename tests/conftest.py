"""Two files of tests at a time (`make test`). A test that is marked `slow` or `alone` has none beside it.

Two tests in Chromium, or with the real model, take each other's processor, and Chromium ends its connections when a
network of podman's comes or goes.
"""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest


class Turns:
    """Of one worker of pytest-xdist. Who waits to be alone keeps others from beginning, so it waits for one test."""

    def __init__(self, run: str) -> None:
        place = Path(tempfile.gettempdir())
        self._door, self._room = place / f"dccapi-tests-{run}.door", place / f"dccapi-tests-{run}.room"

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        with self._door.open("w") as door, self._room.open("w") as room:
            fcntl.flock(door, fcntl.LOCK_EX)
            is_alone = item.get_closest_marker("alone") or item.get_closest_marker("slow")
            fcntl.flock(room, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
            fcntl.flock(door, fcntl.LOCK_UN)
            return (yield)

    def pytest_unconfigure(self) -> None:
        self._door.unlink(missing_ok=True)
        self._room.unlink(missing_ok=True)


def pytest_configure(config: pytest.Config) -> None:
    # A plugin, because the hooks of this file are not asked for the tests of `test_dccapi.py`.
    if worker := getattr(config, "workerinput", None):
        config.pluginmanager.register(Turns(worker["testrunuid"]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
