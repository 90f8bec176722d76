"""Processes that do not meet say where they were to meet, who was missing, and what to do."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch

from megatron3d.comm.join import join
from megatron3d.comm.launch import Launch
from megatron3d.errors import ConfigError, PeerError

CPU = torch.device("cpu")


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def meet(monkeypatch: pytest.MonkeyPatch, *, rank: int = 0, addr: str | None, port: int | None) -> None:
    for name, value in (("MASTER_ADDR", addr), ("MASTER_PORT", port)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, str(value))
    launch = Launch(rank=rank, world_size=2, master_addr=addr, master_port=None if port is None else str(port))
    join(launch, CPU, timeout=timedelta(seconds=2))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize(
    ("addr", "port", "missing"),
    [(None, None, "MASTER_ADDR and MASTER_PORT"), (None, 1, "MASTER_ADDR"), ("127.0.0.1", None, "MASTER_PORT")],
)
def test_ranks_without_a_place_to_meet_are_refused(
    monkeypatch: pytest.MonkeyPatch, addr: str | None, port: int | None, missing: str
) -> None:
    with pytest.raises(ConfigError, match=rf"WORLD_SIZE is 2.* without {missing} it .*; start with torchrun"):
        meet(monkeypatch, addr=addr, port=port)


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch, taken_port: int) -> None:
    with pytest.raises(ConfigError, match=f"MASTER_PORT {taken_port} on 127.0.0.1 is in use .*choose a free port"):
        meet(monkeypatch, addr="127.0.0.1", port=taken_port)


def test_a_rank_that_never_comes_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    with pytest.raises(PeerError, match=f"1 of 2 ranks came to 127.0.0.1:{port} within 0.0333333 minutes"):
        meet(monkeypatch, addr="127.0.0.1", port=port)


def test_a_first_rank_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    with pytest.raises(PeerError, match=f"rank 1 could not meet the others at 127.0.0.1:{port}"):
        meet(monkeypatch, rank=1, addr="127.0.0.1", port=port)
