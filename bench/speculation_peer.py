"""Other systems' speculation beside ours, for `python -m bench.speculation --peer llama=PYTHON`.

A peer is llama-cpp-python's high-level class with its drafting by prompt lookup
(`bench/peers/llama_lookup.py`) in a process of its own, which stands still (SIGSTOP) except while it answers.
It gets the token ids of our prompt and is asked for as many tokens after its first as we are; our clock, too,
starts with the first one. Ours does not run meanwhile: its threads sleep within some tens of microseconds of
a step's end.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from bench.peers import cells, figures
from bench.peers.arguments import absolute, check_names, pairs, program, settings
from bench.peers.system import AbsentError, FailedError, Launch, System

KINDS = {"llama": "llama_lookup"}
"""The driver of a peer, by what its name begins with."""

_GUESS_ROOM_TOKENS = 64
"""Context beyond prompt and output: a peer's last guesses are cut where its context ends."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    many: dict[str, Any] = {"action": "extend", "nargs": "+", "default": []}
    parser.add_argument("--peer", metavar="NAME=PYTHON", help="a system, by a Python that has it", **many)
    parser.add_argument("--peer-model", metavar="NAME=FILE", help="another file for one of them", **many)
    parser.add_argument("--peer-option", metavar="NAME:KEY=VALUE", help="a setting of a driver", **many)


def launches(chosen: argparse.Namespace, model: str, threads: int) -> list[Launch]:
    """How the peers that were chosen run; `model` is the file of those that have no other.

    Raises ValueError for a name or an option without meaning.
    """
    pythons = pairs("--peer", chosen.peer)
    models = pairs("--peer-model", chosen.peer_model)
    options = settings("--peer-option", chosen.peer_option)
    check_names((*models, *options), pythons)
    return [
        Launch(
            name,
            _driver(name),
            program(python),
            absolute(models.get(name, model)),
            threads,
            options=tuple(options.get(name, ())),
        )
        for name, python in pythons.items()
    ]


def _driver(name: str) -> str:
    kind = name.split("-", 1)[0]
    if kind not in KINDS:
        raise ValueError(f"peer is {name!r}; accepted: {', '.join(KINDS)}, perhaps with -NAME of its own")
    return KINDS[kind]


class Peer:
    """One peer's process. `close` ends it; until `start` there is none."""

    def __init__(self, launch: Launch, longest_tokens: int) -> None:
        """`longest_tokens`: of any prompt with its output."""
        self.name = launch.name
        self._system = System(replace(launch, max_context=longest_tokens + _GUESS_ROOM_TOKENS))

    def start(self, vocabulary: int) -> None:
        """Load its model. Raises AbsentError, also where its vocabulary has another size than ours."""
        self._system.start()
        theirs = int(self._system.facts["vocabulary"])
        if theirs != vocabulary:
            raise AbsentError(f"its vocabulary has {theirs} tokens; accepted: {vocabulary}, as ours")

    def decode(self, name: str, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        """`tokens` after the first one of the prompt, for the cell of this name: its answer, checked.

        Raises FailedError or AbsentError.
        """
        return self._system.answer(cells.Cell(name, "decode", len(prompt), 1, tokens), [prompt])

    @property
    def facts(self) -> dict[str, Any]:
        """What it is and runs, for a report."""
        launch = self._system.launch
        return {"model": launch.model, "options": list(launch.options), **self._system.facts}

    def close(self) -> None:
        self._system.close()


@dataclass
class Against:
    """One peer's rounds of a cell: seconds a token, tokens a run of its model, and how many of its tokens,
    from the first timed on, are ours: another way of rounding may choose another word, and go on from it."""

    token_s: list[float] = field(default_factory=list)
    pass_tokens: list[float] = field(default_factory=list)
    alike_tokens: list[int] = field(default_factory=list)
    tokens: int = 0

    def add(self, answer: dict[str, Any], ours: Sequence[int]) -> None:
        """`ours` are the tokens after our first. Raises FailedError where they are not as many."""
        (theirs,) = answer["outputs"]
        if len(theirs) != len(ours):
            raise FailedError(f"it decoded {len(theirs)} tokens, and we {len(ours)}")
        self.tokens = len(theirs)
        self.token_s.append(answer["seconds"] / self.tokens)
        if "passes" in answer:
            self.pass_tokens.append(self.tokens / answer["passes"])
        same = takewhile(lambda pair: pair[0] == pair[1], zip(theirs, ours, strict=True))
        self.alike_tokens.append(sum(1 for _ in same))

    def told(self, ours_s: Sequence[float]) -> dict[str, Any]:
        """How many times as fast we are, given our seconds a token in the same rounds."""
        return {
            **figures.of_rounds([theirs / ours for theirs, ours in zip(self.token_s, ours_s, strict=True)]),
            "tokens_per_s": 1 / statistics.median(self.token_s),
            "tokens": self.tokens,
            "alike_tokens": min(self.alike_tokens),
            **({"tokens_per_pass": statistics.median(self.pass_tokens)} if self.pass_tokens else {}),
        }


def start_all(peers: Iterable[Peer], vocabulary: int) -> None:
    """Load the peers' models, one after the other. Raises AbsentError that names the peer."""
    for peer in peers:
        try:
            peer.start(vocabulary)
        except AbsentError as error:
            raise AbsentError(f"{peer.name} is absent: {error}") from None


def line(name: str, told: dict[str, Any]) -> str:
    """A peer's line under that of its cell."""
    passes = f", {told['tokens_per_pass']:.1f} a pass" if "tokens_per_pass" in told else ""
    return (
        f"  over {name:8}{told['ratio']:6.2f}×  {told['least']:.2f} to {told['most']:.2f}  "
        f"95%: {told['low_95']:.2f} to {told['high_95']:.2f}  "
        f"its {told['tokens_per_s']:7.1f} tokens/s{passes}, "
        f"{told['alike_tokens']} of {told['tokens']} as ours"
    )
