"""A cluster's job server over HTTP: Ray's own client, with one line for everything that goes wrong.

Nothing here starts Ray or joins the cluster: the client asks for versions, nodes and jobs, and uploads a package. A
token is sent when the server asks for one, found where Ray looks (`RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH`,
`~/.ray/auth_token`) and never shown.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray.dashboard.modules.dashboard_sdk import SubmissionClient
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from overfill.errors import UserError
from pipeline.masking import mask_uri
from pipeline.submission.fitting import NodeShape

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
"""Where `ray dashboard cluster.yaml` forwards a cluster's job server to."""
TIMEOUT_S = (10.0, 120.0)
"""To connect, and to answer."""
SILENCE_S = 60.0
"""A log that says nothing for so long is asked for anew: a connection that died in its sleep looks the same."""
_WAY_IN = "set RAY_AUTH_TOKEN, or put the cluster's token into ~/.ray/auth_token (`ray get-auth-token` on its head)"


for _name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # that a package is uploaded and a connection closed


NO_AGENT = "No available agent"
"""What Ray says of a head that cannot start jobs yet."""
AGENT_S = 60.0
"""How long we wait for it."""
AGENT_POLL_S = 1.0
"""Between two questions; Ray itself waits for seconds before it answers."""


class Refused(UserError):
    """The server answered a request with an error."""


class JobServer(JobSubmissionClient):
    """The job server at an address. Raises UserError when there is none, or when it does not let us in."""

    def __init__(self, address: str | None) -> None:
        url = server_url(address)
        self.shown = mask_uri(url)
        self._client_ray_version = ray.__version__
        _prepare_token(url)
        # Not the constructor of the class between: there $RAY_ADDRESS goes before what the user gave.
        SubmissionClient.__init__(self, address=url)
        self.ray_version = str(self._get("/api/version").get("ray_version", "unknown"))

    def python_version(self) -> str:
        """Of the head node."""
        return str(self._get("/api/v0/cluster_metadata")["data"]["pythonVersion"])

    def nodes(self) -> list[NodeShape]:
        """The nodes that are alive."""
        found = self._get("/api/v0/nodes?limit=10000")["data"]["result"]["result"]
        return [NodeShape(node["resources_total"]) for node in found if node["state"] == "ALIVE"]

    def usage(self) -> dict[str, tuple[float, float]]:
        """CPU and GPU -> (used, there); empty before the cluster's first report."""
        status = self._get("/api/cluster_status")["data"].get("clusterStatus") or {}
        usage = (status.get("loadMetricsReport") or {}).get("usage") or {}
        return {kind: (float(usage[kind][0]), float(usage[kind][1])) for kind in ("CPU", "GPU") if kind in usage}

    def submit_job(self, *, patience: float = AGENT_S, **job: Any) -> str:
        """As Ray's, but a head that has just started may take some time until it can start jobs."""
        end = time.monotonic() + patience
        while True:
            try:
                return super().submit_job(**job)
            except Refused as error:
                if NO_AGENT not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(AGENT_POLL_S)

    def tail(self, job: str, write: Callable[[str], None], skip: int) -> int:
        """Write what the job's log says beyond its first `skip` characters, until it ends or the connection does.

        Returns how many characters of the log are known then."""
        return asyncio.run(self._tail(job, write, skip))

    async def _tail(self, job: str, write: Callable[[str], None], skip: int) -> int:
        known, stream = 0, self.tail_job_logs(job)
        while True:
            try:
                text = await asyncio.wait_for(anext(stream), SILENCE_S)
            except (StopAsyncIteration, TimeoutError, aiohttp.ClientError, OSError, RuntimeError):
                return max(known, skip)  # whether the job has ended is asked elsewhere
            known += len(text)
            if known > skip:
                write(text[-(known - skip) :])
                skip = known

    def _get(self, path: str) -> dict[str, Any]:
        answer = self._do_request("GET", path)
        if answer.status_code != requests.codes.ok:
            self._raise_error(answer)
        try:
            content = answer.json()
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise UserError(f"--address {self.shown}: something answers there, but it is not Ray's job server")
        return content

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        try:
            return super()._do_request(method, endpoint, timeout=TIMEOUT_S, **options)
        except AuthenticationError as error:
            raise UserError(f"--address {self.shown}: the cluster does not accept this token; {_WAY_IN}") from error
        except requests.RequestException as error:
            raise unreachable(self.shown, error) from error

    def _raise_error(self, r: requests.Response) -> NoReturn:
        lines = [line.strip() for line in r.text.splitlines() if line.strip()]
        raise Refused(f"--address {self.shown}: {lines[-1][:300] if lines else f'the server answered {r.status_code}'}")


def server_url(address: str | None) -> str:
    """The job server's URL: as given, else `$RAY_API_SERVER_ADDRESS`, an http `$RAY_ADDRESS`, or this machine's port."""
    given = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS", "")
    if not address and not given.startswith(("http://", "https://")):
        given = DEFAULT_ADDRESS
    url = given if "://" in given else f"http://{given}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--address {mask_uri(given)}: give the address of the job server, as http://HOST:8265")
    return url.rstrip("/")


def unreachable(shown: str, error: requests.RequestException) -> UserError:
    """The sentence for a server that does not answer."""
    reasons = {"refused": "connection refused", "resolve": "unknown host", "unreachable": "host unreachable"}
    told = (reason for word, reason in reasons.items() if word in str(error))
    reason = "no answer in time" if isinstance(error, requests.Timeout) else next(told, type(error).__name__)
    return UserError(
        f"--address {shown}: no job server answers ({reason}); is the cluster up, and `ray dashboard` open towards it?"
    )


def _prepare_token(url: str) -> None:
    """Let Ray send its token where the server asks for one, also when $RAY_AUTH_MODE says nothing.

    Raises UserError when there is no token to send: Ray itself aborts the process over a token file that is missing."""
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is None and _asks_for_token(url):
        from ray._private.authentication.authentication_token_setup import _enable_token_auth

        _enable_token_auth()
        mode = "token"
    if mode == "token" and not _has_token():
        raise UserError(f"--address {mask_uri(url)}: the cluster asks for a token, and there is none; {_WAY_IN}")


def _asks_for_token(url: str) -> bool:
    try:
        answer = requests.get(f"{url}/api/authentication_mode", timeout=TIMEOUT_S)
        return answer.status_code == requests.codes.ok and answer.json().get("authentication_mode") == "token"
    except requests.JSONDecodeError:
        return False  # not Ray, which the first request says
    except requests.RequestException as error:
        raise unreachable(mask_uri(url), error) from error


def _has_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return True
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return bool(path.read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return False


def check_versions(server: JobServer) -> None:
    """Raise UserError unless Ray and Python are those of this machine, up to the patch release.

    The code that travels is written against one Ray, and what it pickles between processes is one Python's."""
    here, there = ray.__version__, server.ray_version
    if here.split(".")[:2] != there.split(".")[:2]:
        raise UserError(
            f"--address {server.shown}: the cluster runs Ray {there}, this machine {here}; install ray=={there} here, "
            "or set the cluster up anew with this project's constraints.txt"
        )
    python = server.python_version()
    own = ".".join(map(str, sys.version_info[:3]))
    if python.split(".")[:2] != own.split(".")[:2]:
        raise UserError(
            f"--address {server.shown}: the cluster runs Python {python}, this machine {own}; submit from Python "
            f"{'.'.join(python.split('.')[:2])}, or set the cluster up with the other"
        )
