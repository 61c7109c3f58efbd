"""Fixtures of the pipeline's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from s3_server import S3Server, s3_server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """An S3 server for all tests, which take a bucket of their own each, and its `environment` by monkeypatch."""
    with s3_server() as server:
        yield server
