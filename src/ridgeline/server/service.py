"""What routes use: who may begin a request, how text becomes tokens, and the stream of an answer.

Admission comes first and costs nothing: a request that finds the queue full is refused before its text is
looked at. Tokenizing and templates run in a few threads, never on the event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from starlette.types import Receive

from ridgeline.sampling.beam_search import BeamSearchParams
from ridgeline.server import logs
from ridgeline.server.body import BodyReader, ClientGoneError
from ridgeline.server.config import ApiKey, ServerConfig
from ridgeline.server.engine_client import EngineClient
from ridgeline.server.engine_stream import EngineStream
from ridgeline.server.errors import HttpError, bad_request, unavailable
from ridgeline.server.forecast import WaitForecast
from ridgeline.server.messages import Command, Event, ModelCard, Piece, Sender, Steps
from ridgeline.server.metrics import Metrics
from ridgeline.server.steps import StepFeed
from ridgeline.server.text import TextSide
from ridgeline.server.version import package_version
from ridgeline.server.wire.requests import Queued
from ridgeline.types import SERVICE_CLASSES, SamplingParams, ServiceClass

T = TypeVar("T")

_READ_AHEAD = 64
"""Lists of pieces that may wait for the writer of an answer to several prompts."""


class Service:
    """Everything that the routes share. Belongs to one event loop."""

    def __init__(self, client: EngineClient, text: TextSide, config: ServerConfig) -> None:
        self.client = client
        self.text = text
        self.config = config
        self.metrics = Metrics(client, text.names[0], package_version())
        self.steps = StepFeed()
        self.forecast = WaitForecast()
        client.on_event = self._hear
        self.draining = False
        self.created_s = int(time.time())
        self.open_sequences = 0
        self._tickets: dict[Ticket, None] = {}  # in the order of their arrival
        self._text_jobs = 0
        self._of_key: Counter[str] = Counter()
        self.threads = _started_pool(config.text_threads)
        self.bodies = BodyReader(config, self.threads)

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)

    def drain(self) -> None:
        """Take no more requests, and end what has no end of its own. Idempotent."""
        self.draining = True
        self.steps.close()

    def _hear(self, message: Event | Command) -> None:
        self.metrics.hear(message)
        self.forecast.hear(message)
        if isinstance(message, Steps):
            self.steps.take(message.records)

    # ---------------------------------------------------------------------------------------- state

    @property
    def state(self) -> str:
        """`ready`, or why nobody is served."""
        return "draining" if self.draining else self.client.state

    @property
    def card(self) -> ModelCard:
        """The loaded model. Raises HttpError 503 while there is none."""
        if self.client.card is None:
            raise unavailable(self.state)
        return self.client.card

    @property
    def fingerprint(self) -> str:
        """Tells answers of different models, formats and devices apart."""
        card = self.card
        described = f"{card.model} {card.device} {sorted(card.formats.items())} {card.max_model_len}"
        return "rl_" + hashlib.sha256(described.encode()).hexdigest()[:12]

    def check_ready(self, key: ApiKey | None = None) -> None:
        """Refuse before anything is read: 503 when nobody is served, 429 when the queue is full."""
        if self.state not in ("ready", "stuck"):
            raise unavailable(self.state)
        if self.open_sequences >= self.card.max_num_seqs + self.config.max_queue:
            raise self._overloaded("the queue is full", class_of(key, None))
        if key is not None and key.max_requests is not None and self._of_key[key.name] >= key.max_requests:
            raise overloaded(f"this API key may have {key.max_requests} requests open at once")

    def model_name(self, asked: str | None) -> str:
        """The name that an answer carries. Raises HttpError for a model that is not served."""
        if asked is None:
            return self.text.names[0]
        if asked in self.text.names:
            return asked
        if ".." in asked.replace("\\", "/").split("/") or not asked.isprintable():
            raise bad_request("the name of the model is malformed; accepted: one that is served", "model")
        served = ", ".join(self.text.names)
        message = f"the model {asked[:128]!r} is not served; accepted: {served}"
        raise HttpError(404, message, "model_not_found", "model")

    # ----------------------------------------------------------------------------------------- text

    async def in_thread(self, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Run what looks at hostile text where it cannot block the loop."""
        loop = asyncio.get_running_loop()
        if self._text_jobs >= self.config.max_text_jobs:
            raise overloaded("too many texts are waiting to be tokenized")
        self._text_jobs += 1
        try:
            return await loop.run_in_executor(self.threads, partial(call, *arguments, **options))
        finally:
            self._text_jobs -= 1

    def log_prompt(self, request_id: str, prompt: object) -> None:
        """Only on a server that was asked to."""
        if self.config.log_prompts:
            logs.event("prompt", id=request_id, prompt=json.dumps(prompt, ensure_ascii=False))

    # ------------------------------------------------------------------------------------- requests

    def admit(self, key: ApiKey | None, body: Queued, sequences: int, name: str = "") -> Ticket:
        """A place for a request of so many sequences, called `name` in logs. Raises HttpError 429 and 503."""
        self.check_ready(key)
        ticket = Ticket(self, key, body, sequences, name)
        service_class, most_s = ticket.sender.service_class, ticket.max_wait_s
        wait_s = self.forecast.wait_s(service_class)
        if wait_s is not None and wait_s > most_s:
            may = f"a request may wait {most_s:g} s to begin"
            raise self._overloaded(may, service_class, wait_s - most_s)
        self._tickets[ticket] = None
        self.open_sequences += sequences
        if key is not None:
            self._of_key[key.name] += 1
        return ticket

    @property
    def open_requests(self) -> int:
        return len(self._tickets)

    def waiting_tokens(self, whose: Ticket | None = None) -> int:
        """Prompt tokens of the requests that wait for a seat: the engine takes them in their order. For who
        has a seat there are none."""
        pulse = self.client.pulse
        seats = pulse.running if pulse is not None and pulse.waiting else self.card.max_num_seqs
        waiting = 0
        for ticket in self._tickets:
            if seats > 0:
                if ticket is whose:
                    return 0
                seats -= ticket.sequences
            elif not ticket.begun:
                waiting += ticket.tokens
        return waiting

    def _overloaded(
        self, message: str, service_class: ServiceClass, excess_s: float | None = None
    ) -> HttpError:
        """A refusal that says what the wait would have been, and when to come back."""
        wait_s = self.forecast.wait_s(service_class)
        if wait_s is None:
            return overloaded(message)
        after_s = wait_s if excess_s is None else excess_s
        return overloaded(f"{message} and the wait would be about {wait_s:.3g} s", after_s)

    def release(self, ticket: Ticket, key: ApiKey | None) -> None:
        del self._tickets[ticket]
        self.open_sequences -= ticket.sequences
        if key is not None:
            self._of_key[key.name] -= 1
            if not self._of_key[key.name]:
                del self._of_key[key.name]

    def check_tokens(self, tokens: Sequence[int], param: str) -> None:
        """Refuse a prompt that this model cannot take."""
        card = self.card
        if len(tokens) >= card.max_model_len:
            raise bad_request(
                # LiteLLM knows an overflow by the first words, LangChain by "prompt is too long".
                f"This model's maximum context length is {card.max_model_len} tokens and the prompt is too "
                f"long: {len(tokens)} tokens; accepted: at most {card.max_model_len - 1}",
                param,
                "context_length_exceeded",
            )
        for token in tokens:
            if not 0 <= token < card.vocabulary_size:
                accepted = f"0 to {card.vocabulary_size - 1}"
                raise bad_request(f"prompt token is {token}; accepted: {accepted}", param)


def _started_pool(size: int) -> ThreadPoolExecutor:
    """All of its threads are there from the beginning: a server under load holds what an idle one does."""
    pool = ThreadPoolExecutor(size, thread_name_prefix="ridgeline-text")
    all_there = threading.Barrier(size)
    for _ in range(size):
        pool.submit(all_there.wait)
    return pool


def overloaded(message: str, after_s: float = 1.0) -> HttpError:
    """429, to be tried again so much later."""
    after = {"retry-after": str(min(max(math.ceil(after_s), 1), 3600))}
    return HttpError(429, f"{message}; try again later", "rate_limit_exceeded", headers=after)


_CLASSES: dict[str, ServiceClass] = {
    "default": "interactive",
    "scale": "interactive",
    "flex": "batch",
    "priority": "keystroke",
}
_TIERS: dict[ServiceClass, str] = {"keystroke": "priority", "interactive": "default", "batch": "flex"}


def class_of(key: ApiKey | None, tier: str | None) -> ServiceClass:
    """The service class of a request that asks for a tier, or for none: at most that of its key."""
    most = None if key is None else key.service_class
    if tier is None or tier == "auto":
        return most or "interactive"
    wanted = next((each for each in SERVICE_CLASSES if each == tier), None) or _CLASSES[tier]
    return wanted if most is None else max(most, wanted, key=SERVICE_CLASSES.index)


def tier_of(service_class: ServiceClass, tier: str | None) -> str | None:
    """What a request is told of its class, if it has asked for one: OpenAI's name, which its clients know."""
    return None if tier is None else _TIERS[service_class]


class Ticket:
    """One admitted request: its place in the queue and what it has begun. Closing it ends all of that."""

    def __init__(self, service: Service, key: ApiKey | None, body: Queued, sequences: int, name: str) -> None:
        self.name = name
        service_class = class_of(key, body.service_tier)
        self.tier = tier_of(service_class, body.service_tier)
        # No key's requests ever share what another's have computed, whatever salt of their own they send.
        salt = f"{'' if key is None else key.digest.hex()}:{body.cache_salt or ''}"
        self.sender = Sender(salt, "" if key is None else key.name, service_class)
        longest_s = service.config.queue_timeout_s
        self.max_wait_s = longest_s if body.max_wait_s is None else min(body.max_wait_s, longest_s)
        self.sequences = sequences
        self.tokens = 0
        self.begun = False  # something of an answer has come
        self.arrived_s = time.monotonic()
        self._service = service
        self._key = key
        self._streams: list[EngineStream] = []
        self._closed = False

    @property
    def deadline_s(self) -> float:
        """When a request that is begun now is dropped if it still waits, on `time.monotonic`'s clock."""
        return time.monotonic() + self.max_wait_s

    def submit(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | BeamSearchParams, stream: bool
    ) -> None:
        """Begin the prompts. Raises HttpError 429 when too many tokens wait, and EngineDeadError."""
        service = self._service
        waiting = service.waiting_tokens(self)
        self.tokens = sum(map(len, prompts))
        # Where nobody waits, a request is taken however long it is.
        if waiting and waiting + self.tokens > service.config.max_queue_tokens:
            message = f"{waiting} prompt tokens are waiting already"
            raise service._overloaded(message, self.sender.service_class)
        deadline_s = self.deadline_s
        for prompt in prompts:
            begun = service.client.submit(
                prompt, params, stream, deadline_s, self.arrived_s, self.name, self.sender
            )
            self._streams.append(begun)

    async def pieces(self) -> AsyncIterator[tuple[int, list[Piece]]]:
        """What the prompts' answers gain, with the prompt's index. Raises what EngineStream raises."""
        if len(self._streams) == 1:
            async with aclosing(self._streams[0].__aiter__()) as arriving:  # type: ignore[type-var]
                async for pieces in arriving:
                    self.begun = True
                    yield 0, pieces
            return
        queue: asyncio.Queue[tuple[int, list[Piece]] | BaseException | None] = asyncio.Queue(_READ_AHEAD)
        tasks = [asyncio.create_task(self._pump(index, queue)) for index in range(len(self._streams))]
        try:
            ended = 0
            while ended < len(tasks):
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    ended += 1
                    continue
                self.begun = True
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(
        self, index: int, queue: asyncio.Queue[tuple[int, list[Piece]] | BaseException | None]
    ) -> None:
        try:
            async for pieces in self._streams[index]:
                await queue.put((index, pieces))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    def close(self) -> None:
        """Abort what has not ended and give the place back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for stream in self._streams:
            stream.abort()
        self._service.release(self, self._key)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away. Raises ClientGoneError then."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
