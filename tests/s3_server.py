"""A real S3 protocol server on loopback: moto's, with its own memory, in this process or in one of its own.

    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        Bucket(server.url("bucket"))

`s3_process` is the same; `environment` may be handed to subprocesses of either.
Requests are answered one at a time: moto looks whether an object is there and then writes it, without a lock."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class S3Server:
    """Where the server is."""

    port: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use it, whatever else the machine's environment and files say."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def url(self, bucket: str) -> str:
        """`s3://bucket`, made if need be."""
        with urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/{bucket}", method="PUT")):
            return f"s3://{bucket}"


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server in a thread of this process."""
    server = _server(0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield S3Server(server.server_address[1])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def s3_process() -> Iterator[S3Server]:
    """A server in a process of its own, which ends with this one."""
    command = [sys.executable, str(Path(__file__).resolve())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield S3Server(int(process.stdout.readline()))
        finally:
            process.stdin.close()


def _server(port: int) -> Any:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = _one_at_a_time(DomainDispatcherApplication(create_backend_app))
    return make_server("127.0.0.1", port, application, threaded=True, request_handler=MotoRequestHandler)


def _one_at_a_time(application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    lock = threading.Lock()

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        with lock:
            return application(environ, start)

    return answer


def main() -> None:
    """Print the port, serve until the parent's end of standard input is closed."""
    with s3_server() as server:
        print(server.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
