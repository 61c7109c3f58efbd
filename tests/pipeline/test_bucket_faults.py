"""What goes wrong between a client and an S3 server: nothing half-written, nothing done twice, one line for the user."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from proxy import Cut, proxy

from overfill.errors import UserError
from pipeline.objects import remote
from pipeline.objects.bucket import Bucket

MIB = 2**20


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Fewer tries, without pauses; the smallest parts that S3 takes."""
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    monkeypatch.setattr(remote, "BODY_ATTEMPTS", 2)
    monkeypatch.setattr(remote, "_PAUSE_S", 0.0)
    monkeypatch.setattr(remote, "PART", 5 * MIB)


def backend() -> Any:
    """The server's memory; it runs in this process."""
    from moto.s3.models import s3_backends

    return s3_backends["123456789012"]["aws"]


def assert_nothing_is_left(url: str) -> None:
    """Neither an object nor an upload that nobody will finish."""
    bucket = backend().buckets[url.removeprefix("s3://")]
    assert list(bucket.keys) == [] and list(bucket.multiparts) == []


def test_listings_have_more_than_one_page(on_s3):
    keys = [f"a/{number:04}/x" for number in range(1_005)]
    for key in keys:
        backend().put_object(on_s3.removeprefix("s3://"), key, b"x")
    bucket = Bucket(on_s3)
    assert list(bucket.list("a/")) == keys
    assert bucket.names("a/") == [f"{number:04}" for number in range(1_005)]
    bucket.remove_below("a/")
    assert_nothing_is_left(on_s3)


def test_a_console_s_empty_folder_is_no_object(on_s3):
    backend().put_object(on_s3.removeprefix("s3://"), "a/", b"")
    bucket = Bucket(on_s3)
    assert bucket.list() == {} and bucket.names("a/") == []


def test_a_create_whose_answer_was_lost_has_created(on_s3, s3, monkeypatch):
    lost: list[bytes] = []

    def rule(first: bytes) -> Cut:
        if not first.startswith(b"PUT") or lost:
            return Cut()
        lost.append(first)
        return Cut(answer=0)

    with proxy(s3.port, rule) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        bucket = Bucket(on_s3)
        assert bucket.create("lease", b"my token") and len(lost) == 1
        lost.clear()
        assert not bucket.create("lease", b"another token") and len(lost) == 1
    assert bucket_there(on_s3, s3, monkeypatch).read("lease") == b"my token"


def bucket_there(url: str, s3: Any, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket without a proxy."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    return Bucket(url)


@pytest.mark.parametrize("size", [2 * MIB, 11 * MIB], ids=["one request", "parts"])
def test_an_upload_that_is_cut_leaves_nothing(on_s3, s3, monkeypatch, tmp_path, size):
    (tmp_path / "file").write_bytes(os.urandom(size))
    with proxy(s3.port, lambda first: Cut(request=MIB)) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        with pytest.raises(OSError, match="folder/file") as caught:
            Bucket(on_s3).upload(tmp_path / "file", "folder/file")
    assert "\n" not in str(caught.value)
    assert_nothing_is_left(on_s3)


def test_an_upload_that_is_cut_once_is_whole(on_s3, s3, monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(os.urandom(11 * MIB))
    cuts = iter([Cut(), Cut(request=MIB), Cut(answer=0)])  # the start of the upload passes, two of three parts do not
    with proxy(s3.port, lambda first: next(cuts, Cut())) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        bucket = Bucket(on_s3)
        bucket.upload(tmp_path / "file", "file")
        assert bucket.read("file") == (tmp_path / "file").read_bytes()


def test_an_upload_whose_file_cannot_be_read_leaves_nothing(on_s3, monkeypatch, tmp_path):
    class Failing(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            if self.tell() >= 10 * MIB:
                raise OSError(errno.EIO, "a bad block")
            return super().read(size) or b""

    monkeypatch.setattr("s3fs.core.open", lambda path, mode: Failing(path, mode), raising=False)
    (tmp_path / "file").write_bytes(bytes(11 * MIB))
    with pytest.raises(OSError, match="a bad block"):
        Bucket(on_s3).upload(tmp_path / "file", "file")
    assert_nothing_is_left(on_s3)


@pytest.mark.parametrize("size", [2 * MIB, 11 * MIB], ids=["one request", "parts"])
def test_a_download_that_is_cut_leaves_no_file(on_s3, s3, monkeypatch, tmp_path, size):
    backend().put_object(on_s3.removeprefix("s3://"), "file", os.urandom(size))
    with proxy(s3.port, lambda first: Cut(answer=MIB)) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        with pytest.raises(OSError, match="file"):
            Bucket(on_s3).download("file", tmp_path / "new" / "file")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("size", [2 * MIB, 11 * MIB], ids=["one request", "parts"])
def test_a_download_that_is_cut_once_is_whole(on_s3, s3, monkeypatch, tmp_path, size):
    data = os.urandom(size)
    backend().put_object(on_s3.removeprefix("s3://"), "file", data)
    cuts = iter([Cut(), Cut(answer=MIB)])  # the look at the object passes
    with proxy(s3.port, lambda first: next(cuts, Cut())) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        bucket = Bucket(on_s3)
        bucket.download("file", tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == data and next(cuts, None) is None


def test_an_object_that_changes_while_it_is_read_is_read_again(on_s3, s3, monkeypatch, tmp_path):
    name = on_s3.removeprefix("s3://")
    backend().put_object(name, "file", b"a" * 11 * MIB)
    ranges: list[bytes] = []

    def rule(first: bytes) -> Cut:
        if b"range: bytes=" in first.lower():
            ranges.append(first)
            if len(ranges) == 2:
                backend().put_object(name, "file", b"b" * 11 * MIB)
        return Cut()

    with proxy(s3.port, rule) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        Bucket(on_s3).download("file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"b" * 11 * MIB and len(ranges) == 6


def test_a_full_disk_names_the_file_and_not_the_bucket(on_s3, monkeypatch, tmp_path):
    backend().put_object(on_s3.removeprefix("s3://"), "file", b"x")

    def full(path: str, mode: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("s3fs.core.open", full, raising=False)
    with pytest.raises(OSError, match="No space left") as caught:
        Bucket(on_s3).download("file", tmp_path / "copy")
    assert caught.value.errno == errno.ENOSPC and str(caught.value.filename).startswith(str(tmp_path))


def test_a_forked_process_connects_anew(on_s3):
    bucket = Bucket(on_s3)
    bucket.write("a", b"1")
    child = multiprocessing.get_context("fork").Process(target=lambda: os._exit(7 if bucket.read("a") == b"1" else 1))
    child.start()
    child.join(20)
    assert child.exitcode == 7


class Scripted(BaseHTTPRequestHandler):
    """Answers every request with the next of the server's answers, the last one for ever."""

    protocol_version = "HTTP/1.1"  # whose clients are told to send what they have announced

    def answer(self) -> None:
        server: Any = self.server
        status, code = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>because\nof it</Message></Error>".encode()
        self.send_response(status)
        body = body if status >= 300 and self.command != "HEAD" else b""
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def scripted(on_s3, monkeypatch):
    """A server that answers as told; a bucket there."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.answers = []
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    yield server
    server.shutdown()
    server.server_close()


def test_a_create_that_met_another_is_tried_again(scripted):
    scripted.answers = [(409, "ConditionalRequestConflict"), (409, "ConditionalRequestConflict"), (200, "")]
    assert Bucket("s3://bucket").create("a", b"1")
    scripted.answers = [(409, "ConditionalRequestConflict")]
    with pytest.raises(OSError, match="all the time"):
        Bucket("s3://bucket").create("a", b"1")


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (403, "AccessDenied", PermissionError),
        (503, "SlowDown", OSError),
        (500, "InternalError", OSError),
        (400, "SomethingNew", OSError),
    ],
)
def test_an_error_is_one_line_about_the_object(scripted, status, code, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    monkeypatch.setattr(remote, "QUICK_ATTEMPTS", 1)
    scripted.answers = [(status, code)]
    bucket = Bucket("s3://bucket/x")
    for action in (
        lambda: bucket.read("a/b"),
        lambda: bucket.write("a/b", b"1"),
        lambda: bucket.create("a/b", b"1"),
        lambda: bucket.download("a/b", tmp_path / "copy"),
        lambda: bucket.list("a/b/"),
        lambda: bucket.remove(["a/b"]),
    ):
        with pytest.raises(kind) as caught:
            action()
        assert "s3://bucket/x/" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="s3://bucket/x: ") as told:
        bucket.check()
    assert "\n" not in str(told.value)


def refusal(url: str) -> str:
    """What `check` tells the user, at once."""
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        Bucket(url).check()
    assert time.monotonic() - start < 8.0 and "\n" not in str(caught.value) and url in str(caught.value)
    return str(caught.value)


def test_a_bucket_that_is_not_there(on_s3):
    assert "create it, or correct its name" in refusal("s3://nobody-s-bucket/x")
    assert "Invalid bucket name" in refusal("s3://not*a*name/x")


def test_a_server_that_is_not_there(on_s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    message = refusal(on_s3)
    assert "set AWS_ENDPOINT_URL" in message and "127.0.0.1:9" in message
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9")
    assert "set AWS_ENDPOINT_URL" in refusal(on_s3)


def test_a_password_in_the_endpoint_is_not_shown(on_s3, monkeypatch):
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    monkeypatch.setattr(remote, "QUICK_ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://someone:s3cret@127.0.0.1:9/a b")
    assert "s3cret" not in refusal(on_s3)
    with pytest.raises(OSError, match=on_s3) as caught:
        Bucket(on_s3).read("a")
    assert "s3cret" not in str(caught.value) and caught.value.__suppress_context__


def test_no_credentials(on_s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE" in refusal(on_s3)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "nobody" in refusal(on_s3)


def test_access_denied(scripted, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "because")  # a server that repeats it
    scripted.answers = [(403, "SignatureDoesNotMatch")]
    message = refusal("s3://bucket/x")
    assert "*** of it; check AWS_ACCESS_KEY_ID" in message and "because" not in message


def test_google_s_answers(gs, monkeypatch):
    assert "create the bucket, or correct its name" in refusal("gs://missing/x")
    lost: list[bytes] = []

    def rule(first: bytes) -> Cut:
        if not first.startswith(b"POST") or lost:
            return Cut()
        lost.append(first)
        return Cut(answer=0)

    with proxy(gs.server_address[1], rule) as port:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        assert Bucket("gs://bucket").create("lease", b"my token") and len(lost) == 1
    monkeypatch.setattr("pipeline.objects.gs._CHECK_S", 1.0)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    assert "no answer within 1 s; Google cannot be reached" in refusal("gs://bucket/x")


def test_a_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    assert "name a folder" in refusal(f"file://{tmp_path}/file/x")


def test_the_library_is_named_that_is_missing(monkeypatch):
    monkeypatch.setattr("pipeline.objects.bucket.find_spec", lambda name: None)
    for scheme, library in (("s3", "s3fs"), ("gs", "gcsfs")):
        with pytest.raises(UserError, match=rf"{library} is not installed; run: pip install 'overfill\[{scheme}\]'"):
            Bucket(f"{scheme}://bucket/x")


def test_the_store_does_not_load_what_only_object_stores_need():
    code = "import sys, pipeline.store, pipeline.objects.bucket; print({'fsspec', 's3fs', 'botocore'} & {*sys.modules})"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "set()"
