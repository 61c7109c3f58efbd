"""Fixtures of the pipeline's tests."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
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
