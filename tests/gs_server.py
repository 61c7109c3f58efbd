"""As much of Google Cloud Storage's JSON protocol as `pipeline.objects.gs` speaks, on loopback, in this process.

Written from Google's description of the protocol, since no such server can be installed with pip: it holds what gcsfs
sends and how its answers are read, not that Google would answer so."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class GSServer(ThreadingHTTPServer):
    """Objects of all buckets; every bucket is there but those called `missing`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[tuple[str, str], tuple[bytes, int, str]] = {}
        """Bucket and name -> content, generation, when it was written."""
        self.sessions: dict[str, tuple[str, str, bool, bytearray]] = {}
        """Of resumable uploads: bucket, name, whether nothing may be there, what came so far."""
        self.lock = threading.Lock()
        self.numbers = count(1)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use it, without any credentials."""
        return {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self.server_address[1]}", "NO_GCE_CHECK": "true"}

    def put(self, bucket: str, name: str, data: bytes, only_new: bool) -> dict[str, str] | None:
        """The object's description; None when it may not be written."""
        with self.lock:
            if only_new and (bucket, name) in self.objects:
                return None
            self.objects[bucket, name] = (data, next(self.numbers), f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}")
            return self.description(bucket, name)

    def description(self, bucket: str, name: str) -> dict[str, str]:
        """As the protocol writes it, numbers as texts."""
        data, generation, updated = self.objects[bucket, name]
        numbers = {"size": str(len(data)), "generation": str(generation)}
        return {"bucket": bucket, "name": name, "updated": updated, **numbers}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 2**16  # head and body in one packet: two of them wait 40 ms for each other
    server: GSServer

    def do_GET(self) -> None:
        bucket, name, query = self._target()
        if bucket == "missing":
            self._send(404)
        elif name is None:
            self._list(bucket, query)
        elif (bucket, name) not in self.server.objects:
            self._send(404)
        elif query.get("alt") == "media":
            self._send(200, self.server.objects[bucket, name][0])
        else:
            self._send(200, self.server.description(bucket, name))

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        found: dict[str, bool] = {}
        for inside, name in list(self.server.objects):
            if inside == bucket and name.startswith(prefix):
                first, mark, _ = (
                    name[len(prefix) :].partition(delimiter) if delimiter else (name[len(prefix) :], "", "")
                )
                found[prefix + first + mark] = bool(mark)
        start, most = (
            int(query.get("pageToken", 0)),
            int(query.get("maxResults", 3)),
        )  # pages of three: there are several
        page = sorted(found)[start : start + most]
        answer: dict[str, Any] = {"kind": "storage#objects", "prefixes": [name for name in page if found[name]]}
        answer["items"] = [self.server.description(bucket, name) for name in page if not found[name]]
        if start + most < len(found):
            answer["nextPageToken"] = str(start + most)
        self._send(200, answer)

    def do_POST(self) -> None:
        bucket, name, query = self._target()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        only_new = query.get("ifGenerationMatch") == "0"
        if bucket == "session":
            self._chunk(str(name), body)
        elif query["uploadType"] == "resumable":
            session = str(next(self.server.numbers))
            self.server.sessions[session] = (bucket, query["name"], only_new, bytearray())
            place = f"http://127.0.0.1:{self.server.server_address[1]}/b/session/o/{session}"
            self._send(200, {}, Location=place)
        else:
            _, described, content, _ = (
                body.split(b"--==0==")[:4] if body.count(b"--==0==") == 3 else (b"", b"", b"", b"")
            )
            wanted = json.loads(described.partition(b"\n\n")[2])["name"]
            self._put(bucket, wanted, content.partition(b"\n\n")[2][:-1], only_new)

    def _chunk(self, session: str, body: bytes) -> None:
        bucket, name, only_new, so_far = self.server.sessions[session]
        so_far += body
        if len(so_far) < int(self.headers["Content-Range"].rpartition("/")[2]):
            self._send(308, b"", Range=f"bytes=0-{len(so_far) - 1}")
        else:
            del self.server.sessions[session]
            self._put(bucket, name, bytes(so_far), only_new)

    def _put(self, bucket: str, name: str, data: bytes, only_new: bool) -> None:
        written = self.server.put(bucket, name, data, only_new)
        self._send(200 if written else 412, written or {})

    def do_DELETE(self) -> None:
        bucket, name, _ = self._target()
        if bucket == "session":
            self.server.sessions.pop(str(name))
            self._send(499)
        else:
            self._send(204 if self.server.objects.pop((bucket, str(name)), None) else 404)

    def _target(self) -> tuple[str, str | None, dict[str, str]]:
        """Bucket, object and query of `.../b/BUCKET/o/OBJECT?...`."""
        parts = urlsplit(self.path)
        bucket, _, name = parts.path.partition("/b/")[2].partition("/o")
        return (
            bucket,
            unquote(name[1:]) if name else None,
            {key: value[0] for key, value in parse_qs(parts.query).items()},
        )

    def _send(self, status: int, content: dict[str, Any] | bytes = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def gs_server() -> Iterator[GSServer]:
    """A server in a thread of this process."""
    with GSServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
