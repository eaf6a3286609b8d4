"""OpenAI's protocol over the sampling engine: /v1/models, /v1/completions and /v1/chat/completions.

Token ids travel too: a prompt may be ids, and `return_token_ids` gives those of the answer, the stop id included, each
with its log-prob where `logprobs` asks for them. `stop` ends an answer at a text, one of at most 16, which
`include_stop_str_in_output` leaves in it; a choice's `stop_reason` then names it. Log-probs are of the tokens drawn,
never of alternatives. An unknown or unsupported field that would change the answer is refused by name (400), never
ignored.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from aiohttp import web

from swirl.model.tokenizer import CONTROL_TOKENS, Tokenizer
from swirl.sampling.draw import SamplingParams
from swirl.sampling.engine import Engine
from swirl.sampling.in_flight import Completion

Count = Annotated[int, msgspec.Meta(ge=1, le=128)]
Stops = Annotated[list[str], msgspec.Meta(max_length=16)]  # each is looked for every few tokens
_IGNORED = {"user", "stream_options", "metadata", "store", "echo", "best_of", "suffix", "frequency_penalty",
            "presence_penalty", "logit_bias", "response_format", "tools", "tool_choice", "parallel_tool_calls",
            "top_logprobs"}  # fmt: skip
_HARMLESS = (None, False, 0, 0.0, "", [], {}, "auto", "none")  # values of those that ask for nothing
_CONTROL = re.compile("(" + "|".join(map(re.escape, CONTROL_TOKENS)) + ")")


class _Request(msgspec.Struct):
    """What both kinds of request share."""

    model: str = ""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    n: Count = 1
    seed: int | None = None
    stop: str | Stops | None = None
    include_stop_str_in_output: bool = False
    stream: bool = False
    return_token_ids: bool = False


class CompletionRequest(_Request):
    prompt: str | list[str | int | list[int]] = ""  # a text, ids, or many of either
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] = 16
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=1)] | bool | None = None  # above 1 asks for alternatives


class Message(msgspec.Struct):
    role: str
    content: str | None = ""


class ChatRequest(_Request):
    messages: list[Message] = []
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    logprobs: bool | None = None


class Refused(Exception):
    """A request that is not served: its HTTP status and why, in a line."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class _Asked:
    """One sequence to draw for one choice of an answer."""

    index: int
    state: list[int]
    seed: int
    params: SamplingParams


class Server:
    """Answers requests by `engine`; `runner()` is what listens to them."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, *, name: str, key: str | None, max_concurrency: int,
        max_body_bytes: int,
    ):  # fmt: skip
        self._engine, self._tokenizer, self._name, self._key = engine, tokenizer, name, key
        self._max_concurrency, self._max_body_bytes = max_concurrency, max_body_bytes
        self._context = engine.model.config.max_position_embeddings
        self._num_sequences, self._draining, self._started = 0, False, int(time.time())
        self._reading: set[asyncio.Task] = set()  # those whose body is not all there yet
        self.num_in_flight = 0

    def runner(self) -> web.AppRunner:
        app = web.Application(middlewares=[self._guard], client_max_size=self._max_body_bytes)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        return web.AppRunner(app, access_log=None, handler_cancellation=True)  # who has left is not drawn for

    async def drain(self) -> None:
        """Refuse new requests, those half sent too, and return when those in flight are answered."""
        self._draining = True
        for task in self._reading:
            task.cancel()
        while self.num_in_flight:
            await asyncio.sleep(0.01)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]):
        """Key, limits, and every refusal in OpenAI's form."""
        try:
            if self._key is not None and request.path != "/health":
                given = request.headers.get("Authorization", "").removeprefix("Bearer ")
                if not hmac.compare_digest(given.encode(), self._key.encode()):
                    raise Refused(401, "expected the key of this server as 'Authorization: Bearer …'")
            if self._draining:
                raise Refused(503, "the server is ending")
            return await handler(request)
        except Refused as refused:
            return _error(refused.status, str(refused))
        except web.HTTPException as refused:
            return _error(refused.status, refused.reason)

    async def _health(self, request: web.Request) -> web.Response:
        return _json({"status": "ok"})

    async def _models(self, request: web.Request) -> web.Response:
        model = {"id": self._name, "object": "model", "created": self._started, "owned_by": "swirl"}
        return _json({"object": "list", "data": [model | {"max_model_len": self._context}]})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        asked = await self._read(request, CompletionRequest)
        prompts = asked.prompt if isinstance(asked.prompt, list) else [asked.prompt]
        if prompts and all(isinstance(prompt, int) for prompt in prompts):
            prompts = [prompts]
        if not prompts:
            raise Refused(400, "prompt: expected at least one")
        if any(isinstance(prompt, int) for prompt in prompts):
            raise Refused(400, "prompt: expected a text or token ids, or a list of either")
        with self._reserved(len(prompts) * asked.n):
            states = []
            for prompt in prompts:
                ids = prompt if isinstance(prompt, list) else await asyncio.to_thread(self._ids_of, prompt)
                states.append(self._fitting(ids, asked.max_tokens))
            wants = asked.logprobs is not None and asked.logprobs is not False
            return await self._answer(request, asked, states, asked.max_tokens, _Text(self._tokenizer, asked, wants))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        asked = await self._read(request, ChatRequest)
        with self._reserved(asked.n):
            ids = await asyncio.to_thread(self._ids_of_messages, asked.messages)
            most = asked.max_completion_tokens or asked.max_tokens or max(1, min(1024, self._context - len(ids)))
            form = _Chat(self._tokenizer, asked, bool(asked.logprobs))
            return await self._answer(request, asked, [self._fitting(ids, most)], most, form)

    async def _read(self, request: web.Request, kind: type):
        body = await self._body(request)
        try:
            fields = msgspec.json.decode(body, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Refused(400, f"expected a JSON object: {error}") from None
        try:
            known = {field.name for field in msgspec.structs.fields(kind)}
            for name, value in fields.items():
                if name not in known and not (
                    name in _IGNORED and (name in ("user", "stream_options", "metadata") or value in _HARMLESS)
                ):
                    raise Refused(400, f"{name}: not supported here")
            asked = msgspec.convert({k: v for k, v in fields.items() if v is not None}, kind)
        except msgspec.ValidationError as error:
            raise Refused(400, str(error)) from None
        if asked.model not in ("", self._name):
            raise Refused(404, f"model '{asked.model}' is not here: expected '{self._name}'")
        return asked

    async def _body(self, request: web.Request) -> bytes:
        """All of it; `drain` does not wait for more to come."""
        task = asyncio.current_task()
        self._reading.add(task)
        try:
            return await request.read()
        except web.RequestPayloadError:
            request.content.feed_eof()  # else aiohttp reads on, and fails
            raise Refused(400, "expected a body in the encoding that its headers name") from None
        finally:
            self._reading.discard(task)

    @contextmanager
    def _reserved(self, num_sequences: int) -> Iterator[None]:
        """Room for the sequences of a request that is in flight from here on, before anything is made for them."""
        if num_sequences > self._max_concurrency:
            raise Refused(400, f"{num_sequences} sequences in a request: expected at most {self._max_concurrency}")
        if self._num_sequences + num_sequences > self._max_concurrency:
            raise Refused(429, f"{self._num_sequences} sequences are in flight, of at most {self._max_concurrency}")
        self._num_sequences += num_sequences
        self.num_in_flight += 1
        try:
            yield
        finally:
            self._num_sequences -= num_sequences
            self.num_in_flight -= 1

    def _ids_of(self, text: str) -> list[int]:
        """<bos> and the text, in which spelled control tokens are those tokens: a prompt is its client's own."""
        ids = [self._tokenizer.bos_id]
        for part in _CONTROL.split(text.removeprefix("<bos>")):
            control = self._tokenizer.token_id(part) if _CONTROL.fullmatch(part) else None
            ids += self._tokenizer.encode(part) if control is None else [control]
        return ids

    def _ids_of_messages(self, messages: list[Message]) -> list[int]:
        """Gemma's turns: user and assistant in turn; what the system says comes before the first of the user."""
        if not messages or any(m.role not in ("system", "developer", "user", "assistant") for m in messages):
            raise Refused(400, "messages: expected those of the roles system, user and assistant")
        system = [m.content or "" for m in messages if m.role in ("system", "developer")]
        turns = [m for m in messages if m.role in ("user", "assistant")]
        if [m.role for m in turns] != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
            raise Refused(400, "messages: expected user and assistant in turn, the user first and last")
        first = "\n\n".join([*system, turns[0].content or ""])
        ids = list(self._tokenizer.prompt_ids(first))
        for answer, question in zip(turns[1::2], turns[2::2], strict=True):
            ids += self._tokenizer.action_ids(answer.content or "")
            ids += self._tokenizer.observation_ids(question.content or "")
        return ids

    def _fitting(self, state: list[int], most: int) -> list[int]:
        if len(state) + most > self._context:
            raise Refused(400, f"{len(state)} tokens and {most} new ones exceed the model's context of {self._context}")
        return state

    def _params(self, asked: _Request, max_new_tokens: int) -> SamplingParams:
        stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        control = {stop: self._tokenizer.token_id(stop) for stop in stops if stop in CONTROL_TOKENS}
        ids = dict.fromkeys((*self._tokenizer.stop_ids, *(id for id in control.values() if id is not None)))
        texts = tuple(stop for stop in stops if stop not in control)
        try:
            return SamplingParams(
                max_new_tokens, asked.temperature, tuple(ids), texts, asked.top_k, asked.top_p, asked.min_p
            )
        except ValueError as error:
            raise Refused(400, str(error)) from None

    async def _answer(self, request, asked: _Request, states: list[list[int]], most: int, form) -> web.StreamResponse:
        params = self._params(asked, most)
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        # every choice draws by itself; the first by the seed as it is given
        sequences = [
            _Asked(i * asked.n + j, state, seed + (j << 32) + i * asked.n, params)
            for i, state in enumerate(states)
            for j in range(asked.n)
        ]
        head = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": self._name}
        if asked.stream:
            return await self._stream(request, sequences, form, head, asked.return_token_ids)
        made = await self._draw_all(sequences)
        choices = [
            form.choice(one, completion, asked.return_token_ids)
            for one, completion in zip(sequences, made, strict=True)
        ]
        given, drawn = sum(map(len, states)), sum(len(completion.ids) for completion in made)
        usage = {"prompt_tokens": given, "completion_tokens": drawn, "total_tokens": given + drawn}
        return _json({**head, "object": form.object, "choices": choices, "usage": usage})

    async def _draw_all(self, sequences: list[_Asked]) -> list[Completion]:
        """All of them, or the first failure, and then none goes on."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._engine.generate(one.state, seed=one.seed, params=one.params))
                    for one in sequences
                ]
        except* Exception as errors:
            raise _refused(errors.exceptions[0]) from None
        return [task.result() for task in tasks]

    async def _stream(self, request, sequences: list[_Asked], form, head: dict, with_ids: bool) -> web.StreamResponse:
        """Server-sent events: pieces of text as they are sure, then each choice's end, then [DONE].

        What fails before the first piece is refused as it is without a stream; later it is an event, and the last.
        """
        pieces: asyncio.Queue[dict | Exception] = asyncio.Queue()

        async def draw(one: _Asked):
            drawn = Piecewise(self._tokenizer, one.params.stop_texts)

            def took(ids, log_probs):
                text = drawn.text_of(ids)
                if text:
                    pieces.put_nowait(form.piece(one.index, text))

            try:
                completion = await self._engine.generate(one.state, seed=one.seed, params=one.params, on_tokens=took)
                text = drawn.rest_of(form.text_of(completion))
                pieces.put_nowait(form.last_piece(one, completion, text, with_ids))
            except Exception as error:
                pieces.put_nowait(error)

        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        tasks = [asyncio.create_task(draw(one)) for one in sequences]
        try:
            piece = await pieces.get()
            if isinstance(piece, Exception):
                raise _refused(piece)
            await response.prepare(request)
            for one in sequences:
                if (opening := form.opening(one.index)) is not None:
                    await _send(response, {**head, "object": form.chunk_object, "choices": [opening]})
            left = len(sequences)
            while left:
                if isinstance(piece, Exception):
                    await _send(response, {"error": {"message": str(piece), "type": "server_error"}})
                    break
                await _send(response, {**head, "object": form.chunk_object, "choices": [piece]})
                left -= piece["finish_reason"] is not None
                piece = await pieces.get() if left else None
            await response.write(b"data: [DONE]\n\n")
        except ConnectionError:
            pass  # the client has left
        finally:
            for task in tasks:
                task.cancel()
        return response


class Piecewise:
    """The text of a sequence piece by piece: what later tokens could still change is held back."""

    def __init__(self, tokenizer: Tokenizer, stop_texts: tuple[str, ...]):
        self._tokenizer, self._held = tokenizer, max((len(stop) for stop in stop_texts), default=1) - 1
        self._sent = 0

    def text_of(self, ids: tuple[int, ...]) -> str:
        """What is sure and new; a character whose bytes are not all there yet is not."""
        text = self._tokenizer.decode(ids).rstrip("\ufffd")
        text = text[: max(0, len(text) - self._held)]
        piece, self._sent = text[self._sent :], max(self._sent, len(text))
        return piece

    def rest_of(self, text: str) -> str:
        return text[self._sent :]


class _Form:
    """How an answer of one protocol is written."""

    def __init__(self, tokenizer: Tokenizer, asked: _Request, with_log_probs: bool):
        self._tokenizer, self._with_log_probs = tokenizer, with_log_probs
        self._with_stop_text = asked.include_stop_str_in_output

    def text_of(self, completion: Completion) -> str:
        """Without the stop token, and up to the stop text, which is part of it where that was asked for."""
        text, stop = self._tokenizer.decode(completion.ids), completion.stop_text
        if stop is None:
            return text
        return text[: text.index(stop) + (len(stop) if self._with_stop_text else 0)]

    def _ending(self, one: _Asked, completion: Completion, with_ids: bool) -> dict:
        ending: dict[str, Any] = {"index": one.index, "finish_reason": "stop" if completion.stopped else "length"}
        ending["stop_reason"] = completion.stop_text
        ending["logprobs"] = self._log_probs(completion) if self._with_log_probs else None
        return ending | ({"token_ids": list(completion.ids)} if with_ids else {})

    def _names(self, completion: Completion) -> list[str]:
        return [self._tokenizer.decode([id]) or f"token_id:{id}" for id in completion.ids]

    def opening(self, index: int) -> dict | None:
        return None


class _Text(_Form):
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, one: _Asked, completion: Completion, with_ids: bool) -> dict:
        return {"text": self.text_of(completion), **self._ending(one, completion, with_ids)}

    def piece(self, index: int, text: str) -> dict:
        return {"index": index, "text": text, "finish_reason": None, "logprobs": None}

    def last_piece(self, one: _Asked, completion: Completion, text: str, with_ids: bool) -> dict:
        return {"text": text, **self._ending(one, completion, with_ids)}

    def _log_probs(self, completion: Completion) -> dict:
        names = self._names(completion)
        return {"tokens": names, "token_logprobs": list(completion.log_probs), "top_logprobs": None, "text_offset": []}


class _Chat(_Form):
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, one: _Asked, completion: Completion, with_ids: bool) -> dict:
        message = {"role": "assistant", "content": self.text_of(completion)}
        return {"message": message, **self._ending(one, completion, with_ids)}

    def opening(self, index: int) -> dict:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def piece(self, index: int, text: str) -> dict:
        return {"index": index, "delta": {"content": text}, "finish_reason": None, "logprobs": None}

    def last_piece(self, one: _Asked, completion: Completion, text: str, with_ids: bool) -> dict:
        return {"delta": {"content": text} if text else {}, **self._ending(one, completion, with_ids)}

    def _log_probs(self, completion: Completion) -> dict:
        tokens = zip(self._names(completion), completion.log_probs, completion.ids, strict=True)
        content = [
            {"token": name, "logprob": log_prob, "bytes": list(name.encode()), "top_logprobs": [], "id": id}
            for name, log_prob, id in tokens
        ]
        return {"content": content, "refusal": None}


def _refused(error: Exception) -> Refused:
    """What the engine says of a request: ValueError where it cannot be answered as it is."""
    return Refused(400 if isinstance(error, ValueError) else 500, str(error))


def _json(value: dict, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")


def _error(status: int, reason: str) -> web.Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    response = _json({"error": {"message": reason, "type": kind, "param": None, "code": status}}, status)
    if status in (429, 503):
        response.headers["Retry-After"] = "1"
    return response


async def _send(response: web.StreamResponse, value: dict) -> None:
    await response.write(b"data: " + msgspec.json.encode(value) + b"\n\n")
