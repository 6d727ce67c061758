"""An OpenAI-compatible server for the ONNX student of a run folder.

    pip install -e ".[serve]"
    python examples/serve.py run --port 8000 --dtype int8
    curl localhost:8000/v1/completions -d '{"prompt": "The old man", "max_tokens": 20, "stream": true}'

POST /v1/completions and /v1/chat/completions (with the chat template of the teacher's tokenizer), GET /v1/models. The
model is loaded once. Every request has a session of its own, which shares nothing but the weights, so that its answer
is the one that it would get alone; at most `workers` of them compute at a time, and they take turns token by token.
Fields that would change the answer and are not known here are refused, not ignored.
"""

from __future__ import annotations

import argparse
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tcal_compiler.errors import DataError, TcalError
from tcal_compiler.runtime.run_folder import RunFolder
from tcal_compiler.runtime.session import OnnxSession
from tcal_compiler.runtime.text_stream import TextStream
from tcal_compiler.runtime.tokenizer import TokenizerLike
from tcal_compiler.variants import model_file, require_variant, run_tokenizer


class Options(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="forbid")
    model: str = ""
    max_tokens: int = Field(64, ge=1)
    temperature: float = 0.0
    top_p: float | None = None
    seed: int = Field(0, ge=0)
    stop: str | list[str] = []
    stream: bool = False
    n: int = Field(1, ge=1, le=1)
    user: str | None = None  # changes nothing

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(s for s in ([self.stop] if isinstance(self.stop, str) else self.stop) if s)


class Completion(Options):
    prompt: str | list[int]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: str
    content: str


class Chat(Options):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


@dataclass(frozen=True)
class Piece:
    """The next part of an answer; finish_reason is "stop" or "length" in its last piece."""

    text: str
    tokens: int
    finish_reason: str | None = None


class Student:
    """One loaded model for all requests."""

    def __init__(self, run: Path, *, dtype: str | None = None, threads: int = 1) -> None:
        with RunFolder.open_existing(run) as opened:
            opened.require("export")
            if dtype is not None:
                require_variant(opened, dtype)
            self.tokenizer: TokenizerLike = run_tokenizer(opened)
            folder = opened.path / model_file(dtype).parent
            self._session = OnnxSession(folder, threads=threads)
        self.name, self._template = Path(run).resolve().name, folder / "chat_template.jinja"

    def prompt_ids(self, request: Completion | Chat) -> list[int]:
        if isinstance(request, Completion):
            given = request.prompt
            ids = list(given) if isinstance(given, list) else self.tokenizer.encode(given, special=True)
            vocabulary = min(self._session.vocab_size, self.tokenizer.num_tokens)
            if wrong := [i for i in ids if not 0 <= i < vocabulary]:
                raise DataError("prompt", f"token {wrong[0]} is outside the vocabulary of {vocabulary}", "text")
            return ids
        if not self._template.is_file():
            raise DataError("messages", "this student has no chat template", "/v1/completions")
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        try:
            template = ImmutableSandboxedEnvironment().from_string(self._template.read_text(encoding="utf-8"))
            messages = [m.model_dump() for m in request.messages]
            text = template.render(messages=messages, add_generation_prompt=True, bos_token="", eos_token="")
        except jinja2.TemplateError as e:
            raise DataError("messages", f"the chat template fails: {e}", "other roles, or /v1/completions") from e
        return self.tokenizer.encode(text)

    def answer(self, ids: list[int], options: Options) -> Iterator[Piece]:
        """Parts of the answer. Raises, before the first one, TcalError for options and prompts that cannot run."""
        eos = self.tokenizer.eos_token_id
        limit = options.max_tokens
        if isinstance(options, Chat) and options.max_completion_tokens is not None:
            limit = options.max_completion_tokens
        tokens = self._session.fork().generate(
            ids, limit, eos=eos, temperature=options.temperature, top_p=options.top_p, seed=options.seed
        )
        return _pieces(tokens, TextStream(self.tokenizer, ids), eos, options.stops)


def _pieces(tokens: Iterator[int], stream: TextStream, eos: int | None, stops: tuple[str, ...]) -> Iterator[Piece]:
    """Text as it becomes certain: what may be the beginning of a stop string is held back."""
    waiting, count, reason = "", 0, "length"
    most = max((len(s) for s in stops), default=1) - 1
    for token in tokens:
        count += 1
        if token == eos:
            reason = "stop"
            break
        waiting += stream.push(token)
        if found := [at for s in stops if (at := waiting.find(s)) >= 0]:
            yield Piece(waiting[: min(found)], count, "stop")
            return
        ready = len(waiting) - most
        if ready > 0:
            yield Piece(waiting[:ready], count)
            waiting = waiting[ready:]
        else:
            yield Piece("", count)
    waiting += stream.end()
    if found := [at for s in stops if (at := waiting.find(s)) >= 0]:
        waiting, reason = waiting[: min(found)], "stop"
    yield Piece(waiting, count, reason)


class Reply:
    """The JSON of one answer, whole or in chunks."""

    def __init__(self, student: Student, request: Completion | Chat, prompt_tokens: int) -> None:
        self.chat, self.prompt_tokens = isinstance(request, Chat), prompt_tokens
        kind = "chatcmpl" if self.chat else "cmpl"
        self.head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": student.name}

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        text, last = "".join(p.text for p in pieces), pieces[-1]
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        total = self.prompt_tokens + last.tokens
        usage = {"prompt_tokens": self.prompt_tokens, "completion_tokens": last.tokens, "total_tokens": total}
        kind = "chat.completion" if self.chat else "text_completion"
        return self._body(kind, content, last.finish_reason) | {"usage": usage}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        content: dict[str, Any] = {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._body(kind, content, piece.finish_reason)

    def _body(self, kind: str, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "finish_reason": reason, "logprobs": None, **content}
        return {**self.head, "object": kind, "choices": [choice]}


def make_app(student: Student, *, workers: int = 2) -> Any:
    """The ASGI application. workers: steps that run at a time, over all requests."""
    import anyio
    from anyio.to_thread import run_sync
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    slots: list[anyio.CapacityLimiter] = []  # made inside the event loop

    async def pieces_of(source: Iterator[Piece]) -> AsyncIterator[Piece]:
        """One step at a time in a worker thread; waiting requests are served in turn."""
        if not slots:
            slots.append(anyio.CapacityLimiter(workers))
        while (piece := await run_sync(next, source, None, limiter=slots[0])) is not None:
            yield piece

    def refusal(message: str, status: int = 400) -> Response:
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)

    async def complete(http: Request) -> Response:
        kind = Chat if http.url.path.endswith("/chat/completions") else Completion
        try:
            request = kind.model_validate_json(await http.body())
            ids = student.prompt_ids(request)
            source = student.answer(ids, request)
        except ValidationError as e:
            first = e.errors()[0]
            return refusal(f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}")
        except TcalError as e:
            return refusal(str(e))
        reply = Reply(student, request, len(ids))

        async def events() -> AsyncIterator[str]:
            try:
                async for piece in pieces_of(source):
                    yield f"data: {json.dumps(reply.chunk(piece))}\n\n"
            except TcalError as e:  # behind the first chunk there is no status left to send
                yield f"data: {json.dumps({'error': {'message': str(e), 'type': 'server_error'}})}\n\n"
                return
            yield "data: [DONE]\n\n"

        if request.stream:
            return StreamingResponse(events(), media_type="text/event-stream")
        try:
            return JSONResponse(reply.whole([p async for p in pieces_of(source)]))
        except TcalError as e:
            return refusal(str(e), 500)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": student.name, "object": "model"}]})

    paths = ("/v1/completions", "/v1/chat/completions")
    return Starlette(routes=[Route("/v1/models", models), *(Route(path, complete, methods=["POST"]) for path in paths)])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path)
    p.add_argument("--dtype", choices=["fp16", "int8", "int4"], help="which export; default float32")
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=int, default=8000)
    p.add_argument("--threads", type=int, default=1, help="of ONNX Runtime, for one step")
    p.add_argument("--workers", type=int, default=2, help="steps that run at a time")
    args = p.parse_args()
    import uvicorn

    student = Student(args.run, dtype=args.dtype, threads=args.threads)
    uvicorn.run(make_app(student, workers=args.workers), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
