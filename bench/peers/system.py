"""The caller's side of a driver: its process, held still while others run, and a check of each answer."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bench.peers.cells import Cell

ROOT = Path(__file__).parents[2]
KINDS = ("ridgeline", "llama", "vllm", "openvino", "transformers")
STOP_S = 10.0

_COLD_QUESTION = "Why is the sky blue?"
_CLOCK_SLACK_S = 1e-3


class AbsentError(Exception):
    """A system that is not there, or is no longer: why."""


class FailedError(Exception):
    """A measurement that a system refused, or whose answer does not hold."""


@dataclass(frozen=True)
class Launch:
    """How to run one system: under what name, by which driver and Python, on which model."""

    name: str
    kind: str
    python: str
    model: str
    threads: int
    max_context: int = 256
    max_batch: int = 1
    options: tuple[str, ...] = ()
    cold: str | None = None

    def driver_command(self, *more: str) -> list[str]:
        limits = {
            "model": self.model,
            "threads": self.threads,
            "max-context": self.max_context,
            "max-batch": self.max_batch,
        }
        flags = [f"--{name}={value}" for name, value in limits.items()]
        flags += [f"--option={option}" for option in self.options]
        return [self.python, "-m", f"bench.peers.{self.kind}", *flags, *more]

    def cold_command(self) -> list[str]:
        """The system's own command line where it is known, else its driver for one token."""
        if self.cold is not None:
            places = {"model": self.model, "threads": self.threads, "prompt": _COLD_QUESTION}
            return [part.format(**places) for part in shlex.split(self.cold)]
        if self.kind == "ridgeline":
            verb = [self.python, "-m", "ridgeline.cli.main", "run", f"--model={self.model}"]
            settings = dict(option.split("=", 1) for option in self.options)
            weights = [f"--weights={settings['weights']}"] if "weights" in settings else []
            return [*verb, f"--threads={self.threads}", "--max-tokens=1", *weights, _COLD_QUESTION]
        return self.driver_command("--once")

    def environment(self) -> dict[str, str]:
        return environment_of(self.kind)


class System:
    """One driver's process. It is stopped (SIGSTOP) except while it loads and while it answers: thread pools
    that spin between two calls would slow the others down. Its process group has what it starts itself, and
    is stopped with it. `close` ends it."""

    def __init__(self, launch: Launch, timeout_s: float = 900.0) -> None:
        self.launch = launch
        self.facts: dict[str, Any] = {}
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._pending = b""
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process

    @property
    def name(self) -> str:
        return self.launch.name

    def start(self) -> None:
        """Load the model. Raises AbsentError where the system is not installed or does not load it."""
        try:
            self._process = subprocess.Popen(
                self.launch.driver_command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                cwd=ROOT,
                env=self.launch.environment(),
                start_new_session=True,
            )
        except OSError as error:
            raise AbsentError(f"{self.launch.python}: {error.strerror}") from None
        try:
            first = self._read()
            if "ready" not in first:
                raise AbsentError(str(first.get("absent", "its first line is not the protocol's")))
            self.facts = first["ready"]
        except AbsentError:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def measure(self, cell: Cell, seed: int) -> dict[str, Any]:
        """Run a cell once on its own prompts; the driver's answer, checked: `seconds`, and its own figures.

        Raises FailedError where the answer does not hold, AbsentError where the process is gone.
        """
        answer = self.answer(cell, cell.prompts(int(self.facts["vocabulary"]), seed))
        del answer["outputs"]
        return answer

    def answer(self, cell: Cell, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Run a cell once on these prompts; the same, with the `outputs`. Raises what `measure` does."""
        command: dict[str, Any] = {"do": cell.kind, "prompts": prompts}
        if cell.kind == "decode":
            command["tokens"] = cell.tokens
        self._signal(signal.SIGCONT)
        try:
            start = time.perf_counter()
            answer = self._ask(command)
            wall_s = time.perf_counter() - start
        finally:
            self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise FailedError(str(answer["error"]))
        check(answer, cell, int(self.facts["vocabulary"]), wall_s)
        return answer

    def close(self) -> None:
        """End the process and whatever it started."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGCONT)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        if self._process is None:
            raise AbsentError("it has ended")
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise AbsentError(self._last_words()) from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        """One line of the driver, within the time limit."""
        assert self._process is not None
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        end_s = time.monotonic() + self._timeout_s
        while b"\n" not in self._pending:
            ready, _, _ = select.select([output], [], [], max(end_s - time.monotonic(), 0))
            if not ready:
                self._signal(signal.SIGKILL)  # it would not end when it is asked to, either
                raise AbsentError(f"no answer within {self._timeout_s:.0f} s")
            part = os.read(output, 1 << 16)
            if not part:
                raise AbsentError(self._last_words())
            self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise AbsentError(f"its answer is {line[:80]!r}; accepted: a JSON object")
        return answer

    def _last_words(self) -> str:
        """What the process said when it ended; its output closes a little before that."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        return last_line(self._said) or "it ended without a message"

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


def check(answer: Mapping[str, Any], cell: Cell, vocabulary: int, wall_s: float) -> None:
    """Raise FailedError unless each sequence has its tokens, ids are ids, and the time can be true."""
    seconds, outputs = answer.get("seconds"), answer.get("outputs")
    if type(seconds) not in (int, float) or not math.isfinite(seconds) or seconds <= 0:
        raise FailedError(f"seconds is {seconds!r}; accepted: a positive number")
    if seconds > wall_s + _CLOCK_SLACK_S:
        raise FailedError(f"it says {seconds:.3f} s of a command that took {wall_s:.3f} s")
    if not isinstance(outputs, list) or len(outputs) != cell.batch:
        raise FailedError(f"outputs are not those of {cell.batch} sequences")
    for tokens in outputs:
        if not isinstance(tokens, list) or len(tokens) != cell.tokens:
            seen = len(tokens) if isinstance(tokens, list) else "no"
            raise FailedError(f"a sequence has {seen} tokens; accepted: {cell.tokens}")
        if not all(type(token) is int and 0 <= token < vocabulary for token in tokens):
            raise FailedError(f"a sequence has ids that are none; accepted: 0 to {vocabulary - 1}")


def cold_start(launch: Launch, timeout_s: float) -> float:
    """Seconds from starting a process to its end with one token made.

    Raises AbsentError where it is not installed, FailedError where it fails or shows no token.
    """
    with tempfile.TemporaryFile() as shown, tempfile.TemporaryFile() as said:
        command = launch.cold_command()
        start = time.perf_counter()
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=shown,
                stderr=said,
                cwd=ROOT,
                env=launch.environment(),
                timeout=timeout_s,
            )
        except OSError as error:
            raise AbsentError(f"{command[0]}: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise FailedError(f"no end within {timeout_s:.0f} s") from None
        seconds = time.perf_counter() - start
        shown.seek(0)
        output = shown.read().strip()
        if output.startswith(b'{"absent"'):
            raise AbsentError(str(json.loads(output)["absent"]))
        if done.returncode or not output:
            raise FailedError(f"exit status {done.returncode}: {last_line(said) or 'nothing was shown'}")
    return seconds


def last_line(file: IO[bytes]) -> str:
    """The last line of what a process said on standard error."""
    file.seek(0)
    lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def environment_of(kind: str) -> dict[str, str]:
    """PYTHONPATH belongs to the Python that runs us: another one's packages are its own."""
    return {key: value for key, value in os.environ.items() if kind == "ridgeline" or key != "PYTHONPATH"}


def kind_of(name: str) -> str:
    """The driver of a system's name: what stands before the first dash. Raises ValueError."""
    kind = name.split("-", 1)[0]
    if kind not in KINDS:
        raise ValueError(f"peer is {name!r}; accepted: {', '.join(KINDS)}, perhaps with -NAME of its own")
    return kind


def close_all(systems: Sequence[System]) -> None:
    for system in systems:
        system.close()
