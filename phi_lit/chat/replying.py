"""What all endpoints share: refusing in one form, and giving up when the client has gone."""

import asyncio
import sys
import traceback
from contextlib import aclosing, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from phi_lit.chat.engine import Engine, Overdue
from phi_lit.chat.limits import BodyLimit
from phi_lit.chat.stream import Reply, Wish

CLIENT_GONE = 499
"""The status that nobody receives, for the log (nginx's number)."""

POLL = 0.2
"""Seconds between looks at whether the client of a reply that isn't streamed is still there."""


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


def told(error: Exception) -> tuple[int, str, str | None, str | None]:
    """Return status, message, code and parameter of an error; what nobody expects is logged."""
    if isinstance(error, Refused):
        return error.status, error.message, error.code, error.param
    if isinstance(error, HTTPException):
        return error.status_code, f"{str(error.detail).rstrip('.')}.", None, None
    if isinstance(error, Overdue):
        return 503, f"The server is busy: {error}.", "overloaded", None
    traceback.print_exception(error, file=sys.stderr)
    return 500, f"The server failed: {error!r}.", "internal_error", None


def error_body(
    status: int, message: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def add_handlers(app: FastAPI) -> None:
    """Make every error of an app, malformed and huge requests too, one of `error_body`'s."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        found = told(error)
        return JSONResponse(error_body(*found), found[0])

    async def malformed(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        faults = [
            (".".join(str(part) for part in fault["loc"][1:]), fault["msg"])
            for fault in error.errors()
        ]
        message = "; ".join(f"{where}: {what}" if where else what for where, what in faults)
        first = faults[0][0] or None
        return JSONResponse(
            error_body(400, f"The request is malformed: {message}.", None, first), 400
        )

    app.add_exception_handler(RequestValidationError, malformed)
    for kind in (Refused, HTTPException, Overdue, Exception):
        app.add_exception_handler(kind, answer)
    app.add_middleware(BodyLimit)


async def collect(
    engine: Engine, reply: Reply, prompt: list[int], wish: Wish, request: Request
) -> None:
    """Wait until `reply` is whole, or until its client has hung up.

    Raises:
        Refused: the client has gone, so that nobody reads this.
    """

    async def run() -> None:
        async with aclosing(engine.pieces(reply, prompt, wish)) as pieces:
            async for _ in pieces:
                pass

    task = asyncio.create_task(run())
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=POLL)
            if not task.done() and await request.is_disconnected():
                raise Refused(CLIENT_GONE, "The client has hung up.")
        task.result()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task
