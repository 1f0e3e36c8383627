"""`AsyncLLM`, the Python API for servers: an engine in a thread, requests on event loops."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from types import TracebackType
from typing import Any, Self

from ridgeline.config import EngineConfig
from ridgeline.loading import LoadedFace, Message, Prompt, Sender, embedding_of, load_engine, text_of
from ridgeline.types import (
    EngineDeadError,
    Pooling,
    PoolingParams,
    Request,
    RequestError,
    RequestOutput,
    SamplingParams,
    ServiceClass,
)

_SAVE_PAUSE_S = 0.005


class AsyncLLM(LoadedFace):
    """A model for asyncio: the engine runs in a thread of its own and requests come and go while it does.

    `options` are the fields of EngineConfig; loading blocks. An async context manager, or `close` it. When
    the engine fails, everybody who waits, and everybody who comes later, gets EngineDeadError.
    """

    def __init__(self, model: str = "smollm2", **options: Any) -> None:
        self._loaded = load_engine(EngineConfig.from_options({"model": model, **options}))
        self._ids = itertools.count()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards _open and _failure
        self._open: dict[str, _Mailbox] = {}
        self._failure: EngineDeadError | None = None
        self._routes: dict[str, _Mailbox] = {}  # the engine thread's own: who hears of which request
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="ridgeline-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # Python would end the thread in the midst of a step

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        cache_salt: str = "",
        service_class: ServiceClass = "interactive",
        tenant: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Continue a prompt, yielding its state as it grows; the last one is `finished`. `cache_salt`,
        `service_class` and `tenant` as in `LLM.generate`.

        A reader that is slower than the engine gets fewer, longer updates. Leaving the loop, or cancelling
        its task, aborts the request. Raises RequestError and EngineDeadError.
        """
        tokens = await asyncio.to_thread(self._loaded.tokens_of, prompt)
        sender = Sender(cache_salt, service_class, tenant)
        following = self._follow(text_of(prompt), tokens, params, request_id, sender)
        async with aclosing(following) as outputs:
            async for output in outputs:
                yield output

    async def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        cache_salt: str = "",
        service_class: ServiceClass = "interactive",
        tenant: str = "",
        **template: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer a conversation, as `generate` does; `template` as in `LLM.chat`."""
        tokens = await asyncio.to_thread(self._loaded.chat_tokens, messages, **template)
        sender = Sender(cache_salt, service_class, tenant)
        async with aclosing(self._follow(None, tokens, params, request_id, sender)) as outputs:
            async for output in outputs:
                yield output

    async def embed(
        self,
        prompt: Prompt,
        pooling: Pooling = "mean",
        normalise: bool = True,
        request_id: str | None = None,
        cache_salt: str = "",
        service_class: ServiceClass = "interactive",
        tenant: str = "",
    ) -> tuple[float, ...]:
        """A vector for a prompt, as `LLM.embed` makes it."""
        tokens = await asyncio.to_thread(self._loaded.tokens_of, prompt)
        params = PoolingParams(pooling, normalise)
        sender = Sender(cache_salt, service_class, tenant)
        following = self._follow(text_of(prompt), tokens, params, request_id, sender)
        async with aclosing(following) as outputs:
            async for output in outputs:
                last = output
        return embedding_of(last)

    async def abort(self, request_id: str) -> None:
        """End a request; its reader gets a last output with the reason "abort". Unknown ids are ignored."""
        with suppress(EngineDeadError):
            self._send(partial(self._abort, request_id))

    @property
    def is_alive(self) -> bool:
        return self._failure is None

    def close(self) -> None:
        """Stop the engine and free the model. Idempotent; open requests end with EngineDeadError."""
        with suppress(EngineDeadError):
            self._send(self._request_close)
        atexit.unregister(self.close)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    async def _follow(
        self,
        text: str | None,
        tokens: tuple[int, ...],
        params: SamplingParams | PoolingParams | None,
        request_id: str | None,
        sender: Sender,
    ) -> AsyncGenerator[RequestOutput, None]:
        name = request_id if request_id is not None else f"request-{next(self._ids)}"
        request = Request(name, tokens, params or self.sampling_defaults, *sender)
        if not self._loaded.engine.is_prepared(request.params):
            await asyncio.to_thread(self._loaded.engine.prepare, request.params)
        mailbox = _Mailbox(asyncio.get_running_loop())
        with self._lock:
            if name in self._open:
                raise RequestError(f"request id {name!r} is in use; accepted: an id of its own")
            if self._failure is None:
                self._open[name] = mailbox
        finished = False
        try:
            self._send(partial(self._admit, request, text, mailbox))
            while not finished:
                output = await mailbox.next()
                finished = output.finished
                yield output
        finally:
            if not finished:
                await self.abort(name)  # before the id is free, so that it cannot meet the next one's request
            with self._lock:
                self._open.pop(name, None)

    def _send(self, command: Callable[[], None]) -> None:
        with self._lock:
            if self._failure is not None:
                raise EngineDeadError(str(self._failure))
            self._commands.put(command)

    # --------------------------------------------------------------------- on the engine's thread

    def _serve(self) -> None:
        engine = self._loaded.engine
        failure = EngineDeadError("engine was closed; accepted: requests before close()")
        try:
            while not self._closing:
                if not engine.has_work:
                    self._wait(engine.idle())
                while not self._commands.empty():
                    self._commands.get()()
                self._deliver(engine.step())
        except BaseException as error:  # whatever it was, nobody may be left waiting
            failure = EngineDeadError(f"engine stopped: {type(error).__name__}: {error}")
            failure.__cause__ = error
        with self._lock:
            self._failure = failure
            waiting = list(self._open.values())
        for mailbox in waiting:
            _post([(mailbox, EngineDeadError(str(failure)))])
        with suppress(Exception):  # the engine may be past closing in order
            engine.close()

    def _wait(self, soon: bool) -> None:
        """For a command; not for long where the engine has something to do without work."""
        try:
            command = self._commands.get(timeout=_SAVE_PAUSE_S if soon else None)
        except queue.Empty:
            return
        command()

    def _request_close(self) -> None:
        self._closing = True

    def _admit(self, request: Request, text: str | None, mailbox: _Mailbox) -> None:
        try:
            self._loaded.engine.add(request, text)
            self._routes[request.id] = mailbox
        except Exception as error:  # what is wrong with one request must not end the others
            _post([(mailbox, error)])

    def _abort(self, request_id: str) -> None:
        output = self._loaded.engine.abort(request_id)
        if output is not None:
            self._deliver([output])

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        letters: list[tuple[_Mailbox, RequestOutput | Exception]] = []
        for output in outputs:
            mailbox = self._routes[output.request_id]
            if output.finished or mailbox.loop.is_closed():
                del self._routes[output.request_id]
            if mailbox.loop.is_closed():
                self._loaded.engine.abort(output.request_id)  # its reader can never come back
            letters.append((mailbox, output))
        _post(letters)


class _Mailbox:
    """The newest state of one request, for its reader. All but `loop` belongs to that loop's thread."""

    __slots__ = ("_arrived", "_latest", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._arrived = asyncio.Event()
        self._latest: RequestOutput | Exception | None = None

    def put(self, letter: RequestOutput | Exception) -> None:
        if isinstance(self._latest, RequestOutput) and self._latest.finished:
            return  # the engine may end before its last word was read
        self._latest = letter
        self._arrived.set()

    async def next(self) -> RequestOutput:
        """Wait for a state that was not seen yet; raises the error that ended the request."""
        await self._arrived.wait()
        self._arrived.clear()
        letter = self._latest
        assert letter is not None
        if isinstance(letter, Exception):
            raise letter
        return letter


def _post(letters: Sequence[tuple[_Mailbox, RequestOutput | Exception]]) -> None:
    """Hand letters to their mailboxes on the readers' loops, with one wake-up for each loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Mailbox, RequestOutput | Exception]]] = {}
    for mailbox, letter in letters:
        by_loop.setdefault(mailbox.loop, []).append((mailbox, letter))
    for loop, group in by_loop.items():
        with suppress(RuntimeError):  # a loop that was closed has no readers
            loop.call_soon_threadsafe(_put_all, group)


def _put_all(letters: Sequence[tuple[_Mailbox, RequestOutput | Exception]]) -> None:
    for mailbox, letter in letters:
        mailbox.put(letter)
