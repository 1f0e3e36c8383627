"""What the HTTP process and the engine process say to each other, and how it lies on their socket.

A frame is its length as four bytes, little-endian, and that many bytes of MessagePack: one command or one
event, checked against its type when it is read. Nothing is ever unpickled.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any, Literal, TypeVar

import msgspec

from ridgeline.records import DraftTotals, StepRecord, TiersRecord
from ridgeline.sampling.beam_search import BeamSearchParams
from ridgeline.types import PoolingParams, SamplingParams, ServiceClass, TokenLogprobs

MAX_FRAME_BYTES = 64 << 20
_LENGTH = struct.Struct("<I")

T = TypeVar("T")


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of commands and events; the class's name tells them apart."""


# ------------------------------------------------------------------------------- to the engine process


class Start(Message, frozen=True):
    """What an engine process is told on its standard input: where to connect, and what to load."""

    socket_path: str
    secret: str
    config: dict[str, Any]  # fields of EngineConfig


class Sender(msgspec.Struct, frozen=True):
    """Whose a request is, and what it is for. What is computed is shared only among requests of one
    `cache_salt`; inside a class, tokens are shared fairly between tenants."""

    cache_salt: str = ""
    tenant: str = ""
    service_class: ServiceClass = "interactive"


NOBODY = Sender()


class Add(Message, frozen=True):
    """Begin a request. `id` is the server's own, never used twice. A request that has not begun by
    `deadline_s` is dropped; `arrived_s` is when it came to the server. Both on `time.monotonic`'s clock."""

    id: int
    tokens: tuple[int, ...]
    params: SamplingParams
    stream: bool = True
    deadline_s: float | None = None
    arrived_s: float = 0.0
    sender: Sender = NOBODY


class Embed(Message, frozen=True):
    """Pool a prompt; otherwise as `Add`. It ends with `Embedded`, or `Refused`."""

    id: int
    tokens: tuple[int, ...]
    params: PoolingParams
    deadline_s: float | None = None
    arrived_s: float = 0.0
    sender: Sender = NOBODY


class Search(Message, frozen=True):
    """Search for the best continuations; otherwise as `Add`. All of them come at once, at the end."""

    id: int
    tokens: tuple[int, ...]
    params: BeamSearchParams
    deadline_s: float | None = None
    arrived_s: float = 0.0
    sender: Sender = NOBODY


class Abort(Message, frozen=True):
    """End a request; nothing more is told of it. Ids that are not (or no longer) known are ignored."""

    id: int


class Stop(Message, frozen=True):
    """End the process, once what it has computed is saved as far as a few seconds allow."""


Command = Add | Embed | Search | Abort | Stop

# ----------------------------------------------------------------------------- from the engine process


class ModelCard(msgspec.Struct, frozen=True):
    """What the server needs to know of the loaded model."""

    model: str
    device: str
    formats: dict[str, int]  # how many matrices run in each format
    max_model_len: int
    max_num_seqs: int
    vocabulary_size: int
    sampling_defaults: SamplingParams
    prefix_caching: bool = True
    energy_source: str = "none"  # of the joules in step records


class Hello(Message, frozen=True):
    """The first frame on a connection: who cannot say the secret is not the engine."""

    secret: str


class Ready(Message, frozen=True):
    """The model is loaded."""

    card: ModelCard


class Begun(Message, frozen=True):
    """Requests, of those with a deadline, whose first step began at `at_s` on `time.monotonic`'s clock."""

    ids: tuple[int, ...]
    at_s: float


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """What a choice of a request has gained: text, tokens, and at its end the reason.

    `prompt_logprobs`, where they were asked for, and how many tokens of the prompt were found in the prefix
    cache, come with the first piece of choice 0; `cumulative_logprob` with each beam of a search.
    """

    id: int
    choice: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    cached_tokens: int = 0
    cumulative_logprob: float | None = None


class Pieces(Message, frozen=True):
    """What a step gave, and the requests that it ended."""

    pieces: tuple[Piece, ...]
    ended: tuple[int, ...]


class Embedded(Message, frozen=True):
    """A prompt's vector, and the end of its request."""

    id: int
    embedding: tuple[float, ...]
    cached_tokens: int = 0


Cause = Literal["invalid", "expired", "capacity", "fault"]
"""Why a request is refused: it cannot be served, its deadline passed while it waited, there was no memory for
it, or the engine failed on it."""


class Refused(Message, frozen=True):
    """A request that was not begun, or that the engine could not go on with; its end."""

    id: int
    message: str
    cause: Cause = "invalid"


class Pulse(Message, frozen=True):
    """A sign of life, several a second, from a thread of its own.

    `step_age_s` is how long the step under way has taken so far, 0 between steps; `in_step` the requests
    whose rows are in it. `expected_step_s` is what it was to take, or where nobody can say, the longest of
    the recent steps.
    """

    step_age_s: float
    expected_step_s: float
    in_step: tuple[int, ...]
    steps: int
    running: int
    waiting: int
    kv_used: float  # share of the pages
    drafters: dict[str, DraftTotals] = {}  # by their names
    tiers: TiersRecord | None = None  # of the KV cache, where there are any
    kv_filled: float = 1.0  # share of the slots of those pages


class Steps(Message, frozen=True):
    """Steps that are over, in their order, some time after; of very many, some may be missing."""

    records: tuple[StepRecord, ...]


class Failed(Message, frozen=True):
    """The engine process ends. `startup`: the model could not be loaded, and trying again will not help."""

    message: str
    startup: bool


Event = Hello | Ready | Begun | Pieces | Embedded | Refused | Pulse | Steps | Failed

# ------------------------------------------------------------------------------------------- the socket

_ENCODER = msgspec.msgpack.Encoder()
COMMANDS: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
EVENTS: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
START: msgspec.msgpack.Decoder[Start] = msgspec.msgpack.Decoder(Start)


class FrameError(Exception):
    """What came is no frame of ours."""


def frame(message: Message) -> bytes:
    """A message as it lies on the socket."""
    body = _ENCODER.encode(message)
    return _LENGTH.pack(len(body)) + body


def _checked_length(header: bytes) -> int:
    (length,) = _LENGTH.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {length} bytes; accepted: up to {MAX_FRAME_BYTES}")
    return int(length)


def _decoded(decoder: msgspec.msgpack.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise FrameError(f"a frame of {len(body)} bytes: {error}") from None


async def read_frame(reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[T]) -> T:
    """The next message. Raises FrameError, and asyncio.IncompleteReadError at the end."""
    length = _checked_length(await reader.readexactly(_LENGTH.size))
    return _decoded(decoder, await reader.readexactly(length))


def receive_frame(connection: socket.socket, decoder: msgspec.msgpack.Decoder[T]) -> T:
    """The next message, for threads. Raises FrameError, EOFError at the end, and OSError."""
    length = _checked_length(_receive(connection, _LENGTH.size))
    return _decoded(decoder, _receive(connection, length))


def _receive(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(min(count - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)
