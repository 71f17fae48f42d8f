"""The OpenAI-compatible endpoints: what a chat request may say, and how its reply is written.

Follows the chat completions reference of OpenAI's API. What a small server cannot do (tools,
images, log-probabilities, penalties) is refused by name instead of ignored; errors have OpenAI's
form, so that its client raises the exception that fits.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field

from phi_lit.chat.engine import Engine
from phi_lit.chat.replying import Refused, collect, error_body, told
from phi_lit.chat.stream import Reply, Wish
from phi_lit.checks import fault_of_text
from phi_lit.errors import UserError

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
}
"""Fields that are refused, with the values that ask for nothing."""


class TextPart(BaseModel):
    """One part of a message's content; only text can be read."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None

    def plain(self) -> dict[str, str]:
        """Return it as chat templates want it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    """What a streamed reply says besides its text."""

    include_usage: bool = False


class ChatRequest(BaseModel, extra="allow"):
    """The body of a request for a chat completion."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    n: Annotated[int, Field(ge=1, le=16)] = 1
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: Annotated[int | None, Field(ge=-(2**62), le=2**62)] = None

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings."""
        stop = self.stop or ()
        return (stop,) if isinstance(stop, str) else tuple(s for s in stop if s)

    def length(self) -> int | None:
        """Return the most tokens that the client wants, or None."""
        return self.max_completion_tokens or self.max_tokens


def routes(engine: Engine, path: str, default: Wish) -> APIRouter:
    """Return the endpoints.

    Args:
        engine: the model.
        path: of the chat completions, /v1/chat/completions for OpenAI's client.
        default: how to sample where a request doesn't say.
    """
    router = APIRouter()
    started = int(time.time())

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "phi_lit"}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(engine.names[0])]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        check_name(engine, name)
        return card(name)

    @router.post(path)
    async def chat(body: ChatRequest, request: Request) -> Response:
        check_name(engine, body.model)
        prompt, wish = prepare(engine, body, default)
        completion = _Completion(engine, body, prompt, wish)
        if body.stream:
            return StreamingResponse(completion.events(), media_type="text/event-stream")
        return JSONResponse(await completion.whole(request))

    return router


def check_name(engine: Engine, name: str) -> None:
    """Raise `Refused` (404) if the model has another name."""
    if name not in engine.names:
        raise Refused(
            404,
            f"The model {name!r} does not exist; this server has {engine.names[0]!r}.",
            code="model_not_found",
            param="model",
        )


def prepare(engine: Engine, body: ChatRequest, default: Wish) -> tuple[list[int], Wish]:
    """Return the prompt's ids and how to sample the reply.

    Raises:
        Refused: 400, with what is wrong.
    """
    for name, nothing in UNSUPPORTED.items():
        if (body.model_extra or {}).get(name) not in nothing:
            raise Refused(400, f"This server does not support {name!r}.", param=name)
    messages = [message.plain() for message in body.messages]
    if messages[-1]["role"] != "user":
        raise Refused(400, "The last message must be the user's.", param="messages")
    for message in messages:
        # A reply may have been empty, and a system message may be; a question may not.
        text = message["content"] or ("" if message["role"] == "user" else "nothing")
        if fault := fault_of_text(text, f"a message of the {message['role']}"):
            raise Refused(400, f"{fault}.", param="messages")
    messages = [m for m in messages if m["role"] != "system" or m["content"]]
    try:
        prompt = engine.encode(engine.render(messages))
    except UserError as error:
        raise Refused(400, str(error), param="messages") from error
    most = room(engine, len(prompt), body.length(), default.max_new_tokens)
    wish = Wish(
        max_new_tokens=most,
        temperature=default.temperature if body.temperature is None else body.temperature,
        top_k=default.top_k,
        top_p=default.top_p if body.top_p is None else body.top_p,
        stop=(*body.stops(), *engine.chat_stops[1]),
        stop_ids=engine.chat_stops[0],
        seed=body.seed,
    )
    return prompt, wish


def room(engine: Engine, tokens: int, wanted: int | None, default: int) -> int:
    """Return how many new tokens a prompt of so many gets.

    Raises:
        Refused: the prompt, or it and what the client wants, is more than the context.
    """
    left = engine.context - tokens
    if left < 1 or (wanted is not None and wanted > left):
        asked = f" and max_tokens is {wanted:,}" if wanted is not None else ""
        raise Refused(
            400,
            f"This model's maximum context length is {engine.context:,} tokens; the messages "
            f"have {tokens:,}{asked}.",
            code="context_length_exceeded",
            param="messages",
        )
    return wanted or min(default, left)


class _Completion:
    """One request's replies (`n` of them), as OpenAI's objects."""

    def __init__(self, engine: Engine, body: ChatRequest, prompt: list[int], wish: Wish) -> None:
        self._engine, self._body, self._prompt, self._wish = engine, body, prompt, wish
        self._replies = [Reply(prompt_tokens=len(prompt)) for _ in range(body.n)]
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
        }

    def _wish_of(self, index: int) -> Wish:
        seed = self._wish.seed
        return self._wish if seed is None else replace(self._wish, seed=seed + index)

    async def whole(self, request: Request) -> dict[str, Any]:
        """Return the completion once it is whole."""
        for index, reply in enumerate(self._replies):
            await collect(self._engine, reply, self._prompt, self._wish_of(index), request)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": reply.text},
                "logprobs": None,
                "finish_reason": reply.finish_reason,
            }
            for index, reply in enumerate(self._replies)
        ]
        head = {**self._head, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """Yield the completion as server-sent events."""
        try:
            for index, reply in enumerate(self._replies):
                yield self._chunk(index, {"role": "assistant", "content": ""})
                wish = self._wish_of(index)
                async for piece in self._engine.pieces(reply, self._prompt, wish):
                    yield self._chunk(index, {"content": piece})
                yield self._chunk(index, {}, reply.finish_reason)
        except Exception as error:
            yield _event(error_body(*told(error)))
            return
        if self._body.stream_options and self._body.stream_options.include_usage:
            yield self._event_of({"choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _chunk(self, index: int, delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self._event_of({"choices": [choice]})

    def _event_of(self, content: dict[str, Any]) -> str:
        return _event({**self._head, "object": "chat.completion.chunk", **content})

    def _usage(self) -> dict[str, int]:
        new = sum(reply.tokens for reply in self._replies)
        return {
            "prompt_tokens": len(self._prompt),
            "completion_tokens": new,
            "total_tokens": len(self._prompt) + new,
        }


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
