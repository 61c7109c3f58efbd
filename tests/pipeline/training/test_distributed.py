from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from overfill.errors import UserError
from pipeline.training.distributed import Place, joined


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done with a process group, in place of doing it."""
    made: list[str] = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: made.append("join"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: made.append("leave"))
    return made


def test_a_worker_with_an_error_keeps_its_connections_so_that_no_peer_fails_before_the_cause_is_told(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.setenv(name, "")
    place = Place(1, 2, torch.device("cpu"))
    with joined(place, torch.get_num_threads()):
        assert calls == ["join"]
    assert calls == ["join", "leave"]
    with pytest.raises(UserError), joined(place, torch.get_num_threads()):
        raise UserError("data.path: no such file")
    assert calls == ["join", "leave", "join"]
