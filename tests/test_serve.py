"""The server of examples/serve.py over HTTP: concurrent answers are single answers; bad requests."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command_line import HELD_OUT

uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve`")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import serve  # noqa: E402

from tcal_compiler.runtime.session import OnnxSession  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)
TEXT = Path(HELD_OUT).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def url(shared_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    run = Path(shutil.copytree(shared_run, tmp_path_factory.mktemp("served") / "run"))
    (run / "onnx/chat_template.jinja").write_text(TEMPLATE)
    config = uvicorn.Config(serve.make_app(serve.Student(run), workers=3), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def post(url: str, path: str, **body: Any) -> tuple[int, bytes]:
    request = urllib.request.Request(f"{url}/v1/{path}", json.dumps(body).encode(), method="POST")
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as e:
        return e.code, e.read()


@pytest.fixture(scope="module")
def single(shared_run: Path) -> OnnxSession:
    return OnnxSession(shared_run / "onnx", threads=1)


def alone(session: OnnxSession, prompt: str, count: int, **options: Any) -> str:
    """The answer of a session that has seen nothing else."""
    session.reset()
    return bytes(session.generate(list(prompt.encode()), count, **options)).decode("utf-8", "replace")


def streamed(raw: bytes) -> list[dict[str, Any]]:
    events = [e.removeprefix("data: ") for e in raw.decode().strip().split("\n\n")]
    assert events.pop() == "[DONE]"
    return [json.loads(e)["choices"][0] for e in events]


@dataclass(frozen=True)
class Asked:
    """One of many requests open together: short and long, whole and streamed, greedy and sampled, some chat."""

    index: int

    @property
    def prompt(self) -> str:
        start, length = 97 * self.index, 1 + self.index * 37 % 150
        return TEXT[start : start + length]

    @property
    def tokens(self) -> int:
        return 1 + self.index * 11 % 40

    @property
    def options(self) -> dict[str, Any]:
        return {"temperature": 1.0, "seed": self.index} if self.index % 2 else {}

    def answer(self, url: str) -> str:
        body: dict[str, Any] = {"max_tokens": self.tokens, "stream": self.index % 3 == 0, **self.options}
        chat = self.index % 5 == 0
        body |= {"messages": [{"role": "u", "content": self.prompt}]} if chat else {"prompt": self.prompt}
        status, raw = post(url, "chat/completions" if chat else "completions", **body)
        assert status == 200, raw
        choices = streamed(raw) if body["stream"] else json.loads(raw)["choices"]
        part = "delta" if body["stream"] else "message"
        return "".join(c[part].get("content", "") if chat else c["text"] for c in choices)

    def alone(self, session: OnnxSession) -> str:
        prompt = f"u: {self.prompt}\na: " if self.index % 5 == 0 else self.prompt
        return alone(session, prompt, self.tokens, **self.options)


def test_concurrent_requests_do_not_mix(single: OnnxSession, url: str, count: int = 64):
    """Every answer is the one that its request gets alone, while bad requests are refused among them."""
    requests, together = [Asked(i) for i in range(count)], threading.Barrier(count)
    open_at: list[tuple[float, float]] = []

    def ask(request: Asked) -> str:
        together.wait()
        if request.index % 8 == 7:
            assert post(url, "completions", prompt=[999])[0] == 400
        start = time.perf_counter()
        answer = request.answer(url)
        open_at.append((start, time.perf_counter()))
        return answer

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(ask, requests))
    assert found == [r.alone(single) for r in requests] and len(set(found)) > count * 0.9
    most = max(sum(start <= at < end for start, end in open_at) for at, _ in open_at)
    assert most > count / 2, f"only {most} requests were open together"


def test_the_parts_of_an_answer(single: OnnxSession, url: str):
    whole = json.loads(post(url, "completions", prompt="The old man", max_tokens=12)[1])
    assert whole["usage"] == {"prompt_tokens": 11, "completion_tokens": 12, "total_tokens": 23}
    assert whole["object"] == "text_completion" and whole["choices"][0]["finish_reason"] == "length"
    text = whole["choices"][0]["text"]
    stop = text[4:6]
    cut = json.loads(post(url, "completions", prompt="The old man", max_tokens=12, stop=[stop])[1])["choices"][0]
    assert cut["text"] == text[: text.find(stop)] and cut["finish_reason"] == "stop"
    parts = streamed(post(url, "completions", prompt="The old man", max_tokens=12, stop=stop, stream=True)[1])
    assert "".join(p["text"] for p in parts) == cut["text"]
    assert [p["finish_reason"] for p in parts] == [None] * (len(parts) - 1) + ["stop"]
    words = [{"role": "u", "content": "Who?"}]
    chat = json.loads(post(url, "chat/completions", messages=words, max_tokens=9)[1])["choices"][0]["message"]
    assert chat == {"role": "assistant", "content": alone(single, "u: Who?\na: ", 9)}


@pytest.mark.parametrize(
    "path, body, said",
    [
        ("completions", {}, "prompt"),
        ("completions", {"prompt": "x", "best_of": 3}, "best_of"),
        ("completions", {"prompt": "x", "temperature": -1}, "temperature"),
        ("completions", {"prompt": ""}, "is empty"),
        ("completions", {"prompt": [999]}, "outside the vocabulary"),
        ("completions", {"prompt": "x", "max_tokens": 10**6}, "context"),
        ("chat/completions", {"messages": []}, "messages"),
    ],
)
def test_requests_that_cannot_run(url: str, path: str, body: dict[str, Any], said: str):
    status, raw = post(url, path, **body)
    error = json.loads(raw)["error"]
    assert status == 400 and error["type"] == "invalid_request_error" and said in error["message"]
