"""What a driver is: one system, one model, commands as JSON lines in, answers as JSON lines out.

A driver is a module of this folder that the system's own Python runs, from the repository's root:

    python -m bench.peers.llama --model model.gguf --threads 2 --max-context 256 --max-batch 1

It loads the model once, says so in its first line, and then answers each line on standard input:

    {"do": "prefill", "prompts": [[…ids…]]}              reads the prompts; one token of each
    {"do": "decode", "prompts": [[…], […]], "tokens": 64}  reads them untimed, then times 64 tokens of each

    {"seconds": 0.41, "outputs": [[…ids…], […]]}          the answer; a driver may add figures of its own
    {"error": "…"}                                        this command failed, others may not

The first line is {"ready": {"system": …, "version": …, "vocabulary": …, "load_s": …}}, or {"absent": "…"}
where the system is not installed or does not load the model. All prompts of a command have one length.
Decoding takes the likeliest token and goes on past end tokens. The clock of a decode starts when every
sequence has its first token.

With --once the driver produces one token of one short prompt, prints it and ends: a cold start.

Only the standard library is used here, and nothing newer than Python 3.9: other systems' Pythons run it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

ONCE_PROMPT = tuple(range(100, 108))
"""Ids of the cold start's prompt: every vocabulary has them."""

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Options:
    """How to load a model. `max_context` bounds prompt and output of a sequence, `max_batch` how many run at
    once; `more` are settings that only this system knows, by its own names."""

    model: str
    threads: int
    max_context: int
    max_batch: int
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """Wall time of the timed part, the token ids that it produced, and figures of the system's own."""

    seconds: float
    outputs: list[list[int]]
    more: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "outputs": self.outputs, **self.more}


class Driver(Protocol):
    """One system with its model loaded."""

    system: str
    version: str
    vocabulary: int

    def prefill(self, prompts: list[list[int]]) -> Answer: ...

    def decode(self, prompts: list[list[int]], tokens: int) -> Answer: ...


def main(load: Callable[[Options], Driver]) -> None:
    """Run a driver: `load` imports its system and loads the model."""
    chosen = _arguments()
    options = Options(
        chosen.model, chosen.threads, chosen.max_context, chosen.max_batch, dict(map(_setting, chosen.option))
    )
    _die_with_parent()
    with _own_stdout() as answers:
        start = time.perf_counter()
        try:
            driver = load(options)
        except Exception as error:  # not installed, or it does not load this model
            traceback.print_exc()
            _say(answers, {"absent": _one_line(error)})
            sys.exit(3)
        if chosen.once:
            _say(answers, driver.prefill([list(ONCE_PROMPT)]).to_json())
        else:
            ready = {
                "system": driver.system,
                "version": driver.version,
                "vocabulary": driver.vocabulary,
                "load_s": time.perf_counter() - start,
            }
            _say(answers, {"ready": ready})
            answer_lines(driver, sys.stdin, answers)
        # Some systems hang or crash while their threads are torn down; what they said is out by now.
        answers.flush()
        os._exit(0)


def answer_lines(driver: Driver, commands: TextIO, answers: TextIO) -> None:
    """Answer each command until there are no more."""
    for line in commands:
        try:
            answer = _answer(driver, json.loads(line)).to_json()
        except Exception as error:  # whatever a system raises is its answer
            answer = {"error": _one_line(error)}
        _say(answers, answer)


def _answer(driver: Driver, command: dict[str, Any]) -> Answer:
    if command.get("do") == "prefill":
        return driver.prefill(command["prompts"])
    if command.get("do") == "decode":
        return driver.decode(command["prompts"], command["tokens"])
    raise ValueError(f"command is {command.get('do')!r}; accepted: prefill, decode")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"


def _say(answers: TextIO, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Drive one system by JSON lines; see protocol.py.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-context", type=int, required=True)
    parser.add_argument("--max-batch", type=int, required=True)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--once", action="store_true", help="one token, and end")
    return parser.parse_args()


def _setting(text: str) -> tuple[str, Any]:
    """A system's own setting; the value is JSON, or a text where it is none."""
    name, separator, value = text.partition("=")
    if not separator:
        raise SystemExit(f"error: --option is {text!r}; accepted: NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _own_stdout() -> TextIO:
    """The descriptor of standard output for answers alone; what libraries print there goes to stderr."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(kept, "w")


def _die_with_parent() -> None:
    """A caller that is killed cannot wake and end a stopped driver; Linux can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
