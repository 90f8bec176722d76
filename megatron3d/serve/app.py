"""The HTTP side of a served classifier: POST /classify, GET /health, and a JSON sentence for everything else.

    {"error": {"status": 422, "message": "'text' is a number; it must be a string"}}

An ASGI application (Starlette), so that any ASGI server runs it; `server.py` does with uvicorn.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from megatron3d.serve.batcher import Batcher, BatchOptions
from megatron3d.serve.classifier import Classifier
from megatron3d.serve.requests import OVERLOADED, TOO_SLOW, RequestError, RequestLimits, parse, too_large

_BODY_TIMEOUT_S = 10.0  # a body has 1 MiB at most; a client without end would hold its connection for ever
_CLOSED = 499  # what a client that left before its answer counts as; it is not sent


@dataclass
class Counts:
    """What the service has done since it began: requests answered, refused (4xx, 503) and failed (500), samples, and
    the time that answered requests took in all; `in_progress` are those that it has not ended yet."""

    in_progress: int = 0
    answered: int = 0
    refused: int = 0
    failed: int = 0
    samples: int = 0
    elapsed_s: float = 0.0


class Service:
    """A classifier behind HTTP; `app` is the ASGI application, `counts` what it has done."""

    def __init__(
        self, classifier: Classifier, limits: RequestLimits, batching: BatchOptions, *, log: Callable[[str], None]
    ) -> None:
        """Prepare to serve.

        Args:
            classifier: the model.
            limits: of one request.
            batching: how requests share batches.
            log: takes a line about a failure inside the service.
        """
        self.classifier, self.limits, self.counts, self.log = classifier, limits, Counts(), log
        self.batcher = Batcher(classifier.logits_by_length, batching)
        self.app = Starlette(
            routes=[
                Route("/classify", self.classify, methods=["POST"]),
                Route("/health", self.health, methods=["GET"]),
            ],
            exception_handlers={
                RequestError: self._refused,
                HTTPException: self._no_such_place,
                Exception: self._failed,
            },
            lifespan=self._running,
        )

    @asynccontextmanager
    async def _running(self, app: Starlette) -> AsyncIterator[None]:
        worker = asyncio.create_task(self.batcher.work())
        yield
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker

    async def classify(self, request: Request) -> JSONResponse:
        """Answer one request: an object for a text, {"results": [...]} for a list."""
        self.counts.in_progress += 1
        try:
            return await self._answer(request)
        finally:
            self.counts.in_progress -= 1

    async def _answer(self, request: Request) -> JSONResponse:
        began_s = time.perf_counter()
        body = await self._body(request)
        asked = parse(body, self.classifier.description, self.limits)
        rows = await asyncio.to_thread(self.classifier.encode, asked.samples, truncate=self.limits.truncate)
        logits = await self.batcher.logits(rows)
        answers = [self.classifier.answer(logits_C, row) for logits_C, row in zip(logits, rows)]
        self.counts.answered += 1
        self.counts.samples += len(answers)
        self.counts.elapsed_s += time.perf_counter() - began_s
        return JSONResponse({"results": answers} if asked.is_list else answers[0])

    async def health(self, request: Request) -> JSONResponse:
        """Say what is served and how much of it was done."""
        description, counts = self.classifier.description, self.counts
        return JSONResponse(
            {
                "status": "ok",
                "task": description.task,
                "labels": list(description.labels),
                "regression": description.is_regression,
                "pairs": {1: "no", 2: "required", None: "optional"}[description.num_texts],
                "max_tokens": description.max_length,
                "precision": description.precision,
                "in_progress": counts.in_progress,
                "answered": counts.answered,
                "refused": counts.refused,
                "failed": counts.failed,
                "texts": counts.samples,
                "batches": self.batcher.counts.batches,
                "cpu_s": time.process_time(),
            }
        )

    async def _body(self, request: Request) -> bytes:
        """The body; one that is too long is refused before it is read to its end."""
        most = self.limits.max_body_bytes
        said = request.headers.get("content-length", "")
        if said.isdecimal() and int(said) > most:
            raise too_large(self.limits)
        chunks, length = [], 0
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                async for chunk in request.stream():
                    length += len(chunk)
                    if length > most:
                        raise too_large(self.limits)
                    chunks.append(chunk)
        except ClientDisconnect as error:
            raise RequestError(_CLOSED, f"the client left after {length} bytes") from error
        except TimeoutError as error:
            message = f"{length} bytes of the body came in {_BODY_TIMEOUT_S:g} s, and not its end; send it in one go"
            raise RequestError(TOO_SLOW, message) from error
        return b"".join(chunks)

    async def _refused(self, request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestError), f"registered for another kind of error than {error!r}"
        self.counts.refused += 1
        return _problem(error.status, str(error), {"Retry-After": "1"} if error.status == OVERLOADED else {})

    async def _no_such_place(self, request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException), f"registered for another kind of error than {error!r}"
        self.counts.refused += 1
        places = "POST /classify and GET /health are there"
        message = f"{request.method} {request.url.path}: {error.detail}; {places}"
        return _problem(error.status_code, message, dict(error.headers or {}))

    async def _failed(self, request: Request, error: Exception) -> JSONResponse:
        self.counts.failed += 1
        self.log(f"{request.method} {request.url.path} failed: {type(error).__name__}: {error}")
        return _problem(500, f"the service failed ({type(error).__name__}); its log says more", {})


def _problem(status: int, message: str, headers: dict[str, Any]) -> JSONResponse:
    return JSONResponse({"error": {"status": status, "message": message}}, status, headers)
