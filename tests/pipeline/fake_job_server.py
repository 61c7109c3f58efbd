"""A stand-in for a cluster's job server: a few answers over HTTP on loopback, and what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HEAD = {"CPU": 1.0, "memory": 8e9, "object_store_memory": 2e9, "node:__internal_head__": 1.0}
WORKER = {"CPU": 8.0, "GPU": 2.0, "memory": 64e9, "object_store_memory": 8e9, "accelerator_type:L4": 1.0}
KEPT = ("entrypoint", "runtime_env", "metadata", "entrypoint_memory", "entrypoint_resources")
"""Of what a job is submitted with."""


@dataclass
class FakeCluster:
    """What the server says; tests change it."""

    ray_version: str
    python_version: str
    nodes: list[dict[str, float]] = field(default_factory=lambda: [HEAD, WORKER, WORKER])
    token: str | None = None
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    packages: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    address: str = ""
    agentless: int = 0
    """So many jobs are refused, as by a head that has only just started."""

    def add_job(self, name: str, status: str = "RUNNING", code: int | None = None, **more: Any) -> None:
        """A job as the server tells of it."""
        self.jobs[name] = {
            "type": "SUBMISSION",
            "submission_id": name,
            "status": status,
            "entrypoint": "true",
            "start_time": 1000 * len(self.jobs),
            "driver_exit_code": code,
            "metadata": {"overfill_experiment": "toy"},
            **more,
        }

    def end(self, name: str, status: str, code: int | None) -> None:
        """The job ends."""
        self.jobs[name] |= {"status": status, "driver_exit_code": code}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """(HTTP status, JSON or text) of a request."""
        path = path.partition("?")[0]
        if path.startswith("/api/packages/"):
            if method == "PUT":
                self.packages[path.rsplit("/", 1)[1]] = body
            return (200 if path.rsplit("/", 1)[1] in self.packages else 404), ""
        if path == "/api/jobs/" and method == "POST":
            job = json.loads(body)
            if self.agentless:
                self.agentless -= 1
                return 500, "No available agent to submit job, please try again later."
            if job["submission_id"] in self.jobs:
                return 500, f"Traceback\nValueError: Job with submission_id {job['submission_id']} already exists."
            self.add_job(job["submission_id"], **{k: job[k] for k in KEPT if job.get(k) is not None})
            return 200, {"job_id": job["submission_id"], "submission_id": job["submission_id"]}
        if path.startswith("/api/jobs/") and path != "/api/jobs/":
            name, _, rest = path.removeprefix("/api/jobs/").partition("/")
            if name not in self.jobs:
                return 404, f"Job {name} does not exist"
            if rest == "stop":
                self.end(name, "STOPPED", None)
            return 200, {"stop": {"stopped": True}, "logs": {"logs": "said\n"}}.get(rest, self.jobs[name])
        data = {
            "/api/version": {"version": "4", "ray_version": self.ray_version},
            "/api/v0/cluster_metadata": {"data": {"pythonVersion": self.python_version}},
            "/api/v0/nodes": {"data": {"result": {"result": self._nodes()}}},
            "/api/cluster_status": {"data": {"clusterStatus": {"loadMetricsReport": {"usage": {"CPU": [3.5, 17.0]}}}}},
            "/api/jobs/": list(self.jobs.values()),
        }
        return (200, data[path]) if path in data else (404, "not found")

    def _nodes(self) -> list[dict[str, Any]]:
        alive = [{"state": "ALIVE", "resources_total": node} for node in self.nodes]
        return [*alive, {"state": "DEAD", "resources_total": {"CPU": 1000.0, "GPU": 1000.0}}]


@contextmanager
def serving(cluster: FakeCluster) -> Iterator[FakeCluster]:
    """The server on a free port while inside; its address is `cluster.address`."""

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            cluster.requests.append(f"{self.command} {self.path}")
            if self.path == "/api/authentication_mode":
                status, content = 200, {"authentication_mode": "token" if cluster.token else "disabled"}
            elif cluster.token and self.headers.get("authorization") != f"Bearer {cluster.token}":
                status, content = (403 if self.headers.get("authorization") else 401), "no"
            else:
                status, content = cluster.answer(self.command, self.path, body)
            text = content if isinstance(content, str) else json.dumps(content)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = do_PUT = handle_any

        def log_message(self, *arguments: Any) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    cluster.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
