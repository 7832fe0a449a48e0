"""What all tests share."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache() -> Iterator[None]:
    """Days that commands keep are kept for this session, not in the user's cache."""
    before, folder = os.environ.get("VOLCAL_CACHE_DIR"), tempfile.mkdtemp(prefix="volcal_cache_")
    os.environ["VOLCAL_CACHE_DIR"] = folder
    yield
    shutil.rmtree(folder, ignore_errors=True)
    os.environ.pop("VOLCAL_CACHE_DIR") if before is None else os.environ.update(VOLCAL_CACHE_DIR=before)


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """Each test leaves the root logger as it found it: every command sets its level and handlers for its process."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
