"""Two or three files of tests at a time. A test that is marked `alone` has none beside it."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest


class Turns:
    """The locks of one worker of pytest-xdist. A test takes the door before the room, so one that waits to be alone
    keeps others from beginning."""

    def __init__(self, run: str) -> None:
        self._paths = [Path(tempfile.gettempdir(), f"dccapi-tests-{run}.{name}") for name in ("door", "room")]
        self._door, self._room = (path.open("w") for path in self._paths)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        fcntl.flock(self._door, fcntl.LOCK_EX)
        fcntl.flock(self._room, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        fcntl.flock(self._door, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(self._room, fcntl.LOCK_UN)

    def pytest_unconfigure(self) -> None:
        self._door.close()
        self._room.close()
        for path in self._paths:  # the other workers have them open
            path.unlink(missing_ok=True)


def pytest_configure(config: pytest.Config) -> None:
    # A plugin, because the hooks of this file are not asked for the tests of `test_dccapi.py`.
    if worker := getattr(config, "workerinput", None):
        config.pluginmanager.register(Turns(worker["testrunuid"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files of quick tests come last: they fill the time until the last long one has ended.
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)
