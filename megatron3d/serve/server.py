"""One process that serves a classifier: a socket, uvicorn, a log line now and then, and an orderly end.

On SIGTERM or SIGINT no new requests are taken, those under way are answered, and the process ends with code 0.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import uvicorn

from megatron3d.errors import ConfigError
from megatron3d.serve.app import Service
from megatron3d.serve.connections import protocol_with_timeout

_HEADER_TIMEOUT_S = 10.0  # headers have a few hundred bytes; what takes longer is no client
_GRACE_S = 10  # answers take milliseconds; a client that reads slower than this is left


@dataclass(frozen=True)
class ListenAddress:
    """Where to listen (port 0 is any free one), and how often to log what was done, in seconds (0 is never)."""

    host: str
    port: int
    log_interval_s: float


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there, so that a port in use is found before the model is read; clients that come until
    then wait.

    Raises:
        ConfigError: the address is not to be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen()  # two processes may bind one address as long as none listens
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--host {host} --port {port} is not to be had ({error}); give another port, or 0 for any free one"
        ) from error
    return bound


def server_config(service: Service, *, header_timeout_s: float = _HEADER_TIMEOUT_S) -> uvicorn.Config:
    """How uvicorn runs the service; a request's headers have so many seconds to arrive."""
    return uvicorn.Config(
        service.app,
        http=protocol_with_timeout(header_timeout_s),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_GRACE_S,
        lifespan="on",
        ws="none",
        server_header=False,
    )


def serve(service: Service, bound: socket.socket, place: ListenAddress, *, log: Callable[[str], None]) -> None:
    """Serve until a signal asks for the end; called on the main thread."""
    server = uvicorn.Server(server_config(service))

    def end(*_: object) -> None:
        server.should_exit = True

    # uvicorn listens to signals while it runs. One that came just before counts too, and once uvicorn has ended in good
    # order it raises the signal again, when nothing is left to do.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    host = f"[{place.host}]" if ":" in place.host else place.host
    log(f"serving on http://{host}:{bound.getsockname()[1]}")
    asyncio.run(_serve(server, service, bound, place.log_interval_s, log))
    log(f"stopped; {_totals(service)}")


async def _serve(
    server: uvicorn.Server,
    service: Service,
    bound: socket.socket,
    log_interval_s: float,
    log: Callable[[str], None],
) -> None:
    reports = asyncio.create_task(_report(service, log_interval_s, log)) if log_interval_s else None
    await server.serve(sockets=[bound])
    if reports is not None:
        reports.cancel()


async def _report(service: Service, interval_s: float, log: Callable[[str], None]) -> None:
    """A line for each interval in which something was asked."""
    while True:
        before, began_s = replace(service.counts), time.monotonic()
        batches = service.batcher.counts.batches
        await asyncio.sleep(interval_s)
        now, elapsed_s = service.counts, time.monotonic() - began_s
        answered, samples = now.answered - before.answered, now.samples - before.samples
        refused, failed = now.refused - before.refused, now.failed - before.failed
        if answered + refused + failed == 0:
            continue
        mean_ms = 1e3 * (now.elapsed_s - before.elapsed_s) / max(1, answered)
        per_batch = samples / max(1, service.batcher.counts.batches - batches)
        log(
            f"{answered / elapsed_s:.1f} requests/s, {samples / elapsed_s:.1f} texts/s, {per_batch:.1f} texts a batch, "
            f"{mean_ms:.1f} ms a request; {refused} refused, {failed} failed"
        )


def _totals(service: Service) -> str:
    counts = service.counts
    return (
        f"{counts.answered} requests answered with {counts.samples} texts in {service.batcher.counts.batches} batches, "
        f"{counts.refused} refused, {counts.failed} failed"
    )
