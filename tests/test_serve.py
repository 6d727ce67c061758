"""The server of examples/serve.py over HTTP: concurrent answers are single answers; bad requests."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve`")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import serve  # noqa: E402

from tcal_compiler.runtime.session import OnnxSession  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)
WORDS = ["The old man", "A", "and then she", "Zebra 9", "of the sea", "How", "in 1805", "We were", "no", "it is so"]


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


def alone(run: Path, prompt: str, count: int, **options: Any) -> str:
    session = OnnxSession(run / "onnx", threads=1)
    return bytes(session.generate(list(prompt.encode()), count, **options)).decode("utf-8", "replace")


def streamed(raw: bytes) -> list[dict[str, Any]]:
    events = [e.removeprefix("data: ") for e in raw.decode().strip().split("\n\n")]
    assert events.pop() == "[DONE]"
    return [json.loads(e)["choices"][0] for e in events]


def test_concurrent_requests_do_not_mix(shared_run: Path, url: str):
    def ask(i: int) -> str:
        options = {"temperature": 1.0, "seed": i} if i % 2 else {}
        status, raw = post(url, "completions", prompt=WORDS[i], max_tokens=12 + i, stream=i % 3 == 0, **options)
        assert status == 200
        if i % 3:
            return str(json.loads(raw)["choices"][0]["text"])
        return "".join(c["text"] for c in streamed(raw))

    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(ask, range(10)))
    expected = [
        alone(shared_run, w, 12 + i, **({"temperature": 1.0, "seed": i} if i % 2 else {})) for i, w in enumerate(WORDS)
    ]
    assert found == expected and len(set(found)) == 10


def test_the_parts_of_an_answer(shared_run: Path, url: str):
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
    assert chat == {"role": "assistant", "content": alone(shared_run, "u: Who?\na: ", 9)}


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
