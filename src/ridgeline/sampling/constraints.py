"""Answers of a given form: which tokens may come next, by llguidance.

A grammar is compiled once, against the vocabulary's bytes, and then shared: every sequence has a matcher of
its own over the automaton that all of them build as they go. Masks are computed in a thread while the model's
pass runs, since the library works without Python's lock; a sampler that comes for one too early waits.

Compiling, memory and each mask are bounded by the library's counters, so that an expression that explodes is
an error of its own request. What has become of the lexer's automaton the library does not tell; the cache
reckons it by the time that masks took, which is what making its states costs.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ridgeline.sampling.grammars import grammar_of, unusable
from ridgeline.sampling.words import Words
from ridgeline.types import Int32Array, RequestError, StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CACHE_BYTES = 128 << 20
_ENTRY_BYTES, _BYTES_PER_CHARACTER = 64 << 10, 64
_GROWTH_BYTES_PER_S = 64 << 20
"""Measured with the expression that makes the most states of those that were tried: 50 KB per ms of masks."""
_MAX_STATES = 2**14
_STATE_BYTES = 1024
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 300_000,
    "max_grammar_size": 150_000,
    "max_lexer_states": _MAX_STATES,
    "step_lexer_fuel": 100_000,
    "verbose_errors": False,
}


class _Vocabulary:
    """A tokenizer in the form in which llguidance takes it. Special tokens are known by their ids: no text of
    a grammar is ever one of them."""

    is_tokenizer_wrapper = True

    def __init__(self, words: Words, size: int, end: int) -> None:
        self.eos_token_id = end
        self.bos_token_id = words.bos_id
        known = min(words.vocab_size, size)
        self.tokens = [words.token_bytes(index) for index in range(known)] + [b""] * (size - known)
        nameless = {index for index, token in enumerate(self.tokens) if not token}
        for index in nameless:  # every token needs bytes of its own
            self.tokens[index] = b"<|unused %d|>" % index
        self.special_token_ids = sorted(nameless.union(i for i in words.special_ids if i < size))
        self._encode = words.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


class _Grammar:
    """A compiled form, as the cache holds it."""

    __slots__ = ("mask_s", "matcher", "static_bytes")

    def __init__(self, matcher: LLMatcher, characters: int) -> None:
        self.matcher = matcher
        self.static_bytes = _ENTRY_BYTES + _BYTES_PER_CHARACTER * characters
        self.mask_s = 0.0  # time that all its masks took

    @property
    def nbytes(self) -> int:
        """An estimate, rather too high."""
        grown = min(int(self.mask_s * _GROWTH_BYTES_PER_S), _MAX_STATES * _STATE_BYTES)
        return self.static_bytes + grown


class Constraints:
    """Compiles forms for one vocabulary and keeps them, up to `capacity_bytes`; those that running answers
    use are not counted twice. Safe to share between threads, and what one request asked for changes no
    other's mask.

    `end_ids` are the tokens by which an answer may end, `size` is the width of a row of logits.
    """

    def __init__(
        self, words: Words, size: int, end_ids: Collection[int], capacity_bytes: int = CACHE_BYTES
    ) -> None:
        self.words = words
        self._size = size
        self._ends = tuple(sorted(end_ids))
        self._capacity_bytes = capacity_bytes
        self._grammars: OrderedDict[StructuredOutputsParams, _Grammar] = OrderedDict()
        self._lock = threading.Lock()  # guards _grammars and _thread
        self._making = threading.Lock()  # guards _tokenizer, which is slow to make
        self._tokenizer: LLTokenizer | None = None
        self._thread: _MaskThread | None = None

    @property
    def nbytes(self) -> int:
        """What the cache is reckoned to hold."""
        with self._lock:
            return sum(grammar.nbytes for grammar in self._grammars.values())

    def __len__(self) -> int:
        return len(self._grammars)

    def has(self, form: StructuredOutputsParams) -> bool:
        """Whether the form needs no compiling any more."""
        with self._lock:
            return _key(form) in self._grammars

    def prepare(self, form: StructuredOutputsParams) -> None:
        """Compile a form for a `start` that follows. Raises RequestError when that cannot be done, or nothing
        has this form; takes a second at the very most."""
        self._compiled(form)

    def start(self, form: StructuredOutputsParams, count: int) -> list[Constraint]:
        """One constraint for each of a request's answers. Raises as `prepare` does."""
        grammar = self._compiled(form)
        with self._lock:
            if self._thread is None:
                self._thread = _MaskThread()
            thread = self._thread
        made = []
        for _ in range(count):
            made.append(Constraint(grammar, form, self._size, self._ends, thread))
        return made

    def flush(self) -> None:
        """Begin with the masks that will be wanted next, which takes none of this thread's time."""
        thread = self._thread
        if thread is not None:
            thread.flush()

    def close(self) -> None:
        """End the thread: Python cannot end one that is inside the library."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._grammars.clear()
        if thread is not None:
            thread.close()

    def _compiled(self, form: StructuredOutputsParams) -> _Grammar:
        key = _key(form)
        with self._lock:
            found = self._grammars.get(key)
            if found is not None:
                self._keep(key, found)
                return found
        made = self._compile(key)
        with self._lock:
            self._keep(key, made)
        return made

    def _keep(self, key: StructuredOutputsParams, grammar: _Grammar) -> None:
        """Make the grammar the one that was used last, and forget others while they are too large together:
        they may have grown."""
        self._grammars[key] = grammar
        self._grammars.move_to_end(key)
        total = sum(each.nbytes for each in self._grammars.values())
        while total > self._capacity_bytes and len(self._grammars) > 1:
            _, dropped = self._grammars.popitem(last=False)
            total -= dropped.nbytes

    def _compile(self, form: StructuredOutputsParams) -> _Grammar:
        from llguidance import LLMatcher, LLParserLimits

        if not self._ends:
            raise RequestError(
                "structured_outputs cannot be used: this model has no token that ends an answer"
            )
        grammar = grammar_of(form)
        with self._making:
            tokenizer = self._tokenizer = self._tokenizer or self._make_tokenizer()
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
        if matcher.is_error():
            raise unusable(matcher.get_error())
        compiled = _Grammar(matcher, len(grammar))
        # Much of the work is only done for the first mask.
        if not _compute_mask(matcher.deep_copy(), _new_mask(self._size)):
            raise unusable("nothing has this form, or finding out takes too much")
        return compiled

    def _make_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        if not self.words.is_bytewise:
            raise RequestError(
                "structured_outputs cannot be used: this model's tokens do not stand for bytes one by one"
            )
        vocabulary: Any = _Vocabulary(self.words, self._size, self._ends[0])
        return LLTokenizer(vocabulary, eos_token=list(self._ends))


def _key(form: StructuredOutputsParams) -> StructuredOutputsParams:
    return form if form.thinking is None else replace(form, thinking=None)


def _compute_mask(matcher: LLMatcher, mask: Int32Array) -> bool:
    """Fill a mask, a bit for each token that may come next. False where there is no way on, or finding it
    takes too much."""
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    return bool(mask.any()) and not matcher.is_error()


def _new_mask(size: int) -> Int32Array:
    return np.zeros(-(-size // 32), np.int32)


class DeadEndError(Exception):
    """No token can go on with an answer of the form that was asked for."""


class Constraint:
    """What one sequence may say next. It belongs to the sequence's chooser; only `step` runs in the thread of
    masks, and never while another call touches the matcher.
    """

    __slots__ = ("_ends", "_failure", "_forced", "_form", "_grammar", "_mask", "_matcher", "_ready",
                 "_thinking", "_thread", "_token", "_tokens", "ended", "handed")  # fmt: skip

    def __init__(
        self,
        grammar: _Grammar,
        form: StructuredOutputsParams,
        size: int,
        ends: Sequence[int],
        thread: _MaskThread,
    ) -> None:
        self.ended = False
        self._grammar = grammar
        self._matcher = grammar.matcher.deep_copy()
        self._form = form
        self._mask = _new_mask(size)
        self._ends = tuple(ends)
        self._thread = thread
        self._thinking = form.thinking is not None and form.thinking.open
        self._tokens = 0
        self._token: int | None = None  # to be taken in
        self._forced: Sequence[int] | None = None  # the tokens that must come next, once somebody has asked
        self.handed = False  # whether the thread has it, or has had it since the last token
        self._failure: str | None = None  # why nothing may come next
        self._ready = threading.Event()
        thread.add(self)

    def append(self, token: int) -> None:
        """Take in the token that the sequence has taken on; its mask is computed in the background."""
        first, self._tokens = self._tokens == 0, self._tokens + 1
        thinking = self._form.thinking
        if self._thinking:
            assert thinking is not None
            self._thinking = token != thinking.end
            return
        if first and thinking is not None and token == thinking.start:
            self._thinking = True
            return
        self.ended = self.ended or token in self._ends
        if self.ended:
            return
        self._wait()
        self._ready.clear()
        self._token, self._forced, self.handed = token, None, False
        self._thread.add(self)

    def _wait(self) -> None:
        if not self._ready.is_set():
            self._thread.flush()
            self._ready.wait()

    def _take_in(self) -> bool:
        """Advance by the token that came last; False where it leads nowhere."""
        token, self._token = self._token, None
        return token is None or self._matcher.consume_token(token)

    def step(self) -> None:
        """Advance by the token that came last, and find those that may follow."""
        began_s = time.thread_time()
        try:
            found = self._take_in() and _compute_mask(self._matcher, self._mask)
            self._failure = None if found else self._matcher.get_error()
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"
        self._grammar.mask_s += time.thread_time() - began_s
        self._ready.set()

    def forced(self) -> Sequence[int]:
        """The tokens that come next because no other may. Finding them takes some microseconds, a mask many
        more: they are found here, and not while the thread is at it."""
        if self._forced is not None:
            return self._forced
        if self._thinking or self.ended or self.handed or self._awaits_thinking:
            return ()
        try:
            self._forced = () if not self._take_in() else self._matcher.compute_ff_tokens()
        except Exception as error:
            self._forced, self._failure = (), f"{type(error).__name__}: {error}"
        return self._forced

    def mask(self) -> Int32Array:
        """A bit for each token that may follow, int32 (vocabulary / 32, rounded up), the lowest bit first;
        valid until the next `append`. Raises DeadEndError where none may."""
        if self._thinking:  # the answer itself is still to come
            mask = np.full_like(self._mask, -1)
            for end in self._ends:
                mask[end // 32] &= ~_bit(end)
            return mask
        self._wait()
        if self._failure is not None:
            cause = " ".join(self._failure.removesuffix("<non-verbose/>").split())
            raise DeadEndError(f"the answer cannot go on in the form that was asked for ({cause})")
        if not self._awaits_thinking:
            return self._mask
        assert self._form.thinking is not None
        mask, start = self._mask.copy(), self._form.thinking.start
        mask[start // 32] |= _bit(start)
        return mask

    @property
    def _awaits_thinking(self) -> bool:
        """Whether the answer may still begin with thinking."""
        return self._form.thinking is not None and self._tokens == 0


def _bit(token: int) -> int:
    """The token's bit in its word, as an int32."""
    bit = 1 << token % 32
    return bit - 2**32 if bit == 2**31 else bit


class _MaskThread:
    """One thread that steps constraints in the order in which they come. They are handed over together:
    waking it for each of them would cost more than their masks do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _gathered
        self._gathered: list[Constraint] = []
        self._queue: queue.SimpleQueue[list[Constraint] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ridgeline-masks", daemon=True)
        self._thread.start()

    def add(self, constraint: Constraint) -> None:
        """Have the constraint stepped, after the next `flush`."""
        with self._lock:
            self._gathered.append(constraint)

    def flush(self) -> None:
        with self._lock:
            gathered, self._gathered = self._gathered, []
        if gathered:
            for constraint in gathered:
                constraint.handed = True
            self._queue.put(gathered)

    def _run(self) -> None:
        while (constraints := self._queue.get()) is not None:
            for constraint in constraints:
                constraint.step()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
