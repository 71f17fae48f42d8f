"""`litgpt serve`: LitGPT's command and endpoints, on FastAPI and uvicorn, in one process.

LitGPT serves through LitServe, which answers on every network interface, leaves usage at zero,
ignores stop strings and model names, and goes on generating for a client that has hung up. Only
what is spread over several GPUs is still served that way.
"""

import json
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from phi_lit.checks import check_inference, fault_of_text
from phi_lit.errors import UserError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from phi_lit.chat.engine import Engine
    from phi_lit.chat.stream import Wish

CHAT_PATH = "/v1/chat/completions"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def run_server(
    checkpoint_dir: Path,
    quantize: str | None = None,
    precision: str | None = None,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    max_new_tokens: int = 50,
    devices: int = 1,
    accelerator: str = "auto",
    port: int = 8000,
    stream: bool = False,
    openai_spec: bool = False,
    access_token: str | None = None,
    api_path: str | None = "/predict",
    timeout: int = 30,
    generate_strategy: Literal["sequential", "tensor_parallel"] | None = None,
    host: str = "127.0.0.1",
) -> None:
    """Serve a model over HTTP.

    Args:
        checkpoint_dir: The checkpoint directory to load the model from, or a model's name.
        quantize: Quantize the weights with bitsandbytes, on a GPU or a CPU: to 4 bits (bnb.nf4,
            bnb.fp4; -dq quantizes the scales too) or to 8 (bnb.int8).
        precision: What to compute in: bf16-true, 16-true or 32-true.
        temperature: Where a request doesn't say: higher values give more random replies, 0 the
            most probable one.
        top_k: The number of most probable tokens to sample from.
        top_p: Where a request doesn't say: sample only from the most probable tokens that together
            have this probability.
        max_new_tokens: Where a request doesn't say: the most tokens of a reply.
        devices: How many GPUs to spread the model over.
        accelerator: cpu, cuda, mps, or auto for the best that is there.
        port: The port to listen on; 0 for any free one.
        stream: Answer at `api_path` with lines of JSON, one for each piece of text.
        openai_spec: Serve /v1/chat/completions and /v1/models for OpenAI's clients.
        access_token: A token of the hub for models that need one.
        api_path: The path of the endpoint (with openai_spec: if it is another than OpenAI's).
        timeout: Seconds that a request may wait for its turn; 0 for as long as it takes.
        generate_strategy: How a model is spread over several GPUs.
        host: The address to listen on. Only this machine can reach 127.0.0.1; 0.0.0.0 lets
            everyone in who can reach this machine, and there is no password.
    """
    check_inference(
        checkpoint_dir,
        quantize=quantize,
        precision=precision,
        max_new_tokens=max_new_tokens,
        accelerator=accelerator,
    )
    check_packages()
    from litgpt.utils import auto_download_checkpoint

    directory = auto_download_checkpoint(model_name=checkpoint_dir, access_token=access_token)
    if devices > 1 or generate_strategy is not None:
        if openai_spec:
            raise UserError(
                "--openai_spec serves from one device: spread over several, LitServe would answer, "
                "which counts no usage and ignores stop strings; leave one of the two out"
            )
        given = dict(quantize=quantize, precision=precision, temperature=temperature, top_k=top_k)
        given |= dict(top_p=top_p, max_new_tokens=max_new_tokens, devices=devices)
        given |= dict(api_path=api_path, generate_strategy=generate_strategy)
        _serve_spread(directory, given, accelerator, stream, openai_spec, timeout, host, port)
        return
    listener = listen(host, port)
    from phi_lit.chat.engine import load_engine
    from phi_lit.chat.stream import Wish

    engine = load_engine(
        directory, quantize=quantize, precision=precision, accelerator=accelerator, timeout=timeout
    )
    wish = Wish(max_new_tokens, temperature, top_k, top_p)
    path = CHAT_PATH if openai_spec and api_path in (None, "/predict") else api_path or "/predict"
    app = make_app(engine, wish, path, stream=stream, openai_spec=openai_spec)
    _announce(engine.names[0], listener, path)
    _run(app, listener)


def check_packages() -> None:
    """Raise a `UserError` if what the server runs on is missing."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"serving takes {error.name}, which is missing: pip install 'phi-lit[serve]'"
        ) from None


def listen(host: str, port: int) -> socket.socket:
    """Take the port, before a model is loaded for nothing.

    Raises:
        UserError: someone has it, or there is no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot listen on {host} port {port}: {reason}. Choose another --port or --host."
        ) from error
    return listener


def _announce(name: str, listener: socket.socket, path: str) -> None:
    host, port = listener.getsockname()[:2]
    print(f"Serving {name} at http://{host}:{port}{path} (Ctrl-C ends it).", flush=True)
    if host not in LOOPBACK:
        print("Anyone who can reach this machine can use it: there is no password.", flush=True)


def _run(app: "FastAPI", listener: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
    with suppress(KeyboardInterrupt):  # uvicorn raises it again once everything is closed
        uvicorn.Server(config).run(sockets=[listener])


def make_app(
    engine: "Engine", default: "Wish", path: str, *, stream: bool, openai_spec: bool
) -> "FastAPI":
    """Return the web application: OpenAI's endpoints, or LitGPT's plain one.

    Args:
        engine: the model.
        default: how to sample where a request doesn't say.
        path: of the endpoint.
        stream: whether the plain endpoint answers piece by piece.
        openai_spec: whether it is OpenAI's.
    """
    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse

    from phi_lit.chat.replying import add_handlers

    app = FastAPI(title=engine.names[0], docs_url=None, redoc_url=None)
    add_handlers(app)

    @app.get("/health", response_class=PlainTextResponse)
    async def health() -> str:
        return "ok"

    if openai_spec:
        from phi_lit.chat.openai_api import routes

        app.include_router(routes(engine, path, default))
    else:
        _add_plain(app, engine, default, path, stream)
    return app


def _add_plain(app: "FastAPI", engine: "Engine", default: "Wish", path: str, stream: bool) -> None:
    """Add LitGPT's endpoint: {"prompt": ...} in; {"output": ...} out, once or for each piece."""
    from dataclasses import replace

    from fastapi import Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse

    from phi_lit.chat.limits import check_json
    from phi_lit.chat.openai_api import room
    from phi_lit.chat.replying import Refused, collect, error_body, told
    from phi_lit.chat.stream import Reply

    async def body_of(request: Request) -> dict[str, Any]:
        check_json(request)
        try:
            body = await request.json()
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise Refused(400, f"The request is no JSON: {error}.") from error
        if not isinstance(body, dict) or not isinstance(body.get("prompt"), str):
            raise Refused(400, 'The request must be like {"prompt": "some text"}.', param="prompt")
        return body

    async def pieces(reply: Reply, prompt: list[int], wish: "Wish") -> AsyncIterator[str]:
        try:
            async for piece in engine.pieces(reply, prompt, wish):
                yield json.dumps({"output": piece}) + "\n"
        except Exception as error:
            yield json.dumps(error_body(*told(error))) + "\n"

    async def predict(request: Request) -> Response:
        text = (await body_of(request))["prompt"]
        if fault := fault_of_text(text):
            raise Refused(400, f"{fault}.", param="prompt")
        prompt = engine.encode(engine.style.apply(text))
        ids, texts = engine.style_stops
        most = room(engine, len(prompt), None, default.max_new_tokens)
        wish = replace(default, stop_ids=ids, stop=texts, max_new_tokens=most)
        reply = Reply(prompt_tokens=len(prompt))
        if stream:
            return StreamingResponse(pieces(reply, prompt, wish), media_type="application/x-ndjson")
        await collect(engine, reply, prompt, wish, request)
        return JSONResponse({"output": reply.text})

    app.add_api_route(path, predict, methods=["POST"], response_model=None)


def _serve_spread(
    directory: Path,
    given: dict[str, Any],
    accelerator: str,
    stream: bool,
    openai_spec: bool,
    timeout: int,
    host: str,
    port: int,
) -> None:
    """Serve a model that is spread over several GPUs as LitGPT does, but on `host` only.

    Through LitServe: a client that hangs up goes on being answered.
    """
    import litgpt.deploy.serve as stocks

    kind = stocks.StreamLitAPI if stream else stocks.SimpleLitAPI
    server = stocks.LitServer(
        (stocks.OpenAISpecLitAPI if openai_spec else kind)(checkpoint_dir=directory, **given),
        spec=stocks.OpenAISpec() if openai_spec else None,
        accelerator=accelerator,
        devices=1,
        stream=stream,
        timeout=timeout,
    )
    server.run(host=host, port=port, generate_client_file=False)
