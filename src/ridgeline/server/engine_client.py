"""The server's side of the engine process: it is started here, watched, and started again when it dies.

One task keeps the process; everybody else sees requests: `submit` gives a stream of what the engine says of
one. When the process dies, every open stream ends with EngineDeadError, and new ones are refused until there
is a process again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ridgeline.config import EngineConfig
from ridgeline.sampling.beam_search import BeamSearchParams
from ridgeline.server.engine_stream import ERRORS, EngineAnswer, EngineStream
from ridgeline.server.messages import (
    EVENTS,
    NOBODY,
    Abort,
    Add,
    Command,
    Embed,
    Embedded,
    Event,
    Failed,
    FrameError,
    Hello,
    Message,
    ModelCard,
    Pieces,
    Pulse,
    Ready,
    Refused,
    Search,
    Sender,
    Start,
    Stop,
    frame,
    read_frame,
)
from ridgeline.types import (
    EngineDeadError,
    Pooling,
    PoolingParams,
    SamplingParams,
)

logger = logging.getLogger("ridgeline.server")

State = Literal["loading", "ready", "stuck", "restarting", "failed", "closed"]


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the server waits for what."""

    pulse_s: float = 3.0  # without a sign of life, the engine counts as stuck
    step_s: float = 10.0  # a step may always take this long
    step_factor: float = 20.0  # and this many times what was expected of it
    kill_s: float = 120.0  # stuck for so long, the process is killed
    last_words_s: float = 2.0  # for what it writes at its end, where that is asked for
    first_backoff_s: float = 0.5
    longest_backoff_s: float = 30.0
    save_s: float = 10.0  # at its end, for saving what it has computed, where there is a folder for it
    calm_s: float = 60.0  # a process that lived so long is restarted without back-off


class EngineClient:
    """Owns the engine process and the folder with its socket. Belongs to one event loop.

    `pieces_limit` bounds what waits for a slow reader. `on_event` hears of every command and every event, for
    metrics; Failed, too, whenever requests end with their engine.
    """

    def __init__(
        self,
        config: EngineConfig,
        patience: Patience | None = None,
        pieces_limit: int = 4096,
    ) -> None:
        self.state: State = "loading"
        self.card: ModelCard | None = None
        self.pulse: Pulse | None = None
        self.restarts = 0
        self.failure = ""
        self._config = config
        self._patience = patience or Patience()
        self._pieces_limit = pieces_limit
        self.on_event: Callable[[Event | Command], None] = lambda event: None
        self._numbers = itertools.count()
        self._streams: dict[int, EngineStream] = {}
        self._answers: dict[int, EngineAnswer] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._heard_s = 0.0
        self._settled = asyncio.Event()  # ready once, or failed for good
        self._task: asyncio.Task[None] | None = None

    # -------------------------------------------------------------------------------------- requests

    @property
    def open_requests(self) -> int:
        return len(self._streams) + len(self._answers)

    @property
    def pid(self) -> int | None:
        """The engine process, if there is one."""
        return self._process.pid if self._process is not None else None

    def submit(
        self,
        tokens: Sequence[int],
        params: SamplingParams | BeamSearchParams,
        stream: bool = True,
        deadline_s: float | None = None,
        arrived_s: float | None = None,
        name: str = "",
        sender: Sender = NOBODY,
    ) -> EngineStream:
        """Begin a request, which arrived just now unless it is said when. One to search for beams never
        streams. Raises EngineDeadError while there is no engine to begin it on."""
        self._check_ready()
        held = EngineStream(self.forget, next(self._numbers), self._pieces_limit, name)
        arrived_s = time.monotonic() if arrived_s is None else arrived_s
        number, prompt = held.number, tuple(tokens)
        if isinstance(params, BeamSearchParams):
            self._say(Search(number, prompt, params, deadline_s, arrived_s, sender))
        else:
            self._say(Add(number, prompt, params, stream, deadline_s, arrived_s, sender))
        self._streams[held.number] = held  # not before it is sent: what cannot be encoded is not left behind
        return held

    async def embed(
        self,
        tokens: Sequence[int],
        pooling: Pooling = "mean",
        normalise: bool = True,
        deadline_s: float | None = None,
        arrived_s: float | None = None,
        name: str = "",
        sender: Sender = NOBODY,
    ) -> Embedded:
        """The vector of a prompt; otherwise as `submit`. Raises RequestError, ExpiredError and
        EngineDeadError; cancelling it aborts the request."""
        self._check_ready()
        params = PoolingParams(pooling, normalise)
        answer = EngineAnswer(next(self._numbers), name)
        arrived_s = time.monotonic() if arrived_s is None else arrived_s
        self._say(Embed(answer.number, tuple(tokens), params, deadline_s, arrived_s, sender))
        self._answers[answer.number] = answer
        try:
            return await answer.embedding
        finally:
            if self._answers.pop(answer.number, None) is not None:
                self._say(Abort(answer.number))

    def _check_ready(self) -> None:
        if self.state not in ("ready", "stuck"):
            raise EngineDeadError(f"the engine is {self.state}; accepted: requests once it is ready")

    def forget(self, stream: EngineStream) -> None:
        """Abort a request that is still open, and tell its stream nothing more."""
        if self._streams.pop(stream.number, None) is not None:
            self._say(Abort(stream.number))

    def _say(self, command: Command) -> None:
        self._send(command)
        self.on_event(command)  # of what could be sent

    def _send(self, message: Message) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame(message))

    # ----------------------------------------------------------------------------- life of the process

    async def start(self) -> ModelCard:
        """Start the process and wait until the model is loaded. Raises EngineDeadError with the cause when it
        cannot be."""
        self._task = asyncio.create_task(self._keep(), name="engine")
        await self._settled.wait()
        if self.card is None:
            raise EngineDeadError(self.failure)
        return self.card

    async def close(self) -> None:
        """End the process; open streams end with EngineDeadError. Idempotent."""
        self.state = "closed"
        if self._task is not None:
            if self._config.cache_dir is not None and self._writer is not None:
                self._send(Stop())
                await asyncio.wait([self._task], timeout=self._patience.save_s)
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._end_streams("the server is closing")

    async def _keep(self) -> None:
        """Run one process after the other."""
        patience, backoff_s = self._patience, self._patience.first_backoff_s
        while True:
            began_s = time.monotonic()
            try:
                last_words = await self._run_once()
            finally:
                self._writer = None
                await self._reap()
            if self.state == "closed":
                return
            self._end_streams(last_words or "the engine process died")
            if self.card is None:  # it never was ready: the same would happen again
                self.state, self.failure = "failed", last_words or "the engine process died while loading"
                self._settled.set()
                return
            self.state = "restarting"
            self.restarts += 1
            if time.monotonic() - began_s > patience.calm_s:
                backoff_s = patience.first_backoff_s
            logger.error("engine died (%s); starting it again in %.1f s", last_words or "no cause", backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, patience.longest_backoff_s)

    async def _run_once(self) -> str:
        """Start a process and listen to it until it is gone; its last words, or none."""
        with tempfile.TemporaryDirectory(prefix="ridgeline-") as folder:  # its mode is 0700
            path = str(Path(folder) / "engine.sock")
            secret = secrets.token_hex(16)
            connected: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
            connected = asyncio.get_running_loop().create_future()
            before = os.umask(0o177)
            try:
                server = await asyncio.start_unix_server(_doorkeeper(secret, connected), path)
            finally:
                os.umask(before)
            async with server:
                self._process = await self._spawn(Start(path, secret, asdict(self._next_config())))
                died = asyncio.create_task(self._process.wait())
                first: set[asyncio.Future[Any]] = {connected, died}
                await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
                if not connected.done():
                    connected.cancel()
                    return ""
                reader, writer = connected.result()
                died.cancel()
                self._writer, self._heard_s = writer, time.monotonic()
                watch = asyncio.create_task(self._watch(self._process))
                try:
                    return await self._listen(reader)
                finally:
                    watch.cancel()
                    writer.close()

    def _next_config(self) -> EngineConfig:
        """What the next process is told: it has a trace of its own, beside that of one that died."""
        trace = self._config.trace
        if trace is None or not self.restarts:
            return self._config
        path = Path(trace)
        return replace(self._config, trace=str(path.with_stem(f"{path.stem}-{self.restarts}")))

    async def _spawn(self, start: Start) -> asyncio.subprocess.Process:
        """A process in a session of its own: a Ctrl-C at the terminal is the server's to handle."""
        command = (sys.executable, "-m", "ridgeline.server.engine_process")
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        assert process.stdin is not None
        process.stdin.write(frame(start)[4:])
        process.stdin.close()
        return process

    async def _reap(self) -> None:
        """Make sure that the process is gone. Its socket is closed, which ends it; a stuck one is killed."""
        if self._process is None:
            return
        if self.state == "closed" and self._config.trace is not None:
            with contextlib.suppress(TimeoutError):  # it writes the end of its trace
                await asyncio.wait_for(self._process.wait(), self._patience.last_words_s)
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        self._process = None

    async def _listen(self, reader: asyncio.StreamReader) -> str:
        last_words = ""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                try:
                    event = await read_frame(reader, EVENTS)
                except FrameError as error:
                    return f"the engine said {error}"
                self._heard_s = time.monotonic()
                if isinstance(event, Failed):
                    last_words = event.message
                self._hear(event)
        return last_words

    def _hear(self, event: Event) -> None:
        self.on_event(event)
        if isinstance(event, Pieces):
            for piece in event.pieces:
                if (stream := self._streams.get(piece.id)) is not None:
                    stream.take(piece)
            for number in event.ended:
                if (stream := self._streams.pop(number, None)) is not None:
                    stream.end()
        elif isinstance(event, Embedded):
            if (answer := self._answers.pop(event.id, None)) is not None and not answer.embedding.done():
                answer.embedding.set_result(event)
        elif isinstance(event, Refused):
            waiting = self._streams.pop(event.id, None) or self._answers.pop(event.id, None)
            if waiting is not None:
                if event.cause == "fault":
                    logger.error("the engine failed on request %s: %s", waiting.name, event.message)
                waiting.fail(ERRORS[event.cause](event.message))
        elif isinstance(event, Pulse):
            self.pulse = event
        elif isinstance(event, Ready):
            self.card, self.state = event.card, "ready"
            self._settled.set()

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Notice a process that does not live on: no pulse, or a step far longer than it was to take."""
        patience, stuck_since_s = self._patience, 0.0
        while True:
            await asyncio.sleep(patience.pulse_s / 4)
            if self.state not in ("ready", "stuck"):
                continue
            silent_s, pulse = time.monotonic() - self._heard_s, self.pulse
            limit_s = max(patience.step_s, patience.step_factor * pulse.expected_step_s) if pulse else 0.0
            if silent_s <= patience.pulse_s and (pulse is None or pulse.step_age_s <= limit_s):
                self.state = "ready"
                continue
            if self.state == "ready":
                self.state, stuck_since_s = "stuck", time.monotonic()
                names = self._names(pulse.in_step if pulse else ())
                logger.error("engine makes no progress; requests in its step: %s", " ".join(names))
            elif time.monotonic() - stuck_since_s > patience.kill_s:
                process.kill()

    def _names(self, numbers: Sequence[int]) -> list[str]:
        """Of these requests, where they are open still; otherwise of all that are."""
        held: dict[int, EngineStream | EngineAnswer] = {**self._streams, **self._answers}
        found = [held[number].name for number in numbers if number in held]
        return found or [each.name for each in held.values()]

    def _end_streams(self, cause: str) -> None:
        held: list[EngineStream | EngineAnswer] = [*self._streams.values(), *self._answers.values()]
        self._streams, self._answers, self.pulse = {}, {}, None
        self.on_event(Failed(cause, startup=False))
        for each in held:
            each.fail(EngineDeadError(f"engine stopped: {cause}"))


def _doorkeeper(
    secret: str, connected: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """Lets in the first connection that says the secret; every other one is closed."""

    async def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            hello = await asyncio.wait_for(read_frame(reader, EVENTS), 10)
        except (FrameError, asyncio.IncompleteReadError, TimeoutError, ConnectionError):
            hello = None
        known = isinstance(hello, Hello) and secrets.compare_digest(hello.secret, secret)
        if known and not connected.done():
            connected.set_result((reader, writer))
        else:
            writer.close()

    return welcome
