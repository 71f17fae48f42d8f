"""`litgpt serve`, asked by OpenAI's own client over loopback, by many at once, and by bad ones."""

import http.client
import inspect
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from phi_lit.chat.engine import Engine, load_engine  # noqa: E402
from phi_lit.chat.serve import listen, make_app, run_server  # noqa: E402
from phi_lit.chat.stream import Wish  # noqa: E402
from phi_lit.errors import UserError  # noqa: E402

GREEDY = Wish(max_new_tokens=30, temperature=0.0)
HELLO = [{"role": "user", "content": "Hello you"}]


@dataclass
class Served:
    engine: Engine
    port: int

    @property
    def client(self) -> "openai.OpenAI":
        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)

    def post(self, path: str, body: Any, kind: str = "application/json") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("POST", path, body, {"Content-Type": kind})
        answer = connection.getresponse()
        return answer.status, answer.read()


@contextmanager
def serving(engine: Engine, **options):
    """Run the real server in a thread, on a free port of loopback."""
    import uvicorn

    listener = listen("127.0.0.1", 0)
    given = {"path": "/v1/chat/completions", "stream": False, "openai_spec": True} | options
    app = make_app(engine, GREEDY, **given)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield Served(engine, listener.getsockname()[1])
    server.should_exit = True
    thread.join(timeout=30)


@pytest.fixture(scope="module")
def engine(chatml_dir):
    engine = load_engine(
        chatml_dir, quantize=None, precision="32-true", accelerator="cpu", timeout=60
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def served(engine):
    with serving(engine) as served:
        yield served


@pytest.fixture(scope="module")
def expected(chatml_dir, load_talker, greedy):
    """LitGPT's own greedy answer: from messages and a length to text, prompt and new tokens."""
    from litgpt.prompts import ChatML

    _, tokenizer = load_talker(chatml_dir)

    def answer(text: str, new: int) -> tuple[str, int, int]:
        ids = tokenizer.encode(ChatML().apply(text)).tolist()
        out = greedy(chatml_dir, ids, new, tokenizer.eos_id)
        out = out[:-1] if out[-1] == tokenizer.eos_id else out
        return tokenizer.processor.decode(out), len(ids), len(out)

    return answer


def ask(served, messages=HELLO, **options):
    options = {"model": "phi1-test", "temperature": 0} | options
    return served.client.chat.completions.create(messages=messages, **options)


def test_the_answer_is_litgpts_and_the_usage_is_counted(served, expected):
    done = ask(served)
    text, prompt, new = expected("Hello you", 30)
    assert done.choices[0].message.content == text
    usage = done.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, new)
    assert usage.total_tokens == prompt + new
    assert done.choices[0].finish_reason == "length"
    assert done.model == "phi1-test"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_length_that_is_asked_for_is_kept(served, expected, name):
    done = ask(served, **{name: 7})
    assert done.choices[0].message.content == expected("Hello you", 7)[0]
    assert (done.usage.completion_tokens, done.choices[0].finish_reason) == (7, "length")


def test_a_model_with_experts_is_served(chatml_dir, tmp_path, greedy):
    import torch
    from litgpt import GPT, Config
    from litgpt.prompts import ChatML
    from litgpt.tokenizer import Tokenizer
    from litgpt.utils import save_config

    directory = tmp_path / "phi1-test-moe"
    shutil.copytree(chatml_dir, directory)
    config = Config.from_name("phi1-test-moe", block_size=2048)
    torch.manual_seed(0)
    torch.save(GPT(config).state_dict(), directory / "lit_model.pth")
    save_config(config, directory)
    tokenizer = Tokenizer(directory)
    ids = tokenizer.encode(ChatML().apply("Hello you")).tolist()
    new = greedy(directory, ids, 12, tokenizer.eos_id)
    engine = load_engine(
        directory, quantize=None, precision="32-true", accelerator="cpu", timeout=60
    )
    with serving(engine) as served:
        done = ask(served, model="phi1-test-moe", max_tokens=12)
    engine.close()
    assert done.choices[0].message.content == tokenizer.processor.decode(new)
    assert done.usage.prompt_tokens == len(ids)


def test_a_stream_is_the_answer_in_pieces_with_the_usage_last(served):
    whole = ask(served)
    chunks = list(ask(served, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [c.choices[0].delta.content for c in chunks if c.choices]
    assert "".join(text or "" for text in texts) == whole.choices[0].message.content
    assert len([text for text in texts if text]) > 10
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in ask(served, stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_is_not_in_it(served, stream):
    whole = ask(served).choices[0].message.content
    stop = whole[12:15]
    done = ask(served, stop=["never there", stop], stream=stream)
    if stream:
        chunks = [chunk.choices[0] for chunk in done]
        text, reason = "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason
    else:
        text, reason = done.choices[0].message.content, done.choices[0].finish_reason
    assert (text, reason) == (whole[: whole.find(stop)], "stop")


def test_several_choices_and_seeds(served):
    def texts(seed, n=3):
        done = ask(served, temperature=1.0, n=n, seed=seed)
        return [choice.message.content for choice in done.choices], done.usage.completion_tokens

    (first, tokens), (again, _), (other, _) = texts(1), texts(1), texts(7)
    assert first == again != other
    assert len(set(first)) == 3
    assert tokens > 30


def test_many_at_once_get_the_answers_that_each_gets_alone(served):
    questions = [[{"role": "user", "content": f"Question {number}"}] for number in range(8)]
    alone = [ask(served, q).choices[0].message.content for q in questions]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda q: ask(served, q).choices[0].message.content, questions))
    assert together == alone
    assert len(set(alone)) > 1


def test_a_conversation_with_a_system_prompt_and_parts(served):
    talk = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    plain = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nab<|im_end|>\n"
        "<|im_start|>assistant\nc<|im_end|>\n<|im_start|>user\nd<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert ask(served, talk).usage.prompt_tokens == len(served.engine.encode(plain))


def test_an_empty_reply_can_be_part_of_the_conversation(served):
    answer = served.client.chat.completions.create(
        model="phi1-test",
        max_tokens=2,
        messages=[
            {"role": "system", "content": ""},
            *HELLO,
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "Say something"},
        ],
    )
    assert answer.usage.completion_tokens == 2


def test_models_are_listed_and_an_unknown_one_is_not_found(served):
    assert [model.id for model in served.client.models.list()] == ["phi1-test"]
    assert served.client.models.retrieve("phi1-test").id == "phi1-test"
    assert ask(served, model="phi-lit/phi1-test").model == "phi-lit/phi1-test"
    for refused in (
        lambda: ask(served, model="gpt-4o"),
        lambda: served.client.models.retrieve("gpt-4o"),
    ):
        with pytest.raises(openai.NotFoundError, match="'gpt-4o' does not exist") as caught:
            refused()
        assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("x" * 2100, {}, ["2,048", "maximum context length"]),
        ("x" * 100, {"max_tokens": 2000}, ["max_tokens is 2,000"]),
    ],
)
def test_what_the_context_cannot_hold_is_refused(served, text, options, words):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(served, [{"role": "user", "content": text}], **options)
    assert caught.value.code == "context_length_exceeded"
    assert all(word in str(caught.value) for word in words)


def test_a_default_length_is_cut_to_what_the_context_holds(served):
    start = len(served.engine.encode(served.engine.render([{"role": "user", "content": ""}])))
    long = [{"role": "user", "content": "x" * (2048 - start - 5)}]
    done = ask(served, long)
    assert done.usage.completion_tokens <= 5
    assert done.usage.total_tokens <= 2048


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "  "}]}, "empty"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "role"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "hi"}]}, "last message"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(served, change, word):
    body = {"model": "phi1-test", "messages": HELLO} | change
    status, answer = served.post("/v1/chat/completions", json.dumps(body).encode())
    error = json.loads(answer)["error"]
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert word in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe", b"[1, 2]", b'{"model": "phi1-test"}'])
def test_malformed_json_is_a_bad_request_and_the_server_goes_on(served, body):
    status, answer = served.post("/v1/chat/completions", body)
    assert status == 400
    assert "malformed" in json.loads(answer)["error"]["message"]
    assert ask(served, max_tokens=1).usage.completion_tokens == 1


@pytest.mark.parametrize("announced", [True, False])
def test_a_huge_request_is_refused_and_the_server_goes_on(served, announced):
    body = json.dumps({"prompt": "x" * 2**24}).encode()
    pieces = (body[start : start + 2**20] for start in range(0, len(body), 2**20))
    try:
        status, answer = served.post("/v1/chat/completions", body if announced else pieces)
        assert status == 413
        assert "16,777,216 bytes" in json.loads(answer)["error"]["message"]
    except (BrokenPipeError, ConnectionResetError):
        assert announced  # refused before it was sent
    assert ask(served, max_tokens=1).usage.completion_tokens == 1


def test_an_unknown_path_is_not_found_in_openais_form(served):
    status, answer = served.post("/v1/embeddings", b"{}")
    assert status == 404
    assert json.loads(answer)["error"]["message"] == "Not Found."


def hang_up(served, stream: bool) -> None:
    """Ask for a reply of 1,900 tokens and close the connection after its beginning."""
    body = {"model": "phi1-test", "messages": HELLO, "max_tokens": 1900, "stream": stream}
    data = json.dumps(body | {"temperature": 0}).encode()
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\n"
            b"Content-Type: application/json\r\n"
            + f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        if stream:
            received = b""
            while received.count(b'"content"') < 3:
                received += connection.recv(1000)
        else:
            while len(served.engine._speaker._known) < 100:  # it has begun
                time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_the_reply_to_a_client_that_hangs_up_is_left_off(served, stream, monkeypatch):
    replies = []
    speaker = served.engine._speaker
    begin = type(speaker).pieces

    def watched(self, reply, *rest):
        replies.append(reply)
        return begin(self, reply, *rest)

    monkeypatch.setattr(type(speaker), "pieces", watched)
    served.engine._speaker._known.clear()
    hang_up(served, stream)
    assert ask(served, max_tokens=3).usage.completion_tokens == 3  # after it: one at a time
    assert replies[0].tokens < 1900
    assert replies[0].finish_reason is None


def test_a_request_that_waits_too_long_is_told_that_the_server_is_busy(chatml_dir):
    engine = load_engine(
        chatml_dir, quantize=None, precision="32-true", accelerator="cpu", timeout=0.05
    )
    with serving(engine) as busy, ThreadPoolExecutor(1) as pool:
        long = pool.submit(ask, busy, max_tokens=900, stop=["never there"])
        while not engine._speaker._known:
            time.sleep(0.01)
        with pytest.raises(openai.InternalServerError, match="busy") as caught:
            ask(busy, max_tokens=1)
        assert caught.value.status_code == 503
        assert long.result().usage.completion_tokens > 0
    engine.close()


def test_litgpts_plain_endpoint(engine, expected):
    with serving(engine, path="/predict", openai_spec=False) as served:
        status, answer = served.post("/predict", b'{"prompt": "Hello you"}')
        assert (status, json.loads(answer)) == (200, {"output": expected("Hello you", 30)[0]})
        for body, word in (
            (b"{", "no JSON"),
            (b'{"text": "a"}', "prompt"),
            (b'{"prompt": 3}', "prompt"),
            (b'{"prompt": " "}', "empty"),
            (b'{"prompt": "\\ud800"}', "UTF-8"),
            (json.dumps({"prompt": "x" * 3000}).encode(), "2,048"),
        ):
            status, answer = served.post("/predict", body)
            assert status == 400
            assert word in json.loads(answer)["error"]["message"]
        # what any web page may send to a port of this machine without asking
        status, answer = served.post("/predict", b'{"prompt": "Hello you"}', "text/plain")
        assert status == 415
        assert "application/json" in json.loads(answer)["error"]["message"]


def test_litgpts_streaming_endpoint_sends_lines_of_json(engine, expected):
    with serving(engine, path="/predict", openai_spec=False, stream=True) as served:
        status, answer = served.post("/predict", b'{"prompt": "Hello you"}')
        pieces = [json.loads(line)["output"] for line in answer.splitlines()]
        assert status == 200
        assert len(pieces) > 10
        assert "".join(pieces) == expected("Hello you", 30)[0]


def test_only_this_machine_is_served_unless_told_otherwise():
    assert inspect.signature(run_server).parameters["host"].default == "127.0.0.1"
    with listen("127.0.0.1", 0) as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(UserError, match=f"port {port}.*in use.*--port"):
            listen("127.0.0.1", port)
    with pytest.raises(UserError, match=r"cannot listen on 203\.0\.113\.1"):
        listen("203.0.113.1", 0)


def test_litgpt_serve_with_quantized_weights_from_start_to_ctrl_c(chatml_dir, tmp_path):
    command = [str(Path(sys.executable).parent / "litgpt"), "serve", str(chatml_dir)]
    command += ["--openai_spec", "true", "--port", "0", "--quantize", "bnb.nf4"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
    ) as process:
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if found := re.search(r"http://127\.0\.0\.1:(\d+)/v1/chat/completions", line):
                    break
            else:
                pytest.fail("".join(lines))
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{found[1]}/v1", api_key="none")
            done = client.chat.completions.create(model="phi1-test", messages=HELLO, max_tokens=5)
            assert done.usage.completion_tokens <= 5
            listening = psutil.Process(process.pid).net_connections()
            assert {c.laddr.ip for c in listening if c.status == "LISTEN"} == {"127.0.0.1"}
        finally:
            process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[0]
        assert "Traceback" not in rest
        assert process.returncode in (0, -signal.SIGINT)
    assert os.listdir(tmp_path) == []
