"""What the rooms hand to each other: requests, steps, results, work, errors.

Plain frozen records without behaviour beyond their own consistency. Nothing here reads a file, parses
an argument or computes with arrays. What every step makes many of is a Struct, a tenth as dear to make as a
dataclass; those that can be part of no cycle are kept from the garbage collector.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
Int32Array = NDArray[np.int32]
ByteArray = NDArray[np.uint8]


class RidgelineError(Exception):
    """Base of every error that a user can cause or meet; its message is one line for that user."""


class CheckpointError(RidgelineError):
    """A model file, tokenizer or template is missing, damaged or of a kind that we do not read."""


class ConfigError(RidgelineError):
    """A setting is unknown or out of its range."""


class RequestError(RidgelineError):
    """A request cannot be served as it was asked."""


class CapacityError(RidgelineError):
    """The machine has too little memory or disk for what was asked."""


class EngineDeadError(RidgelineError):
    """The engine has stopped and takes no more requests."""


# --------------------------------------------------------------------------------------------- work


class Work(msgspec.Struct, frozen=True, gc=False):
    """Arithmetic and memory traffic of some part of a step; records add up.

    A multiply-add counts as two operations. The arithmetic is split by the number format in which the
    hardware's peak differs.
    """

    int8_ops: int = 0
    bf16_flops: int = 0
    fp32_flops: int = 0
    read_bytes: int = 0
    written_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.int8_ops + other.int8_ops,
            self.bf16_flops + other.bf16_flops,
            self.fp32_flops + other.fp32_flops,
            self.read_bytes + other.read_bytes,
            self.written_bytes + other.written_bytes,
        )

    def __sub__(self, other: Work) -> Work:
        return Work(*map(operator.sub, self.numbers, other.numbers))

    @classmethod
    def total(cls, works: Iterable[Work], counts: Sequence[int] | None = None) -> Work:
        """The sum of `works`, each taken as often as its entry in `counts` says, or once."""
        columns = zip(*(work.numbers for work in works), strict=True)
        if counts is None:
            return cls(*map(sum, columns))
        return cls(*(sum(map(operator.mul, column, counts)) for column in columns))

    @property
    def numbers(self) -> tuple[int, ...]:
        """The fields in their order."""
        return (self.int8_ops, self.bf16_flops, self.fp32_flops, self.read_bytes, self.written_bytes)

    @property
    def ops(self) -> int:
        """All arithmetic, whatever its format."""
        return self.int8_ops + self.bf16_flops + self.fp32_flops

    @property
    def bytes(self) -> int:
        """All memory traffic."""
        return self.read_bytes + self.written_bytes


class StepWork(msgspec.Struct, frozen=True, gc=False):
    """The work of a whole step, by what its time depends on.

    `attention` is that of the launches that attend to sequence memory, `dense` that of all others. Of their
    bytes, `weight_bytes` are weights that are read, and `kv_bytes` keys and values that are read or written.
    `launches` counts the kernel calls.
    """

    dense: Work
    attention: Work
    rows: int
    outputs: int
    sequences: int
    launches: int
    weight_bytes: int = 0
    kv_bytes: int = 0

    @property
    def total(self) -> Work:
        return self.dense + self.attention


# --------------------------------------------------------------------------------------------- step


class Segment(msgspec.Struct, frozen=True, gc=False):
    """A run of KV slots that a sequence's rows attend to.

    `tables[g]` lists the page ids of memory group g, in slot order; all groups' tables have the same
    length, and a page that a window group has already given back keeps its entry, which is never read.
    Slot s holds the token at rotary position `first_position + s`. `bias` is added to the attention
    scores of the whole segment. In a causal segment a row sees the slots up to its own position.
    """

    tables: tuple[Sequence[int], ...]
    length: int  # slots that hold tokens once this step's rows are written
    first_position: int = 0
    bias: float = 0.0
    causal: bool = True


def drawn_token(output: int) -> int:
    """Stands in a step for a token that is not known yet: the one drawn for that output of the step that
    was launched before."""
    return -1 - output


class SequenceRows(msgspec.Struct, frozen=True, gc=False):
    """The rows of one sequence in a step: tokens to run from slot `start` of its last segment.

    A token is an id of the vocabulary, or a `drawn_token` of the step before. Row i is written to slot
    `start + i` and stands at rotary position `first_position + start + i` of the last segment. `outputs`
    names the rows (ascending, counted from 0) whose logits, or a token drawn from them, are wanted; of a
    program that ends in hidden states, the rows whose hidden states are.

    Where the rows are a tree of guesses, `parents` names for each the row before it that it follows, -1 the
    slots before `start`. Such a row stands one position behind its parent, wherever its slot is, and sees of
    the step's rows those of its path alone, each as if it lay where it stands: so the bits do not depend on
    the tree. No parents are those of a chain.

    `state` names two slots of recurrent state, for programs that have any: the rows go on from what is in the
    first, or from zero where it is `NO_STATE`, and leave what is behind the last row in the second. They may
    be one slot; no other sequence of the step reads or writes one that is written.
    """

    tokens: Sequence[int]
    start: int
    segments: tuple[Segment, ...]
    outputs: Sequence[int]
    parents: Sequence[int] = ()
    state: tuple[int, int] | None = None

    @property
    def depths(self) -> Sequence[int]:
        """How far behind slot `start` each row stands. Raises ValueError for parents that make no tree, or
        that are given where rows also see what follows them."""
        rows = len(self.tokens)
        if not self.parents:
            return range(rows)
        if len(self.parents) != rows:
            raise ValueError(f"parents are {len(self.parents)}; accepted: {rows}, one of each row")
        if not self.segments[-1].causal:
            raise ValueError("parents are given in a segment that is not causal; accepted: a causal one")
        depths: list[int] = []
        for row, parent in enumerate(self.parents):
            if not -1 <= parent < row:
                raise ValueError(f"parents[{row}] is {parent}; accepted: -1 to {row - 1}")
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return depths


NO_STATE = -1
"""In place of the slot that a sequence's recurrent state is read from: it begins at zero."""


class Draw(msgspec.Struct, frozen=True, gc=False):
    """How the executor draws a token from a row of logits (`execution.draw` has the rule).

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch the filter off. The noise is keyed
    by `seed` (0 to 2⁶⁴−1), `choice` and `position`, that of the drawn token; a greedy draw has none, and need
    not say where it is.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    choice: int = 0
    position: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of a program: rows grouped by sequence. There is no prefill phase and no decode phase.

    `draws` says for each output, in order, how its token is drawn on the device, or None where the host
    wants its logits; no draws at all are None for every output.
    """

    sequences: tuple[SequenceRows, ...]
    draws: tuple[Draw | None, ...] = ()

    @property
    def rows(self) -> int:
        return sum([len(s.tokens) for s in self.sequences])

    @property
    def outputs(self) -> int:
        return sum([len(s.outputs) for s in self.sequences])


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave, in the order of its outputs.

    `logits` is float32 (outputs without a draw, vocabulary) and belongs to the executor: it is valid until
    the second `run` after the step's own. A program that ends in hidden states gives those in its place,
    (outputs, hidden). `tokens` is int32 (outputs,): the token drawn, −1 where the step has no draw for the
    output or where its logits have no largest finite value.
    """

    logits: Float32Array
    tokens: Int32Array
    elapsed_s: float
    work: StepWork


class StepFuture(Protocol):
    """A step that was launched and may still be running."""

    def result(self) -> StepResult: ...


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy all layers of one page of a memory group. Ids are the page pool's."""

    group: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class SlotCopy:
    """Copy all layers of single slots of a memory group, `sources[i]` to `targets[i]`, as if all were read
    before any is written. Slot s of page p is number `p * PAGE_TOKENS + s`."""

    group: int
    sources: Sequence[int]
    targets: Sequence[int]


class HostPage:
    """Room outside of an executor's pools for one page, in the executor's own layout.

    The executor `put`s the bytes when it launches the transfer; `take` gives them, uint8, to any thread, and
    waits until they are there.
    """

    __slots__ = ("_take",)

    def __init__(self) -> None:
        self._take: Callable[[], ByteArray] | None = None

    def put(self, take: Callable[[], ByteArray]) -> None:
        """A transfer that is made again, after an interrupt, finds other bytes: only the first counts."""
        if self._take is None:
            self._take = take

    def take(self) -> ByteArray:
        assert self._take is not None, "the page is taken before its transfer was launched"
        return self._take()


@dataclass(frozen=True, slots=True)
class PageSpill:
    """Copy all layers of one page out of an executor's pool."""

    group: int
    source: int
    target: HostPage


@dataclass(frozen=True, slots=True)
class PageFill:
    """Copy into a page the bytes that a spill gave, uint8 (page_bytes of the group,)."""

    group: int
    source: ByteArray
    target: int


Move = PageCopy | SlotCopy | PageSpill | PageFill
"""Where a program has recurrent state, its slots are the pages of one more group, behind the others."""


# ----------------------------------------------------------------------------------------- sampling

FinishReason = Literal["stop", "length", "abort", "error"]

_RANGES = (
    ("top_n_sigma", -1, 1000),
    ("xtc_probability", 0, 1),
    ("xtc_threshold", 0, 1),
    ("mirostat_tau", 0, 1000),
    ("mirostat_eta", 0, 1),
    ("dry_multiplier", 0, 1000),
    ("dry_base", 1, 1000),
)

MAX_FORM = 2**17
"""Characters of a schema, an expression, a grammar or a list of choices."""

DRAFTERS = ("auto", "grammar", "ngram", "suffix")
MAX_DRAFT_TOKENS = 64
"""Tokens of one sequence that are guessed at once."""


def _check(ok: bool, name: str, seen: object, accepted: str) -> None:
    if not ok:
        raise RequestError(f"{name} is {seen!r}; accepted: {accepted}")


def _is_int(value: object, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_real(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True, slots=True)
class Thinking:
    """Where a constrained answer may think first: text between two tokens, which nothing constrains. `open`:
    the prompt ends amid it, so that only `end` is awaited."""

    start: int
    end: int
    open: bool = False


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """The form that an answer must have, by exactly one of `json` (a JSON Schema, as text or as what JSON
    reads), `regex` (Rust's syntax, of the whole answer), `choice` (one of these texts), `grammar` (Lark in
    llguidance's dialect, or GBNF) and `json_object` (any JSON object). Names and meanings follow vLLM.

    `whitespace_pattern` is a regex for what may stand between JSON's tokens; `disable_any_whitespace` forbids
    all of it, `disable_additional_properties` the properties that a schema does not name.

    Raises RequestError when it is not one form, or too long; whether it makes sense is found when it is
    compiled.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool = False
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    thinking: Thinking | None = None

    def __post_init__(self) -> None:
        forms = ("json", "regex", "choice", "grammar", "json_object")
        given = [name for name in forms if getattr(self, name) not in (None, False)]
        accepted = f"one of {', '.join(forms)}"
        _check(len(given) == 1, "structured_outputs", " and ".join(given) or "empty", accepted)
        if isinstance(self.json, Mapping):
            try:
                object.__setattr__(self, "json", json.dumps(self.json, ensure_ascii=False))
            except (TypeError, ValueError, RecursionError) as error:
                raise RequestError(f"structured_outputs json is no JSON: {error}") from None
        if self.choice is not None:
            listed = isinstance(self.choice, Collection) and not isinstance(self.choice, str)
            texts = listed and all(isinstance(text, str) for text in self.choice)
            _check(
                texts and len(self.choice) > 0, "structured_outputs choice", self.choice, "a list of texts"
            )
            object.__setattr__(self, "choice", tuple(self.choice))
        for name in ("json", "regex", "grammar", "whitespace_pattern"):
            text = getattr(self, name)
            _check(text is None or isinstance(text, str), f"structured_outputs {name}", text, "a text")
        size = sum(map(len, (self.json or "", self.regex or "", self.grammar or "", *(self.choice or ()))))
        _check(size <= MAX_FORM, "structured_outputs length", size, f"up to {MAX_FORM} characters")


@dataclass(frozen=True, slots=True)
class SpeculationParams:
    """How tokens of an answer are guessed, to verify several in one pass; no token depends on it. `drafter`
    is how: "ngram" looks them up in the request, "suffix" also in its tenant's past outputs, "grammar" takes
    those that the form of the answer leaves alone, "auto" chooses.
    At most `max_tokens` are guessed at once; None leaves it to what is measured.

    Raises RequestError when a value is out of range.
    """

    drafter: str = "auto"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        known = ", ".join(DRAFTERS)
        _check(self.drafter in DRAFTERS, "speculation drafter", self.drafter, known)
        most = self.max_tokens
        ok = most is None or _is_int(most, 1, MAX_DRAFT_TOKENS)
        _check(ok, "speculation max_tokens", most, f"1 to {MAX_DRAFT_TOKENS}, or none")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose the tokens of a request. Names and meanings follow vLLM and the OpenAI API.

    `temperature` 0 is greedy. `top_k` 0 or -1, `top_p` 1, `min_p` 0 and the neutral penalties switch the
    processor off. `seed` None draws a fresh one. `max_tokens` None runs to the end of the context. `logprobs`
    k also returns the k most probable tokens at each position; `prompt_logprobs` k does the same for the
    prompt, and only with it may `max_tokens` be 0: the prompt is scored and nothing generated.
    `structured_outputs` constrains the form of the answer. With `best_of` so many answers are generated, and
    the n of the highest mean log-probability are given, at the end. `typical_p` 1, `top_n_sigma` ≤ 0,
    `xtc_probability` 0, `mirostat` 0 and `dry_multiplier` 0 are off; `sampling.processors` has the order.
    `speculation` False guesses no tokens; None is as the engine does, True as SpeculationParams() says.

    Raises RequestError when a value is out of range; whether token ids exist in the vocabulary is checked
    where the vocabulary is known.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    max_tokens: int | None = 256
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    best_of: int | None = None
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: Sequence[str] = ("\n", ":", '"', "*")
    bad_words: Sequence[str] = ()
    speculation: SpeculationParams | bool | None = None

    @property
    def is_best_of(self) -> bool:
        """Whether more is generated than is told."""
        return self.best_of is not None and self.best_of > self.n

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "bad_words", "dry_sequence_breakers"):
            given = getattr(self, name)
            _check(given is None or isinstance(given, Collection), name, given, "a list, or none")
            object.__setattr__(self, name, tuple(given or ()))
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        _check(_is_int(self.n, 1, 128), "n", self.n, "1 to 128")
        _check(_is_real(self.temperature, 0, 100), "temperature", self.temperature, "0 to 100")
        _check(_is_int(self.top_k, -1), "top_k", self.top_k, "-1, 0 (off) or a positive number")
        _check(_is_real(self.top_p, 0, 1) and self.top_p > 0, "top_p", self.top_p, "above 0, up to 1")
        _check(_is_real(self.min_p, 0, 1), "min_p", self.min_p, "0 to 1")
        penalty = self.repetition_penalty
        _check(_is_real(penalty, 0.01, 100), "repetition_penalty", penalty, "0.01 to 100")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(_is_real(getattr(self, name), -2, 2), name, getattr(self, name), "-2 to 2")
        _check(self.seed is None or _is_int(self.seed, -(2**63), 2**64 - 1), "seed", self.seed, "64 bits")
        self._check_lengths()
        for name, most in (("logprobs", 100), ("prompt_logprobs", 20)):
            wanted = getattr(self, name)
            _check(wanted is None or _is_int(wanted, 0, most), name, wanted, f"0 to {most} or none")
        form = self.structured_outputs
        given = form is None or isinstance(form, StructuredOutputsParams)
        _check(given, "structured_outputs", form, "StructuredOutputsParams, or none")
        self._check_lists()
        self._check_rarer()
        drafts = self.speculation
        given = drafts is None or isinstance(drafts, SpeculationParams | bool)
        _check(given, "speculation", drafts, "SpeculationParams, true, false or none")

    def _check_rarer(self) -> None:
        best = self.best_of
        _check(
            best is None or _is_int(best, self.n, 128),
            "best_of",
            best,
            f"{self.n}, which is n, to 128, or none",
        )
        _check(
            _is_real(self.typical_p, 0, 1) and self.typical_p > 0,
            "typical_p",
            self.typical_p,
            "above 0, up to 1",
        )
        _check(self.mirostat in (0, 2), "mirostat", self.mirostat, "0 (off) or 2")
        for name, low, high in _RANGES:
            _check(_is_real(getattr(self, name), low, high), name, getattr(self, name), f"{low} to {high}")
        for name, low in (("dry_allowed_length", 1), ("dry_penalty_last_n", -1)):
            _check(_is_int(getattr(self, name), low), name, getattr(self, name), f"{low} or more")
        for name in ("bad_words", "dry_sequence_breakers"):
            texts = getattr(self, name)
            _check(len(texts) <= 256, f"number of {name}", len(texts), "at most 256")
            for text in texts:
                ok = isinstance(text, str) and 0 < len(text) <= 256
                _check(ok, name, text, "texts of up to 256 characters")

    def _check_lengths(self) -> None:
        maximum = self.max_tokens
        scores = self.prompt_logprobs is not None
        accepted = "a positive number or none; 0 with prompt_logprobs"
        _check(maximum is None or _is_int(maximum, 0 if scores else 1), "max_tokens", maximum, accepted)
        _check(maximum != 0 or self.n == 1, "n", self.n, "1 with max_tokens 0")
        most = math.inf if maximum is None else maximum
        _check(_is_int(self.min_tokens, 0, most), "min_tokens", self.min_tokens, "0 to max_tokens")

    def _check_lists(self) -> None:
        for text in self.stop:
            _check(isinstance(text, str) and bool(text), "stop", text, "non-empty strings")
        _check(len(self.stop) <= 64, "number of stop strings", len(self.stop), "at most 64")
        for token in self.stop_token_ids:
            _check(_is_int(token, 0), "stop_token_ids", token, "token ids of the vocabulary")
        biases = self.logit_bias
        _check(biases is None or isinstance(biases, Mapping), "logit_bias", biases, "biases by token id")
        for token, bias in (biases or {}).items():
            _check(_is_int(token, 0), "logit_bias token", token, "token ids of the vocabulary")
            _check(_is_real(bias, -100, 100), "logit_bias", bias, "-100 to 100")


# ----------------------------------------------------------------------------- requests and results


Pooling = Literal["mean", "last"]
ServiceClass = Literal["keystroke", "interactive", "batch"]
SERVICE_CLASSES: tuple[ServiceClass, ...] = get_args(ServiceClass)
"""What requests are served before others for, the first before all: while somebody types, while somebody
waits for an answer, and whenever there is time."""


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """How to make one vector of a prompt: the mean of its tokens' final hidden states, or the last token's;
    divided by its length where `normalise`.

    Raises RequestError when a value is out of range.
    """

    pooling: Pooling = "mean"
    normalise: bool = True

    def __post_init__(self) -> None:
        _check(self.pooling in ("mean", "last"), "pooling", self.pooling, "mean, last")
        _check(isinstance(self.normalise, bool), "normalise", self.normalise, "true or false")


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt as token ids and how to continue it, or to pool it. What was computed of prompts and answers
    is shared only among requests of the same `cache_salt`. Requests of a higher `service_class` go first;
    inside one, tokens are shared fairly between tenants.

    Raises RequestError when there is no such class."""

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams | PoolingParams = field(default_factory=SamplingParams)
    cache_salt: str = ""
    service_class: ServiceClass = "interactive"
    tenant: str = ""

    def __post_init__(self) -> None:
        known = self.service_class in SERVICE_CLASSES
        _check(known, "service_class", self.service_class, ", ".join(SERVICE_CLASSES))


_MOST_PIECES = 32
"""Pieces of text that are put by before they are made one."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of the token that was chosen, and of the most probable ones, best first.

    They are those of the model's own distribution, before temperature, penalties and filters; of a
    constrained answer, of that over the tokens that its form permits. `rank` is 1 for the most probable
    token, and None where nobody counted.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


class Transcript:
    """All tokens of an answer so far and their text, to which one thread only ever adds: what there was at
    some moment is told by how much of it there was, without a copy, and may be read from any thread.

    The answer begins behind `prompt_length` of `token_ids`, which is the sequence's own list. `logprobs` has
    an entry for each token of the answer, where they are told.
    """

    __slots__ = (
        "_blocks", "_pieces", "_text", "_tokens", "characters", "logprobs", "prompt_length", "token_ids"
    )  # fmt: skip

    def __init__(
        self, token_ids: list[int], prompt_length: int, logprobs: list[TokenLogprobs] | None = None
    ) -> None:
        self.token_ids = token_ids
        self.prompt_length = prompt_length
        self.logprobs = logprobs
        self.characters = 0
        self._pieces: list[str] = []
        self._blocks = 0  # of the pieces, the first, which were made of many
        self._text = ""  # what was last asked for
        self._tokens: tuple[int, ...] = ()  # likewise

    def write(self, piece: str) -> None:
        """Add to the text."""
        pieces, blocks = self._pieces, self._blocks
        pieces.append(piece)
        self.characters += len(piece)
        if len(pieces) > blocks + _MOST_PIECES:
            pieces[blocks:] = ["".join(pieces[blocks:])]  # at one stroke, as others read
            self._blocks = blocks + 1

    def text(self, count: int) -> str:
        """The first characters."""
        text = self._text
        if len(text) != count:
            self._text = text = "".join(self._pieces)[:count]
        return text

    def text_since(self, begin: int) -> str:
        """The characters from the one at `begin` on, for the thread that writes."""
        pieces, at, left = self._pieces, len(self._pieces), self.characters - begin
        while left > 0:
            at -= 1
            left -= len(pieces[at])
        return "".join(pieces[at:])[-left:]

    def tokens(self, begin: int, end: int) -> tuple[int, ...]:
        """Tokens of the answer, counted from its first."""
        first = self.prompt_length
        return tuple(self.token_ids[first + begin : first + end])

    def first_tokens(self, count: int) -> tuple[int, ...]:
        """As `tokens`; asking for the same again is cheap."""
        tokens = self._tokens
        if len(tokens) != count:
            self._tokens = tokens = self.tokens(0, count)
        return tokens


class CompletionOutput(msgspec.Struct, frozen=True, gc=False, eq=False):
    """One of the n continuations of a request; `finish_reason` is None while it is still growing.

    `stop_reason` is the stop string or the stop token id that ended it, None for the model's own end token;
    beside "error" it says what went wrong. `text`, `token_ids` and `logprobs` are made when they are asked
    for, of the first `tokens` and `characters` of the transcript: most of what is told in a step nobody reads
    before there is more.
    """

    index: int
    transcript: Transcript
    tokens: int
    characters: int
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        return self.transcript.text(self.characters)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.transcript.first_tokens(self.tokens)

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        """Those of the tokens, where they were asked for."""
        scores = self.transcript.logprobs
        return None if scores is None else tuple(scores[: self.tokens])

    def since(
        self, characters: int, tokens: int
    ) -> tuple[str, tuple[int, ...], tuple[TokenLogprobs, ...] | None]:
        """Text, tokens and scores behind those, of the newest output, for the engine's thread: it takes no
        longer however much there is before."""
        transcript = self.transcript
        scores = transcript.logprobs
        return (
            transcript.text_since(characters),
            transcript.tokens(tokens, self.tokens),
            None if scores is None else tuple(scores[tokens : self.tokens]),
        )

    @property
    def _contents(self) -> tuple[Any, ...]:
        return self.index, self.text, self.token_ids, self.finish_reason, self.stop_reason, self.logprobs

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CompletionOutput) and self._contents == other._contents

    def __hash__(self) -> int:
        return hash(self._contents)

    def __repr__(self) -> str:
        names = "index", "text", "token_ids", "finish_reason", "stop_reason", "logprobs"
        fields = zip(names, self._contents, strict=True)
        return f"CompletionOutput({', '.join(f'{name}={value!r}' for name, value in fields)})"


class RequestMetrics(msgspec.Struct, frozen=True, gc=False):
    """Times on `time.perf_counter`'s clock, in seconds."""

    arrived_s: float
    first_token_s: float | None = None
    finished_s: float | None = None


class RequestOutput(msgspec.Struct, frozen=True, gc=False):
    """A request's continuations so far; `outputs` is ordered by their index.

    `prompt_logprobs` has an entry for each token of the prompt, None for the first, once all are known. A
    request to pool its prompt has one output, without tokens, and at its end the `embedding`.
    `cached_tokens` of the prompt were not computed, but found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    embedding: tuple[float, ...] | None = None
    cached_tokens: int = 0
