"""Samples of a cluster's use: written while a sweep runs, and what `status` makes of them."""

from __future__ import annotations

import time

import pytest

from pipeline.utilisation import FILE, GAP_S, Sample, Sampler, in_use, mean_share, read_samples, recorded_line


def sample(moment: float, used: float, waiting: int) -> Sample:
    return Sample(moment, {"CPU": (1.0, 64.0), "GPU": (used, 8.0)}, waiting)


def test_what_is_idle_while_cells_wait_is_told_apart():
    # Ten seconds full, ten half idle with cells waiting, ten half idle at the end, when nothing waits.
    samples = [sample(0, 8, 3), sample(10, 8, 3), sample(20, 4, 1), sample(30, 4, 0)]
    assert mean_share(samples) == pytest.approx((2 / 3, 1 / 6))
    line = recorded_line(samples, now=31.0)
    assert (
        line
        == "cluster now: 1 of 64 CPU, 4 of 8 GPU in use; GPUs over the run: 67% in use, 17% idle while cells waited"
    )


def test_between_two_drivers_nobody_looked():
    samples = [sample(0, 8, 0), sample(10, 8, 0), sample(10 + 2 * GAP_S, 8, 5), sample(20 + 2 * GAP_S, 0, 5)]
    assert mean_share(samples) == pytest.approx((0.5, 0.5))
    assert "cluster at " in recorded_line(samples, now=1e6)


def test_without_gpus_it_is_about_cpus():
    samples = [Sample(t, {"CPU": (1.0, 2.0)}, 0) for t in (0.0, 5.0)]
    assert mean_share(samples) == (0.5, 0.0)
    assert "CPUs over the run: 50% in use" in recorded_line(samples, now=6.0)
    assert in_use({"CPU": (1.5, 2.0), "GPU": (0.0, 0.0)}) == "1.5 of 2 CPU in use"
    assert recorded_line(samples[:1], now=0.0) == in_use({}) == ""


def test_samples_are_appended_and_a_torn_line_is_left_out(tmp_path):
    with Sampler(tmp_path, lambda: {"CPU": (1.0, 2.0)}, lambda: 4, interval=0.02):
        deadline = time.monotonic() + 10
        while len(read_samples(tmp_path)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    found = read_samples(tmp_path)
    assert len(found) >= 3
    assert (found[0].usage, found[0].waiting) == ({"CPU": (1.0, 2.0)}, 4)
    with (tmp_path / FILE).open("a") as stream:
        stream.write('[12.0, {"CPU": [1')
    assert read_samples(tmp_path) == found
    assert read_samples(tmp_path / "nowhere") == []


def test_a_cluster_that_is_gone_does_not_take_the_run_with_it(tmp_path, caplog):
    def gone() -> dict:
        raise ConnectionError("no cluster")

    with Sampler(tmp_path, gone, lambda: 0, interval=0.01):
        deadline = time.monotonic() + 10
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "no longer recorded" in caplog.text
