"""The engine behind HTTP: one FastAPI application. Needs the extra `serve`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import torch
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from ..errors import ConfigError, TapsError
from ..files.images import Geometry
from ..model.outputs import predictions, top_labels
from ..version import __version__
from .core import Answer
from .engine import Engine
from .errors import EngineClosedError, InputError, QueueFullError, TaskReplacedError, UnknownTaskError
from .facts import Facts
from .inputs import array_input, image_input

MAX_BODY, MAX_PIXELS = 16 << 20, 1 << 25
_TRIES = 5  # of a request whose task is replaced each time between the image and the batch
_DECODERS = 4  # images that are decoded at a time, each of which may take some bytes for each of MAX_PIXELS
_BODIES = 16  # times `max_body`: bytes of all bodies that are being read or wait


class Score(BaseModel):
    label: str
    probability: float


class Prediction(BaseModel):
    """The likeliest labels, and the digest of the task's file that gave them."""

    task: str
    label: str
    top: list[Score]
    digest: str


class TaskInfo(BaseModel):
    task: str
    method: str
    labels: list[str] | None
    preprocessing: dict[str, Any] | None
    metrics: dict[str, Any] | None
    digest: str
    resident: bool


class Problem(BaseModel):
    """One sentence, and the error's class."""

    error: str
    kind: str


class _Refused(TapsError):
    """An answer that is an error of HTTP's own."""

    def __init__(self, problem: str, status: int = 400) -> None:
        super().__init__(problem)
        self.problem, self.status = problem, status

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problem, self.status)


_IMAGE = {"schema": {"type": "string", "format": "binary"}}
_BODY = {
    "required": True,
    "content": {
        "image/*": _IMAGE,
        "application/octet-stream": _IMAGE,
        "application/x-npy": _IMAGE,
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {"file": _IMAGE["schema"]}, "required": ["file"]}
        },
    },
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": HTTPStatus(code).phrase} for code in (404, 408, 413, 415, 422, 500, 503)
}


def status_of(error: BaseException) -> int:
    """The status that tells who can help: 404 and 422 who asked, 503 time, 500 who runs the server."""
    if isinstance(error, _Refused):
        return error.status
    if isinstance(error, UnknownTaskError):
        return 404
    if isinstance(error, InputError):
        return 422
    return 503 if isinstance(error, (QueueFullError, EngineClosedError, TaskReplacedError)) else 500


def _problem(error: BaseException, folder: str) -> JSONResponse:
    """The answer that an error is; where the folder lies is nobody's business outside."""
    status = status_of(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if folder not in ("", "."):
        text = text.replace(f" in {folder}", "").replace(f"{folder}{os.sep}", "")
    if not isinstance(error, TapsError):
        text = f"the model failed on this input: {text:.300}"
    headers = {"Retry-After": "1"} if status == 503 else {}
    if status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not read
    kind = HTTPStatus(status).phrase if isinstance(error, _Refused) else type(error).__name__
    return JSONResponse({"error": text, "kind": kind}, status, headers)


def _told(request: Request, most: int) -> int:
    """The bytes that a body may turn out to have. Raises _Refused where it says that it has more than `most`."""
    told = request.headers.get("content-length", "")
    if not told.isdecimal():
        return most
    if int(told) > most:
        raise _Refused(f"body: expected at most {most} bytes, got {told}", 413)
    return int(told)


async def _read(request: Request, most: int) -> bytes:
    """The body. Raises _Refused for one that is larger than `most` bytes, once that is known."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise _Refused(f"body: expected at most {most} bytes, got more", 413)
        parts.append(part)
    return b"".join(parts)


async def _file_of(request: Request, body: bytes) -> bytes:
    """The one file of a form."""

    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await MultiPartParser(request.headers, once(), max_files=1, max_fields=16).parse()
    except (MultiPartException, ValueError, KeyError) as error:
        raise InputError(f"body: expected a form with one file: {error}") from error
    try:
        for value in form.values():
            if not isinstance(value, str):
                found: bytes = await value.read()
                return found
    finally:
        await form.close()
    raise InputError("body: expected a form with one file, got none")


def make_app(
    engine: Engine,
    *,
    max_body: int = MAX_BODY,
    max_pixels: int = MAX_PIXELS,
    body_seconds: float = 30.0,
    geometry: Geometry | None = None,
) -> FastAPI:
    """The application; it closes the engine when it shuts down.

    Args:
        max_body: bytes of a request's body. max_pixels: that an image may say that it has.
        body_seconds: in which a body must have come.
        geometry: how images are made for tasks whose files do not say it.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="taps serve", version=__version__, lifespan=lifespan)
    decoders = asyncio.Semaphore(_DECODERS)
    held = 0  # bytes of bodies

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return _problem(error, str(engine.folder.path))

    async def unfit(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return _problem(_Refused(f"{first['loc'][-1]}: {first['msg']}", 422), "")

    async def other(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _problem(_Refused(f"{request.url.path}: {error.detail}", error.status_code), "")

    for kind, handler in ((TapsError, answer), (RequestValidationError, unfit), (HTTPException, other)):
        app.add_exception_handler(kind, handler)

    async def body_of(request: Request) -> tuple[bytes, bool]:
        """(the file's bytes, whether it is an array)."""
        kind = request.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
        form, array = kind == "multipart/form-data", kind == "application/x-npy"
        if not (form or array or kind == "application/octet-stream" or kind.startswith("image/")):
            raise _Refused(f"content-type: expected image/*, application/x-npy or a form, got {kind:.80}", 415)
        try:
            body = await asyncio.wait_for(_read(request, max_body), body_seconds)
        except (TimeoutError, asyncio.TimeoutError):
            raise _Refused(f"body: expected all of it within {body_seconds:g} seconds", 408) from None
        except ClientDisconnect:
            raise _Refused("body: the connection was closed before its end", 400) from None
        return (await _file_of(request, body) if form else body), array

    async def made(body: bytes, array: bool, facts: Facts) -> torch.Tensor:
        if array:
            return array_input(body)
        known = facts.geometry or geometry
        async with decoders:
            image = await asyncio.to_thread(image_input, body, known, facts.task or "", engine.dtype, max_pixels)
        return image.unsqueeze(0)

    async def asked(task: str, body: bytes, array: bool) -> Answer:
        for _ in range(_TRIES):
            facts = await asyncio.to_thread(engine.facts, task)
            if facts.map is not None:  # before its forward, which is a large one
                raise InputError(
                    f"task {task!r}: makes a map of an image ({facts.map}), and answers here are labels; "
                    "taps predict makes pictures"
                )
            input = await made(body, array, facts)
            try:
                found: Answer = await asyncio.wrap_future(engine.request(input, task, digest=facts.digest))
                return found
            except TaskReplacedError:
                continue
            except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
                if not array or facts.shape is not None or isinstance(error, (TapsError, torch.OutOfMemoryError)):
                    raise
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                got = f"{input.dtype} {list(input.shape)}"
                raise InputError(f"body: the base does not take {got} ({reason:.200})") from error
        raise TaskReplacedError(f"task {task!r}: is being replaced; try again")

    @app.post(
        "/tasks/{task:path}/predict",
        response_model=Prediction,
        responses=_PROBLEMS,
        openapi_extra={"requestBody": _BODY},
        summary="Classify one image, or one array as the task takes it.",
    )
    async def predict(request: Request, task: str, top: int = Query(5, ge=1, le=1000)) -> Any:
        nonlocal held
        told = _told(request, max_body)
        if held + told > _BODIES * max_body:
            raise QueueFullError(f"queue: bodies of {held} bytes are being read; try again later")
        held += told
        try:
            body, array = await body_of(request)
            found = await asked(task, body, array)
            scores = predictions(found.output)
            if isinstance(scores, torch.Tensor) and scores.dim() > 2:  # of a file that does not say so
                raise InputError(f"task {task!r}: makes maps {list(scores.shape)}, and answers here are labels")
            row = scores[0] if isinstance(scores, torch.Tensor) and scores.dim() == 2 and len(scores) == 1 else scores
            if not isinstance(row, torch.Tensor) or row.dim() != 1 or not row.is_floating_point():
                got = list(row.shape) if isinstance(row, torch.Tensor) else type(row).__name__
                raise ConfigError(f"task {task!r}: expected one score for each class as its output, got {got}")
            if not torch.isfinite(row).all():
                raise TapsError(f"task {task!r}: expected finite scores as its output, got Inf or NaN")
            labels = top_labels(row.float().softmax(0), found.facts.labels, top, f"task {task!r}")
        except TapsError:
            raise
        except Exception as error:
            return _problem(error, str(engine.folder.path))
        finally:
            held -= told
        scored = [Score(**label) for label in labels]
        return Prediction(task=task, label=scored[0].label, top=scored, digest=found.facts.digest)

    @app.get("/tasks", summary="The tasks of the folder.")
    def tasks() -> dict[str, Any]:
        return {"tasks": list(engine.folder), "resident": engine.resident}

    @app.get("/tasks/{task:path}", response_model=TaskInfo, responses=_PROBLEMS, summary="What a task's file says.")
    def task(task: str) -> Any:
        facts = engine.facts(task)
        known = facts.geometry
        made = None if known is None else {**vars(known)}
        labels = None if facts.labels is None else list(facts.labels)
        return TaskInfo(
            task=task,
            method=facts.method,
            labels=labels,
            preprocessing=made,
            metrics=facts.metrics,
            digest=facts.digest,
            resident=task in engine.resident,
        )

    @app.get("/health", summary="Whether the server lives, and takes requests.")
    async def health() -> JSONResponse:
        found = {"live": engine.alive, "ready": engine.ready}
        return JSONResponse(found, 200 if engine.ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse, summary="Counters in Prometheus' text format.")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(engine.metrics_text(), media_type="text/plain; version=0.0.4")

    return app
