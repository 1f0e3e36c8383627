"""The engine's own process: it alone holds the model. The server starts it, and it ends with the server.

    python -m ridgeline.server.engine_process     (told what to do on its standard input)

Three threads: one loads the model and then steps the engine, one reads commands, one tells every now and then
that the process lives and how long the step under way has taken.
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from setproctitle import setproctitle

from ridgeline.beams import BeamRequests, Searched, owner_of
from ridgeline.config import EngineConfig
from ridgeline.engine import Engine
from ridgeline.loading import LoadedModel, device_ceilings, embedding_of, load_engine
from ridgeline.server.compiling import Compiling
from ridgeline.server.messages import (
    COMMANDS,
    START,
    Abort,
    Add,
    Begun,
    Command,
    Embed,
    Embedded,
    Failed,
    FrameError,
    Hello,
    Message,
    ModelCard,
    Piece,
    Pieces,
    Pulse,
    Ready,
    Refused,
    Search,
    Start,
    Steps,
    Stop,
    frame,
    receive_frame,
)
from ridgeline.types import CapacityError, Request, RequestError, RequestOutput, RidgelineError

PULSE_S = 0.2
WATCH_S = 0.5
SAVE_PAUSE_S = 0.005
_RECENT_STEPS = 64
_STEPS_AT_ONCE = 64
"""Step records in a message: a frame is short, so that tokens need not wait behind it."""


@dataclass(frozen=True, slots=True)
class _Compiled:
    """What a request needs is there, or cannot be."""

    command: Add | Embed
    error: Exception | None


class EngineWorker:
    """Steps an engine on the commands of one server, and tells it what comes of them.

    `tell` may be called from several threads. Everything else belongs to the thread that runs `serve`.
    """

    def __init__(
        self,
        engine: Engine,
        commands: queue.SimpleQueue[Command | _Compiled],
        tell: Callable[[Message], None],
    ) -> None:
        self._commands = commands
        self._engine = engine
        self._tell = tell
        self._told: dict[int, list[tuple[int, int]]] = {}  # characters and tokens of each choice, if any
        self._searches = BeamRequests(engine)
        self._deadlines: dict[int, float] = {}  # of requests that have not begun
        self._compiling = Compiling()
        self._awaited: set[int] = set()  # of these, what they need is being compiled
        self._step_began_s: float | None = None
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._steps = 0
        self._steps_told = 0  # the pulse's thread's own
        self._stopping = False

    def serve(self) -> None:
        """Until the server says that it is over: commands first, then a step."""
        while not self._stopping:
            if not self._engine.has_work:
                self._wait()
            while not self._commands.empty():
                self._obey(self._commands.get())
            if self._awaited:
                self._compiling.watch()
            if self._engine.has_work:
                self.step()

    def _wait(self) -> None:
        """For a command; not for ever while something is compiled, which has a limit of time, or while there
        is something to save."""
        wait_s = WATCH_S if self._awaited else None
        if self._engine.idle():
            wait_s = SAVE_PAUSE_S
        with suppress(queue.Empty):
            self._obey(self._commands.get(timeout=wait_s))
        if self._awaited:
            self._expire(time.monotonic())

    def step(self) -> None:
        """One step of the engine, and its outcome to the server."""
        self._expire(time.monotonic())
        self._step_began_s = began_s = time.monotonic()
        try:
            outputs = self._engine.step()
        except (MemoryError, CapacityError):
            self._give_up_youngest()
            outputs = []
        self._step_began_s = None
        self._recent.append(time.monotonic() - began_s)
        self._steps += 1
        if self._deadlines:
            self._tell_begun(outputs, began_s)
        outputs, searched = self._searches.take(outputs)
        continued = []
        for output in outputs:
            if self._told[int(output.request_id)]:
                continued.append(output)
            else:
                self._end_embedding(output)
        if continued:
            self._tell(self._pieces(continued))
        for search in searched:
            self._end_search(search)

    def pulse(self) -> Pulse:
        """How things stand; asked from another thread, so that its numbers may be of different moments."""
        began_s, scheduler = self._step_began_s, self._engine.scheduler
        running = list(scheduler.running)
        age_s = 0.0 if began_s is None else time.monotonic() - began_s
        expected_s = self._engine.expected_step_s() if age_s > PULSE_S else None
        return Pulse(
            step_age_s=age_s,
            expected_step_s=expected_s or max(list(self._recent), default=0.0),
            in_step=() if began_s is None else tuple(dict.fromkeys(map(_number_of, self._engine.running))),
            steps=self._steps,
            running=len(running),
            waiting=len(scheduler.waiting),
            kv_used=scheduler.cache.usage,
            drafters={} if scheduler.drafting is None else scheduler.drafting.totals,
            tiers=None if scheduler.cache.tiers is None else scheduler.cache.tiers.record(),
            kv_filled=scheduler.cache.filled((each.pages, each.length) for each in running),
        )

    def new_steps(self) -> Iterator[Steps]:
        """The steps since this was asked before, from the thread that asks for the pulse."""
        recent = self._engine.steps.recent
        records = recent.since(self._steps_told)
        for begin in range(0, len(records), _STEPS_AT_ONCE):
            yield Steps(tuple(records[begin : begin + _STEPS_AT_ONCE]))
        if records:
            self._steps_told = records[-1].number + 1

    def _obey(self, command: Command | _Compiled) -> None:
        if isinstance(command, _Compiled):
            self._begin_compiled(command)
        elif isinstance(command, Add | Embed | Search):
            self._begin(command)
        elif isinstance(command, Stop):
            self._stopping = True
        elif isinstance(command, Abort) and command.id in self._told:
            self._end(command.id)

    def _begin(self, command: Add | Embed | Search) -> None:
        """Begin a request, or first have compiled what it needs: others go on meanwhile."""
        if isinstance(command, Search) or self._engine.is_prepared(command.params):
            self._add(command)
            return
        try:
            self._compiling.submit(
                partial(self._engine.prepare, command.params),
                lambda error: self._commands.put(_Compiled(command, error)),
            )
        except RequestError as error:
            self._tell(_refusal(command.id, error))
            return
        self._awaited.add(command.id)
        self._hold(command, [])

    def _begin_compiled(self, compiled: _Compiled) -> None:
        command = compiled.command
        if command.id not in self._awaited:
            return  # aborted, or expired
        self._forget(command.id)
        if compiled.error is None:
            self._add(command)
        else:
            self._tell(_refusal(command.id, compiled.error))

    def _add(self, command: Add | Embed | Search) -> None:
        number, tokens, sender = str(command.id), command.tokens, command.sender
        whose = sender.cache_salt, sender.service_class, sender.tenant
        try:
            if isinstance(command, Search):
                self._searches.begin(number, tokens, command.params, *whose)
            else:
                stream = isinstance(command, Add) and command.stream
                self._engine.add(Request(number, tokens, command.params, *whose), stream=stream)
        except Exception as error:  # what is wrong with one request must not end the others
            self._tell(_refusal(command.id, error))
            return
        self._hold(command, [(0, 0)] * command.params.n if isinstance(command, Add) else [])

    def _hold(self, command: Add | Embed | Search, told: list[tuple[int, int]]) -> None:
        self._told[command.id] = told
        if command.deadline_s is not None:
            self._deadlines[command.id] = command.deadline_s

    def _expire(self, now_s: float) -> None:
        for request in [number for number, deadline_s in self._deadlines.items() if now_s > deadline_s]:
            self._end(request)
            self._tell(Refused(request, "the request waited longer than it may", "expired"))

    def _give_up_youngest(self) -> None:
        """End the request that came last of those that run: there is no memory for all of them. A step that
        failed changed nothing, so the others go on with the next one."""
        running = self._engine.running
        request = _number_of(running[-1]) if running else next(iter(self._told))
        self._end(request)
        self._tell(Refused(request, "there is too little memory for this request", "capacity"))

    def _tell_begun(self, outputs: Sequence[RequestOutput], began_s: float) -> None:
        """After a step: which requests need not be waited for any longer."""
        # The engine may have forgotten these already.
        given = {_number_of(output.request_id) for output in outputs}
        waiting = [each for each in self._deadlines if each not in self._awaited]
        begun = [each for each in waiting if each in given or self._has_begun(str(each))]
        if begun:
            for request in begun:
                del self._deadlines[request]
            self._tell(Begun(tuple(begun), began_s))

    def _has_begun(self, request: str) -> bool:
        begun = self._searches.has_begun(request)
        return self._engine.has_begun(request) if begun is None else begun

    def _end(self, request: int) -> None:
        """End a request where it stands."""
        self._forget(request)
        if not self._searches.abort(str(request)):
            self._engine.abort(str(request))

    def _forget(self, request: int) -> None:
        del self._told[request]
        self._awaited.discard(request)
        self._deadlines.pop(request, None)

    def _end_embedding(self, output: RequestOutput) -> None:
        request = int(output.request_id)
        self._forget(request)
        try:
            self._tell(Embedded(request, embedding_of(output), output.cached_tokens))
        except Exception as error:
            self._tell(_refusal(request, error))

    def _end_search(self, ended: Searched) -> None:
        """Tell what a search has found, a beam at a time: a frame is short."""
        request = int(ended.id)
        self._forget(request)
        if ended.error is not None:
            self._tell(_refusal(request, ended.error))
            return
        last = len(ended.beams) - 1
        for index, beam in enumerate(ended.beams):
            found = beam.text, beam.token_ids, beam.logprobs, beam.finish_reason, beam.stop_reason
            cached_tokens = ended.cached_tokens if index == 0 else 0
            piece = Piece(request, index, *found, None, cached_tokens, beam.cumulative_logprob)
            self._tell(Pieces((piece,), (request,) if index == last else ()))

    def _pieces(self, outputs: Sequence[RequestOutput]) -> Pieces:
        """What is new in each request's state."""
        pieces, ended = [], []
        for output in outputs:
            request = int(output.request_id)
            told = self._told[request]
            for choice in output.outputs:
                characters, tokens = told[choice.index]
                if choice.finish_reason is None and choice.tokens == tokens:
                    continue
                told[choice.index] = (choice.characters, choice.tokens)
                new = choice.since(characters, tokens)
                reasons = (choice.finish_reason, choice.stop_reason)
                first = choice.index == tokens == 0
                of_prompt = (output.prompt_logprobs, output.cached_tokens) if first else ()
                pieces.append(Piece(request, choice.index, *new, *reasons, *of_prompt))
            if output.finished:
                ended.append(request)
                self._forget(request)
        return Pieces(tuple(pieces), tuple(ended))


def _number_of(request_id: str) -> int:
    """The server's number for a request of the engine."""
    return int(owner_of(request_id))


def _refusal(request: int, error: Exception) -> Refused:
    if isinstance(error, MemoryError | CapacityError):
        return Refused(request, "there is too little memory for this request", "capacity")
    if isinstance(error, RequestError):
        return Refused(request, str(error))
    return Refused(request, f"{type(error).__name__}: {error}", "fault")


def card_of(loaded: LoadedModel) -> ModelCard:
    """What the server needs to know of a model."""
    config = loaded.config
    assert config.max_model_len is not None
    return ModelCard(
        model=config.model,
        device=config.device,
        formats=dict(loaded.formats),
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        vocabulary_size=loaded.engine.model.vocabulary_size,
        sampling_defaults=loaded.sampling_defaults,
        prefix_caching=config.enable_prefix_caching,
        energy_source=loaded.engine.steps.energy_source,
    )


# ---------------------------------------------------------------------------------------- the process


class _Line:
    """The connection to the server, which several threads write to. `at_end` is called when the server is
    gone, before the process is."""

    def __init__(self, start: Start) -> None:
        self.at_end: Callable[[], None] = lambda: None
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.connect(start.socket_path)
        self._lock = threading.Lock()  # guards whole frames
        self.tell(Hello(start.secret))

    def tell(self, message: Message) -> None:
        content = frame(message)
        try:
            with self._lock:
                self._connection.sendall(content)
        except OSError:  # the server is gone; whoever finds out first ends this
            self._end()

    def listen(self, obey: Callable[[Command], None]) -> None:
        """Take in commands until the server is gone, and then be gone too."""
        try:
            while True:
                obey(receive_frame(self._connection, COMMANDS))
        except (EOFError, OSError, FrameError):
            self._end()

    def _end(self) -> NoReturn:
        try:
            self.at_end()
        finally:
            os._exit(0)


def _pulses(worker: EngineWorker, line: _Line) -> None:
    while True:
        time.sleep(PULSE_S)
        with suppress(RuntimeError):  # a queue that changed while it was looked at
            line.tell(worker.pulse())
        for steps in worker.new_steps():
            line.tell(steps)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server says when it is over
    setproctitle("ridgeline-engine")
    start = START.decode(sys.stdin.buffer.read())
    line = _Line(start)
    commands: queue.SimpleQueue[Command | _Compiled] = queue.SimpleQueue()
    threading.Thread(target=line.listen, args=(commands.put,), daemon=True).start()
    try:
        config = EngineConfig.from_options(start.config)
        device_ceilings(config, measure=True)  # known from now on: every step is shown beside them
        loaded = load_engine(config)
    except (RidgelineError, MemoryError) as error:
        line.tell(Failed(str(error) or "the model needs more memory than there is", startup=True))
        sys.exit(1)
    line.at_end = loaded.engine.steps.close
    worker = EngineWorker(loaded.engine, commands, line.tell)
    gc.collect()
    gc.freeze()  # looking through the tokenizer again and again would hold up all streams for 0.1 s each time
    line.tell(Ready(card_of(loaded)))
    threading.Thread(target=_pulses, args=(worker, line), daemon=True).start()
    try:
        worker.serve()
        loaded.engine.close()
    except Exception as error:  # nobody may be left waiting, whatever it was
        line.tell(Failed(f"{type(error).__name__}: {error}", startup=False))
        raise


if __name__ == "__main__":
    main()
