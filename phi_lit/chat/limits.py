"""What a request may be, looked at before anything reads it."""

from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.requests import Request

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 16 * 1024 * 1024
"""Of a request's body: many times the longest prompt of any model here."""


class BodyLimit:
    """Answers 413 to a body that is too large, by its announced length or by what arrives."""

    def __init__(self, app: "ASGIApp", most: int = MOST_BYTES) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Pass a request on, and raise while its body is read if that grows too large."""
        arrived = 0

        async def counted() -> "Message":
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            if arrived > self._most:
                raise self._too_large()
            return message

        if scope["type"] == "http":
            announced = Request(scope).headers.get("content-length", "0")
            if announced.isdecimal() and int(announced) > self._most:

                async def refuse() -> "Message":
                    raise self._too_large()

                await self._app(scope, refuse, send)
                return
        await self._app(scope, counted, send)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"The request is larger than {self._most:,} bytes.")


def check_json(request: Request) -> None:
    """Refuse a body that doesn't call itself JSON.

    A browser lets any web page send text/plain to this machine's ports without asking; JSON it
    doesn't.

    Raises:
        HTTPException: 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        said = f"calls itself {kind}" if kind else "has no content type"
        raise HTTPException(415, f"The request {said}; send application/json.")
