"""Fixtures of the pipeline's tests."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from gs_server import GSServer, gs_server
from s3_server import S3Server, s3_server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """An S3 server for all tests, which take a bucket of their own each, and its `environment` by monkeypatch."""
    with s3_server() as server:
        yield server


@pytest.fixture
def on_s3(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty bucket; the environment is the server's."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3.url(f"test-{uuid.uuid4().hex}")


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[GSServer]:
    """A server of Google's protocol, empty; the environment is the server's."""
    with gs_server() as server:
        for name, value in {**server.environment, "HOME": str(tmp_path)}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
        yield server
