"""Objects below a URL: the same promises for a folder, for memory, for a real S3 protocol server, and for
our own of Google's."""

from __future__ import annotations

import os
import pickle
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from s3_server import s3_process

from overfill.errors import UserError
from pipeline.objects import remote
from pipeline.objects.bucket import Bucket

ODD = ("a b", "a+b", "100%25", "häuser/ß 漢字", "[x]*?", "a#b&c=d", "quote'\"", "~x/.y", "x" * 200)
"""Keys that somebody's URL quoting, pattern or file system might take for others."""


@pytest.fixture(params=["file", "memory", "s3", "gs"])
def bucket(request, tmp_path) -> Bucket:
    """An empty place of every kind."""
    if request.param == "file":
        return Bucket(f"file://{tmp_path}/objects")
    if request.param == "memory":
        return Bucket(f"memory://{uuid.uuid4().hex}/")
    if request.param == "gs":
        request.getfixturevalue("gs")
        return Bucket("gs://bucket/some where/below/")
    return Bucket(f"{request.getfixturevalue('on_s3')}/some where/below/")


def test_nothing_is_there_at_first(bucket):
    bucket.check()
    assert bucket.list() == bucket.list("a/") == {}
    assert bucket.names() == bucket.names("a/") == []
    assert bucket.read("a") is None
    bucket.remove(["a", "b/c"])
    bucket.remove_below("a/")


def test_an_object_is_replaced_and_its_version_changes(bucket):
    bucket.write("a/b", b"one")
    first = bucket.list()["a/b"]
    bucket.write("a/b", b"two")
    second = bucket.list()["a/b"]
    assert bucket.read("a/b") == b"two"
    assert first.size == second.size == 3 and first.version != second.version
    assert bucket.list()["a/b"] == second
    assert abs(first.written - time.time()) < 60


def test_odd_keys_are_taken_literally(bucket, tmp_path):
    for key in ODD:
        assert bucket.create(key, key.encode()) and not bucket.create(key, b"2"), key
    assert list(bucket.list()) == sorted(ODD)
    assert bucket.names() == sorted(key.partition("/")[0] for key in ODD)
    for key in ODD:
        assert bucket.read(key) == key.encode(), key
        bucket.download(key, tmp_path / "copy")
        assert (tmp_path / "copy").read_text() == key
        bucket.upload(tmp_path / "copy", key)
    bucket.remove(ODD[1:])
    assert list(bucket.list()) == [ODD[0]]


def test_listings_are_of_what_is_below_and_sorted(bucket):
    for key in ("b/2", "b/1/x", "a", "b2/y", "c/d/e"):
        bucket.write(key, b"x")
    assert list(bucket.list()) == ["a", "b/1/x", "b/2", "b2/y", "c/d/e"]
    assert list(bucket.list("b/")) == ["b/1/x", "b/2"]
    assert bucket.names() == ["a", "b", "b2", "c"]
    assert bucket.names("b/") == ["1", "2"]
    bucket.remove_below("b/")
    assert list(bucket.list()) == ["a", "b2/y", "c/d/e"] and bucket.names() == ["a", "b2", "c"]
    bucket.remove_below("")
    assert bucket.names() == []


def test_of_many_creators_one_succeeds(bucket):
    barrier = threading.Barrier(16)

    def create(number: int) -> bool:
        barrier.wait()
        return bucket.create("lease", b"%d" % number)

    with ThreadPoolExecutor(16) as pool:
        created = list(pool.map(create, range(16)))
    assert sum(created) == 1 and bucket.read("lease") == b"%d" % created.index(True)


def test_files_of_every_size_come_back(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PART", 5 * 2**20)  # the smallest that S3 takes
    for size in (0, 1, 11 * 2**20):
        given = tmp_path / "given"
        given.write_bytes(os.urandom(size))
        bucket.upload(given, "folder/file")
        assert bucket.list()["folder/file"].size == size
        bucket.download("folder/file", tmp_path / "new" / "copy")
        assert (tmp_path / "new" / "copy").read_bytes() == given.read_bytes()
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "copy"]


def test_a_missing_key_leaves_no_file(bucket, tmp_path):
    (tmp_path / "copies").mkdir()
    with pytest.raises(FileNotFoundError):
        bucket.download("a/b", tmp_path / "copies" / "copy")
    assert list((tmp_path / "copies").iterdir()) == []


def test_a_missing_file_is_named(bucket, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        bucket.upload(tmp_path / "missing", "a")
    with pytest.raises(FileNotFoundError):
        bucket.upload(tmp_path, "a")
    assert bucket.list() == {}


def test_a_bucket_travels_as_its_url(bucket):
    bucket.write("a", b"1")
    copy = pickle.loads(pickle.dumps(bucket))
    assert copy.url == bucket.url and copy.read("a") == b"1"


@pytest.mark.parametrize("key", ["", "/a", "a//b", "../a", "a/../b", "./a", "a/"])
def test_what_is_no_key_is_refused(key):
    with pytest.raises(ValueError, match="not a key"):
        Bucket("memory://x").write(key, b"")


@pytest.mark.parametrize("prefix", ["/", "a", "../", "a//"])
def test_what_is_no_prefix_is_refused(prefix):
    with pytest.raises(ValueError, match="not a"):
        Bucket("memory://x").list(prefix)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://host/x", "not a place for objects"),
        ("runs", "not a place for objects"),
        ("s3://", "give s3://BUCKET/PREFIX"),
        ("s3:///x", "give s3://BUCKET/PREFIX"),
        ("file://x", "give file:///FOLDER"),
        ("s3://key:s3cret@bucket/x", "credentials in a URL"),
        ("s3://bucket/x?secret_key=s3cret", "credentials in a URL"),
    ],
)
def test_what_is_no_url_is_refused(url, reason):
    with pytest.raises(UserError, match=reason) as caught:
        Bucket(url)
    assert "s3cret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_in_a_process_of_its_own(monkeypatch):
    with s3_process() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        bucket = Bucket(server.url("bucket"))
        bucket.write("a", b"1")
        assert bucket.names() == ["a"]
