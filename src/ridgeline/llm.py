"""`LLM`, the Python API for scripts: batches, conversations, streams."""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import threading
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

import numpy as np

from ridgeline.config import EngineConfig
from ridgeline.loading import LoadedFace, Message, Prompt, Sender, embedding_of, load_engine, text_of
from ridgeline.types import (
    EngineDeadError,
    Float32Array,
    Pooling,
    PoolingParams,
    Request,
    RequestError,
    RequestOutput,
    SamplingParams,
    ServiceClass,
)


class LLM(LoadedFace):
    """A model that is loaded and ready. Safe to use from several threads; a context manager, or `close` it.

    `options` are the fields of EngineConfig. Raises ConfigError, CheckpointError or CapacityError.
    """

    def __init__(self, model: str = "smollm2", **options: Any) -> None:
        self._loaded = load_engine(EngineConfig.from_options({"model": model, **options}))
        self._lock = threading.RLock()
        self._ids = itertools.count()
        self._latest: dict[str, RequestOutput | None] = {}
        self._left: deque[str] = deque()  # requests that nobody waits for any more
        self._stepping = False
        self._closed = False
        _open.add(self)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        cache_salt: str = "",
        service_class: ServiceClass = "interactive",
        tenant: str = "",
    ) -> list[RequestOutput]:
        """Continue one prompt, or many as one batch; results in input order.

        A prompt is a text or a list of token ids. `params` is for all prompts, or one for each. What was
        computed is shared with calls of the same `cache_salt` only. Where several threads call, a higher
        `service_class` ("keystroke", "interactive", "batch") goes first, and inside one, tokens are shared
        fairly between tenants. Raises RequestError when one of the prompts cannot be served, before any is
        started.
        """
        several = _prompts(prompts)
        sender = Sender(cache_salt, service_class, tenant)
        return self._run_prompts(several, self._params_for(params, len(several)), sender)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling: Pooling = "mean",
        normalise: bool = True,
        cache_salt: str = "",
        service_class: ServiceClass = "interactive",
        tenant: str = "",
    ) -> Float32Array:
        """A vector for one prompt, or for each of many: float32 (prompts, hidden size).

        It is the mean of the final hidden states of the prompt's tokens, or those of the last token, divided
        by its length where `normalise`. Raises RequestError when a prompt cannot be served, and CapacityError
        when there is no memory for the buffers that the first call takes.
        """
        several = _prompts(prompts)
        sender = Sender(cache_salt, service_class, tenant)
        outputs = self._run_prompts(several, [PoolingParams(pooling, normalise)] * len(several), sender)
        vectors = [embedding_of(output) for output in outputs]
        return np.array(vectors, np.float32).reshape(len(vectors), len(vectors[0]) if vectors else 0)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        cache_salt: str = "",
        service_class: ServiceClass = "interactive",
        tenant: str = "",
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or many as one batch. A message is `{"role": ..., "content": ...}`.

        `template` is for the chat template: `tools`, `documents`, `add_generation_prompt`,
        `continue_final_message`, and whatever else this model's takes, such as `enable_thinking`.
        """
        tokens = [self._loaded.chat_tokens(chat, **template) for chat in _chats(messages)]
        sender = Sender(cache_salt, service_class, tenant)
        return self._run([None] * len(tokens), tokens, self._params_for(params, len(tokens)), sender)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        cache_salt: str = "",
        service_class: ServiceClass = "interactive",
        tenant: str = "",
    ) -> Generator[RequestOutput, None, None]:
        """Continue one prompt, yielding its state each time it has grown; the last one is `finished`.

        Closing the generator early aborts the request.
        """
        sender = Sender(cache_salt, service_class, tenant)
        yield from self._stream(text_of(prompt), self._loaded.tokens_of(prompt), params, sender)

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        cache_salt: str = "",
        service_class: ServiceClass = "interactive",
        tenant: str = "",
        **template: Any,
    ) -> Generator[RequestOutput, None, None]:
        """Answer one conversation, as `stream` does; `template` as in `chat`."""
        sender = Sender(cache_salt, service_class, tenant)
        yield from self._stream(None, self._loaded.chat_tokens(messages, **template), params, sender)

    def close(self) -> None:
        """Free the model. Idempotent; requests under way are aborted."""
        with self._turn():
            if not self._closed:
                self._closed = True
                self._loaded.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run_prompts(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams | PoolingParams], sender: Sender
    ) -> list[RequestOutput]:
        tokens = [self._loaded.tokens_of(prompt) for prompt in prompts]
        return self._run([text_of(prompt) for prompt in prompts], tokens, params, sender)

    def _run(
        self,
        texts: Sequence[str | None],
        tokens: Sequence[tuple[int, ...]],
        params: Sequence[SamplingParams | PoolingParams],
        sender: Sender,
    ) -> list[RequestOutput]:
        with self._requests(texts, tokens, params, sender, stream=False) as ids:
            results: list[RequestOutput] = []
            while len(results) < len(ids):
                with self._turn():
                    result = self._latest[ids[len(results)]]  # reported once, when it has finished
                    if result is None:
                        self._step()
                    else:
                        results.append(result)
            return results

    def _stream(
        self, text: str | None, tokens: tuple[int, ...], params: SamplingParams | None, sender: Sender
    ) -> Generator[RequestOutput, None, None]:
        each = self._params_for(params, 1)
        with self._requests([text], [tokens], each, sender, stream=True) as (request_id,):
            finished = False
            while not finished:
                with self._turn():
                    output = self._latest[request_id]
                    if output is None:
                        self._step()
                        continue
                    self._latest[request_id] = None
                finished = output.finished
                yield output

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Nobody else touches the engine in the block, and Ctrl-C waits for its end."""
        with self._lock, _uninterrupted():
            yield

    def _step(self) -> None:
        """One step for everybody: other threads' requests and open streams advance as well."""
        self._check_open()
        self._stepping = True
        try:
            for output in self._loaded.engine.step():
                self._latest[output.request_id] = output
        finally:
            self._stepping = False
        self._drop_left()

    def _drop_left(self) -> None:
        # A stream may be closed by the garbage collector in the midst of a step of this very thread.
        while self._left and not self._stepping:
            request_id = self._left.popleft()
            self._loaded.engine.abort(request_id)
            self._latest.pop(request_id, None)

    @contextmanager
    def _requests(
        self,
        texts: Sequence[str | None],
        tokens: Sequence[tuple[int, ...]],
        params: Sequence[SamplingParams | PoolingParams],
        sender: Sender,
        stream: bool,
    ) -> Iterator[list[str]]:
        """Requests that live as long as the block; what is unfinished at its end is aborted."""
        ids = [f"{next(self._ids)}" for _ in tokens]
        engine = self._loaded.engine
        for each in params:
            engine.prepare(each)  # while others' steps go on
        try:
            with self._turn():
                self._check_open()
                for request_id, text, prompt, each in zip(ids, texts, tokens, params, strict=True):
                    engine.add(Request(request_id, prompt, each, *sender), text, stream)
                    self._latest[request_id] = None
            yield ids
        finally:
            self._left.extend(ids)
            if not self._closed:  # when Python ends, a thread that is no more may hold the lock
                with self._turn():
                    self._drop_left()

    def _params_for(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or self.sampling_defaults] * count
        if len(params) != count:
            raise RequestError(
                f"{len(params)} sampling parameters for {count} prompts; accepted: 1 or {count}"
            )
        return list(params)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineDeadError("model is closed; accepted: requests before close()")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put off an interrupt to the end of the block. Only the main thread is ever interrupted."""
    before = signal.getsignal(signal.SIGINT)
    # None: a handler that Python cannot put back.
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts: list[int] = []

    def put_off(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)

    signal.signal(signal.SIGINT, put_off)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupts:
            signal.raise_signal(signal.SIGINT)


def _prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as many. A list that begins with a number is one prompt of token ids."""
    if isinstance(prompts, str):
        return [prompts]
    given = _listed("prompts", prompts)
    one = [token for token in given if isinstance(token, int)]
    several = [prompt for prompt in given if not isinstance(prompt, int)]
    if one and several:
        raise RequestError("prompts mix token ids with prompts; accepted: texts, or lists of token ids")
    return [one] if one else [p if isinstance(p, str) else _listed("prompt", p) for p in several]


def _chats(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[Sequence[Message]]:
    """One conversation or many, as many."""
    given = _listed("messages", messages)
    one = [message for message in given if isinstance(message, Mapping)]
    several = [chat for chat in given if not isinstance(chat, Mapping)]
    if one and several:
        raise RequestError("messages mix messages with conversations; accepted: a list of either")
    return [one] if one else several


def _listed(name: str, given: Any) -> list[Any]:
    """What must be a list, before anything is made of what is not: a generator, a dict, bytes."""
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise RequestError(f"{name} came as {type(given).__name__}; accepted: a list")
    return list(given)


_open: weakref.WeakSet[LLM] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open.clear)  # a child has none of their threads


@atexit.register
def _close_open() -> None:
    """Python ends daemon threads where they stand; one that stands in a step takes the process along."""
    for llm in list(_open):
        llm.close()
