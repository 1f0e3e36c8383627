"""A timeline of an engine's steps and requests for Perfetto (ui.perfetto.dev) and chrome://tracing.

The file has the JSON array form of the Trace Event Format (Google, 2016): steps are complete events ("X") on
one track, requests are nestable asynchronous events ("b", "e"), counters are "C". That form may lack the
bracket at its end, so that what is there of a process that was killed can be read too.

Events are made on the engine's thread, some microseconds each, and written by a thread of the trace's own: a
slow disk holds up nobody.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import stat
import threading
from collections.abc import Mapping
from typing import Any

import msgspec

from ridgeline.outcome import RequestState
from ridgeline.records import StepRecord
from ridgeline.scheduling.plan import Plan
from ridgeline.types import ConfigError

MAX_FILE_BYTES = 1 << 30
"""Where a trace ends by itself: viewers take hardly more."""
MAX_PENDING_BYTES = 16 << 20
"""What may wait for the disk; events beyond it are lost."""

FLUSH_S = 0.25
_PAUSE_S = 0.01
"""Without a step for so long, the counters show that nothing runs."""
_STEPS = 1
"""The track of steps."""
_FIGURES = StepRecord.__struct_fields__

logger = logging.getLogger("ridgeline")


def check_path(path: str) -> None:
    """Raise ConfigError, with the cause, where no trace can be written. What is there stays as it is."""
    there = os.path.lexists(path)
    os.close(_opened(path))
    if not there:
        os.unlink(path)  # noqa: PTH108


def _opened(path: str, flags: int = 0) -> int:
    """A descriptor to write with. Raises ConfigError."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | flags, 0o666)  # a pipe would block
        if stat.S_ISREG(os.fstat(file).st_mode):
            return file
        os.close(file)
        cause: object = "it is no regular file"
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else error
    raise ConfigError(f"trace {path!r} cannot be written: {cause}; accepted: a file that can be")


class Trace:
    """One file. Implements `steps.StepWatcher`; `close` may come from any thread, and comes at the process's
    end by itself.

    `labels` are shown beside the process's name. Raises ConfigError when the file cannot be written.
    """

    def __init__(self, path: str, labels: Mapping[str, str] | None = None) -> None:
        self._file = _File(path)
        self._encode = msgspec.json.Encoder().encode
        self._pid = os.getpid()
        self._numbers = itertools.count(1)
        self._open: dict[str, _Open] = {}  # requests by their names
        self._owners: dict[int, _Open] = {}  # the same by their sequences
        self._ran: tuple[StepRecord, float] | None = None  # the last step, and its end
        self._say("M", "process_name", args={"name": "ridgeline"})
        self._say("M", "thread_name", args={"name": "steps"})
        if labels:
            shown = ", ".join(f"{name} {value}" for name, value in labels.items())
            self._say("M", "process_labels", args={"labels": shown})

    # ------------------------------------------------------------------------------- as a StepWatcher

    def arrived(self, state: RequestState) -> None:
        request = _Open(next(self._numbers), [c.sequence.arrival for c in state.choices])
        self._open[state.id] = request
        self._owners.update(dict.fromkeys(request.sequences, request))
        args = {"request": state.id, "prompt_tokens": len(state.tokens), "choices": len(state.choices)}
        self._async("b", request, f"request {request.number}", state.metrics.arrived_s, args)
        self._async("b", request, "queued", state.metrics.arrived_s)

    def step(self, record: StepRecord, plan: Plan, began_s: float, ended_s: float) -> None:
        if self._ran is not None and began_s - self._ran[1] > _PAUSE_S:
            self._rest(*self._ran)
        self._ran = record, ended_s
        self._advance(plan, began_s, ended_s)
        args = {name: value for name in _FIGURES if (value := getattr(record, name)) is not None}
        self._say("X", record.kind, began_s, cat="step", dur=_microseconds(ended_s - began_s), args=args)
        rows = {"prompt": record.prompt_tokens, "decoded": record.rows - record.prompt_tokens}
        self._say("C", "rows", began_s, args=rows)
        self._say("C", "KV pages", began_s, args={"used": record.kv_pages})
        if record.mbu is not None and record.mfu is not None:
            self._say("C", "utilisation", began_s, args={"MBU": record.mbu, "MFU": record.mfu})

    def ended(self, state: RequestState) -> None:
        request = self._open.pop(state.id, None)
        if request is None or state.metrics.finished_s is None:
            return
        for sequence in request.sequences:
            self._owners.pop(sequence, None)
        first = state.choices[0]
        args = {
            "finish_reason": first.finish_reason,
            "output_tokens": sum(choice.sequence.generated for choice in state.choices),
            "cached_tokens": first.sequence.cached_tokens,
        }
        self._async("e", request, request.phase, state.metrics.finished_s)
        self._async("e", request, f"request {request.number}", state.metrics.finished_s, args)

    def close(self) -> None:
        """Write what is left, and the end. Idempotent."""
        self._file.close()

    # ------------------------------------------------------------------------------------------ events

    def _advance(self, plan: Plan, began_s: float, ended_s: float) -> None:
        """Move on the requests that have their first row, or their first token, in this step."""
        for sequence in plan.sequences:
            request = self._owners.get(sequence.arrival)
            if request is not None and request.phase == "queued":
                self._enter(request, "prefill", began_s)
        for sequence, position in zip(plan.sampled, plan.positions, strict=True):
            request = self._owners.get(sequence.arrival)
            first = position >= sequence.prompt_length and not plan.pooled
            if first and request is not None and request.phase == "prefill":
                self._enter(request, "decode", ended_s)

    def _enter(self, request: _Open, phase: str, at_s: float) -> None:
        self._async("e", request, request.phase, at_s)
        request.phase = phase
        self._async("b", request, phase, at_s)

    def _rest(self, record: StepRecord, at_s: float) -> None:
        """Nothing ran for a while after that step."""
        self._say("C", "rows", at_s, args={"prompt": 0, "decoded": 0})
        if record.mbu is not None:
            self._say("C", "utilisation", at_s, args={"MBU": 0, "MFU": 0})

    def _async(
        self, phase: str, request: _Open, name: str, at_s: float, args: Mapping[str, Any] | None = None
    ) -> None:
        self._say(phase, name, at_s, cat="request", id=hex(request.number), args=args or {})

    def _say(self, phase: str, name: str, at_s: float | None = None, **more: Any) -> None:
        event = {"name": name, "ph": phase, "pid": self._pid, "tid": _STEPS, **more}
        if at_s is not None:
            event["ts"] = _microseconds(at_s)
        self._file.add(self._encode(event))


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)


class _Open:
    """A request that has not ended, and in which phase it is."""

    __slots__ = ("number", "phase", "sequences")

    def __init__(self, number: int, sequences: list[int]) -> None:
        self.number = number
        self.sequences = sequences
        self.phase = "queued"


# ------------------------------------------------------------------------------------------- the file


class _File:
    """Events, one a line, behind each other in a file. A file always ends with a whole event, but for what a
    process that is killed in the midst of writing leaves."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError. What was in the file is gone."""
        self._file = _opened(path, os.O_TRUNC | os.O_APPEND)
        self._path = path
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._lost = 0
        self._written = 0  # bytes, up to the end of an event
        self._ended = False  # nothing more is taken in
        self._lock = threading.Lock()  # guards the above
        self._writing = threading.Lock()  # held while the file is written to
        self._closing = threading.Event()
        threading.Thread(target=self._run, name="ridgeline-trace", daemon=True).start()
        atexit.register(self.close)

    def add(self, event: bytes) -> None:
        with self._lock:
            if self._ended:
                return
            if self._pending_bytes > MAX_PENDING_BYTES:
                self._lost += 1
                return
            self._pending.append(event)
            self._pending_bytes += len(event) + 2

    def close(self) -> None:
        """Write what is pending and the array's end. Idempotent, from any thread."""
        atexit.unregister(self.close)
        self._closing.set()
        self._end("")

    def _run(self) -> None:
        while not self._closing.wait(FLUSH_S):
            try:
                self._flush()
            except OSError as error:
                self._end(f"it ends here: {error.strerror}")
                return
            if self._written > MAX_FILE_BYTES:
                self._end(f"it ends here, at {MAX_FILE_BYTES >> 20} MiB")
                return

    def _end(self, why: str) -> None:
        with self._writing:  # whoever comes second waits for the end
            with self._lock:
                if self._ended:
                    return
                self._ended = True
            if self._lost:
                why += f"{'; ' if why else ''}the disk was too slow for {self._lost} events"
            if why:
                logger.warning("trace %s: %s", self._path, why)
            try:
                self._write(b"\n]\n")
            except OSError:
                pass  # what is there can be read
            finally:
                os.close(self._file)
                self._file = -1

    def _flush(self) -> None:
        with self._writing:
            if self._file >= 0:
                self._write()

    def _write(self, end: bytes = b"") -> None:
        """What is pending, and the end. Raises OSError when not all could be written; what there was no room
        for as a whole is cut off then."""
        with self._lock:
            events, self._pending, self._pending_bytes = self._pending, [], 0
        if not events and not end:
            return
        begin = b"" if not events else b",\n" if self._written else b"\n"
        text = (b"" if self._written else b"[") + begin + b",\n".join(events) + end
        done = 0
        try:
            while done < len(text):
                done += os.write(self._file, memoryview(text)[done:])
        except OSError:
            self._written += max(text.rfind(b",\n", 0, done), 0)
            os.ftruncate(self._file, self._written)
            raise
        self._written += done
