"""What speculation gives, on the default model: `python -m bench.speculation`.

    python -m bench.speculation --model smollm2 --rounds 48 --seconds 25 --tokens 64 --json out.json
    python -m bench.speculation --cells copy:0:1 json:0.8:16
    python -m bench.speculation --cells copy:0:1 quote:0:1 --peer llama=VENV/bin/python

Each cell is a kind of work, a temperature and a batch. Its requests are answered twice a round by one
engine, with speculation and without, in turns that change; both must give the same tokens, which is
checked. Timed is decoding alone, while the batch is whole: from the step after which every sequence has a
token to the end of the first that ends. Before every run the engine forgets all texts that it has seen, so
that nothing is won by having given the answer before. The ratio of a round is that of its two rates of
tokens, which were taken within seconds of each other; told are the median, the least and the most, and the
95% interval of Wilcoxon's signed-rank test on the logarithms (Hodges and Lehmann's). It is exact for noise
that is as likely to slow either way down, as the turns see to, and a round that other work disturbed widens
it no more than any other. Many short rounds make it narrower than few long ones; it takes six at least. How
many a cell has is settled by the time that its first one takes, which only warms up, before any is counted:
as many as --seconds have room for, --rounds at most and six at least.

- copy: a file, and the request to give it back with one name changed; the answer's first lines are given.
- quote: a text, and a summary that quotes it at length, likewise begun.
- json: an array of records by a JSON schema with long fixed keys (the form constrains the answer).
- chat: open questions. code: functions to be written. Neither repeats much.

With --peer, the greedy cells of batch 1 that repeat a text (copy, quote) are answered by other systems, too,
in the same rounds and in turns with ours: by llama-cpp-python with its drafting by prompt lookup, from the
same token ids, for as many tokens by the same clock, while ours stands still, and it while ours runs. Told is
how many times as fast ours is with speculation, and how many of the peer's tokens are the same as ours: one
that rounds otherwise may leave the text. A peer's name begins with `llama` and may go on, so that one system
runs several times; it reads the file of --model unless --peer-model names another, and --peer-option sets
what its driver knows (`bench/peers/llama_lookup.py`): --peer-option llama-2:num_pred_tokens=2.

Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from bench import speculation_peer
from bench.peers import figures
from bench.peers.system import AbsentError, FailedError
from bench.server_runs import leave_on_sigterm
from bench.speculation_peer import Against, Peer
from bench.speculation_work import KINDS
from ridgeline.config import EngineConfig
from ridgeline.loading import LoadedModel, load_engine
from ridgeline.model.catalog import resolve
from ridgeline.resources.machine import usable_cores
from ridgeline.types import Request, RidgelineError, SamplingParams

BATCHES = (1, 4, 16, 64)
TEMPERATURES = (0.0, 0.8)
LEAST_ROUNDS = 6
_COMPARED = ("copy", "quote")
"""Kinds whose greedy cells of batch 1 the peers answer, too."""


@dataclass(frozen=True)
class Cell:
    """One kind of work at one temperature and batch."""

    kind: str
    temperature: float
    batch: int

    @classmethod
    def parse(cls, text: str) -> Cell:
        kind, temperature, batch = text.split(":")
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is no kind of work; accepted: {', '.join(KINDS)}")
        return cls(kind, float(temperature), int(batch))

    @property
    def is_compared(self) -> bool:
        """Whether peers can be given it: they draft for one sequence, and take the likeliest token."""
        return self.kind in _COMPARED and self.temperature == 0 and self.batch == 1

    def __str__(self) -> str:
        return f"{self.kind}:{self.temperature:g}:{self.batch}"


@dataclass(frozen=True)
class Answered:
    """What one way of answering a cell said, its seconds a token, and what was guessed."""

    said: list[tuple[int, ...]]
    token_s: float
    drafted: int
    accepted: int


@dataclass
class Measured:
    """A cell's rounds: seconds a token with speculation and without, what drafting did in all of them, and
    what the peers did by their names."""

    on_s: list[float] = field(default_factory=list)
    off_s: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    against: dict[str, Against] = field(default_factory=dict)

    def add(self, on: Answered, off: Answered) -> None:
        self.on_s.append(on.token_s)
        self.off_s.append(off.token_s)
        self.drafted += on.drafted
        self.accepted += on.accepted

    def told(self) -> dict[str, Any]:
        told: dict[str, Any] = {
            "rounds": len(self.on_s),
            **figures.of_rounds([off / on for on, off in zip(self.on_s, self.off_s, strict=True)]),
            "off_tokens_per_s": 1 / statistics.median(self.off_s),
            "drafted": self.drafted,
            "accepted": self.accepted,
        }
        if self.against:
            told["peers"] = {name: against.told(self.on_s) for name, against in self.against.items()}
        return told


class Bench:
    """One engine, which answers each cell with speculation and without, and the peers that answer some."""

    def __init__(self, loaded: LoadedModel, tokens: int, peers: Sequence[Peer] = ()) -> None:
        self._loaded, self._engine = loaded, loaded.engine
        self._tokens = tokens
        self._peers = peers
        self._names = 0

    def round(self, cell: Cell, seed: int, measured: Measured | None) -> None:
        """Answer the cell's requests in every way; the last way is the first of the next round."""
        ways: list[bool | Peer] = [True, False, *(self._peers if cell.is_compared else ())]
        answers: dict[bool, Answered] = {}
        theirs: dict[str, dict[str, Any]] = {}
        for way in ways if seed % 2 else reversed(ways):
            if isinstance(way, Peer):
                theirs[way.name] = way.decode(str(cell), self.prompt(cell.kind, 0), self._tokens - 1)
            else:
                answers[way] = self._answer(cell, seed, way)
        if answers[True].said != answers[False].said:
            raise SystemExit(f"error: {cell} says something else with speculation")
        if measured is None:
            return
        measured.add(answers[True], answers[False])
        for name, answer in theirs.items():
            measured.against.setdefault(name, Against()).add(answer, answers[True].said[0][1:])

    def read(self, cell: Cell) -> None:
        """Leave the cell's prompts in the prefix cache: a batch of long ones is not read in one step, and the
        first answers would have ended before the last began."""
        for index in range(cell.batch):
            self._names += 1
            self._engine.add(self._request(cell, index, 0, str(self._names), False, tokens=1))
        while self._engine.has_work:
            self._engine.step()

    def _answer(self, cell: Cell, seed: int, speculated: bool) -> Answered:
        """Answer all of a cell's requests; timed is the decoding of the whole batch."""
        engine = self._engine
        if engine.scheduler.drafting is None:
            raise SystemExit("error: nothing is known of this machine's speed; first run `ridgeline probe`")
        engine.scheduler.drafting.restart()
        gc.collect()  # so that each answer begins with as much garbage as any other
        before = engine.steps.recent.count
        names = []
        for index in range(cell.batch):
            self._names += 1
            names.append(str(self._names))
            asked = None if speculated else False
            engine.add(self._request(cell, index, seed, names[-1], asked, self._tokens))
        said: dict[str, tuple[int, ...]] = {}
        begun_s = ended_s = 0.0
        tokens = ended = 0
        while engine.has_work:
            for output in engine.step():
                said[output.request_id] = output.outputs[0].token_ids
                ended += output.finished
            if not begun_s and len(said) == cell.batch:
                begun_s, tokens = time.perf_counter(), -sum(map(len, said.values()))
            if begun_s and ended and not ended_s:
                ended_s = time.perf_counter()
                tokens += sum(map(len, said.values()))
        if tokens < 1:
            raise SystemExit(
                f"error: of {cell} the first answer ended before the last began; try more --tokens"
            )
        steps = engine.steps.recent.since(before)
        return Answered(
            [said[name] for name in names],
            (ended_s - begun_s) / tokens,
            sum(step.drafted_tokens for step in steps),
            sum(step.accepted_tokens for step in steps),
        )

    def prompt(self, kind: str, index: int) -> tuple[int, ...]:
        """The token ids of a request of this kind."""
        work = KINDS[kind](index)
        messages = [{"role": "user", "content": work.asked}]
        if work.begun:
            messages.append({"role": "assistant", "content": work.begun})
        return self._loaded.chat_tokens(
            messages, add_generation_prompt=not work.begun, continue_final_message=bool(work.begun)
        )

    def _request(
        self, cell: Cell, index: int, seed: int, name: str, speculation: bool | None, tokens: int
    ) -> Request:
        form = KINDS[cell.kind](index).form
        params = SamplingParams(
            temperature=cell.temperature,
            seed=1000 * seed + index,
            max_tokens=tokens,
            ignore_eos=form is None,
            structured_outputs=form,
            speculation=speculation,
        )
        return Request(name, self.prompt(cell.kind, index), params)


def report(cell: Cell, told: dict[str, Any]) -> str:
    share = told["accepted"] / told["drafted"] if told["drafted"] else 0.0
    lines = [
        f"{cell!s:14} {told['ratio']:6.2f}×  {told['least']:.2f} to {told['most']:.2f}  "
        f"95%: {told['low_95']:.2f} to {told['high_95']:.2f}  "
        f"off {told['off_tokens_per_s']:7.1f} tokens/s  {told['drafted']:6} guesses, {share:4.0%} right  "
        f"{told['rounds']} rounds"
    ]
    return "\n".join(lines + [speculation_peer.line(*peer) for peer in told.get("peers", {}).items()])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What speculation gives.")
    parser.add_argument("--model", default=EngineConfig().model)
    parser.add_argument("--cells", nargs="*", default=None, help="kind:temperature:batch (default: all)")
    parser.add_argument("--rounds", type=int, default=48, help="at most; even, so that turns are")
    parser.add_argument(
        "--seconds", type=float, default=25.0, help="for a cell's rounds, six of them at least"
    )
    parser.add_argument("--tokens", type=int, default=64, help="of each answer, at most")
    parser.add_argument("--threads", type=int, help="for every system (default: one per usable core)")
    parser.add_argument("--json", type=Path)
    speculation_peer.add_flags(parser)
    return parser.parse_args()


def _cells(chosen: argparse.Namespace) -> list[Cell]:
    """What is measured. Raises ValueError, also where there is nothing that the peers could answer."""
    if chosen.tokens < 2:
        raise ValueError(f"--tokens is {chosen.tokens}; accepted: at least 2, the first is not timed")
    if chosen.rounds < 1:
        raise ValueError(f"--rounds is {chosen.rounds}; accepted: at least 1")
    if not chosen.seconds > 0:
        raise ValueError(f"--seconds is {chosen.seconds:g}; accepted: more than 0")
    if chosen.cells is None:
        return [Cell(*each) for each in product(KINDS, TEMPERATURES, BATCHES)]
    cells = [Cell.parse(text) for text in chosen.cells]
    if chosen.peer and not any(cell.is_compared for cell in cells):
        accepted = ", ".join(f"{kind}:0:1" for kind in _COMPARED)
        raise ValueError(f"no cell is one that --peer compares; accepted: one of {accepted}")
    return cells


def rounds_within(seconds: float, round_s: float, most: int) -> int:
    """How many rounds of that length a cell has: `most`, or as many as there is time for, an even number so
    that turns are."""
    if most * round_s <= seconds:
        return most
    return min(most, max(int(seconds / round_s) // 2 * 2, LEAST_ROUNDS))


def measure(bench: Bench, cells: Sequence[Cell], rounds: int, seconds: float = math.inf) -> dict[str, Any]:
    """Measure and show each cell; what is told of it by its name."""
    results = {}
    for cell in cells:
        measured = Measured()
        try:
            bench.read(cell)
            began_s = time.perf_counter()
            bench.round(cell, 0, None)  # warms up
            round_s = time.perf_counter() - began_s
            for number in range(rounds_within(seconds, round_s, rounds)):
                bench.round(cell, number + 1, measured)
        except (AbsentError, FailedError) as error:
            raise SystemExit(f"error: a peer failed at {cell}: {error}") from None
        results[str(cell)] = measured.told()
        print(report(cell, results[str(cell)]), flush=True)
    return results


def main() -> None:
    chosen = _arguments()
    threads = chosen.threads or usable_cores()
    try:
        cells = _cells(chosen)
        launches = speculation_peer.launches(chosen, str(resolve(chosen.model)), threads)
    except (ValueError, RidgelineError) as error:
        raise SystemExit(f"error: {error}") from None
    leave_on_sigterm()
    # Prompts are read as fast as can be, so that no request ends before the whole batch decodes.
    config = EngineConfig(
        model=chosen.model, threads=threads, max_num_seqs=max(BATCHES), measured_budget=False
    )
    loaded = load_engine(config)
    gc.collect()
    gc.freeze()  # as the server does: looking through the tokenizer before each answer would empty the caches
    alone = Bench(loaded, chosen.tokens)
    longest = max((len(alone.prompt(cell.kind, 0)) for cell in cells if cell.is_compared), default=0)
    peers = [Peer(launch, longest + chosen.tokens) for launch in launches]
    try:
        speculation_peer.start_all(peers, loaded.engine.model.vocabulary_size)
        results = measure(Bench(loaded, chosen.tokens, peers), cells, chosen.rounds, chosen.seconds)
        systems = {peer.name: peer.facts for peer in peers}
    except AbsentError as error:
        raise SystemExit(f"error: {error}") from None
    finally:
        for peer in peers:
            peer.close()
        loaded.engine.close()
    told = {"model": chosen.model, "tokens": chosen.tokens, "cells": results}
    line = json.dumps(told | ({"peers": systems} if systems else {}))
    if chosen.json:
        chosen.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
