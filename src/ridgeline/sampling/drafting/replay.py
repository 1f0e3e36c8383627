"""What guesses would bring for texts that are known: drafting is replayed over their tokens, without a model.

A draft changes no token of any text, so a text that was written without guesses is the one that would have
been written with them; and which of them are right is seen in it. Steps take what is predicted of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ridgeline.sampling.drafting.costs import Seconds, StepCost
from ridgeline.sampling.drafting.speculator import Speculator
from ridgeline.sampling.drafting.tree import Descent, DraftTree
from ridgeline.types import SpeculationParams


@dataclass(frozen=True, slots=True)
class KnownText:
    """The tokens of a prompt and of its answer."""

    prompt: Sequence[int]
    answer: Sequence[int]


@dataclass(frozen=True, slots=True)
class Pass:
    """A step of `sequences` decodes, which drafted so many tokens behind them, of which so many were right.
    It took `elapsed_s`, and would have taken `alone_s` without guesses."""

    sequences: int
    drafted: int
    accepted: int
    elapsed_s: float
    alone_s: float


@dataclass(frozen=True, slots=True)
class Guesses:
    """What guesses brought in some passes. `share` of the drafted tokens were right; a sequence had
    `tokens_per_pass`, in a pass that took `slowdown` times as long as without guesses; and the same tokens
    without them would have taken `gain` times as long in all."""

    passes: int
    drafted: int
    accepted: int
    tokens_per_pass: float
    slowdown: float
    gain: float

    @property
    def share(self) -> float:
        return self.accepted / self.drafted

    @classmethod
    def of(cls, passes: Sequence[Pass]) -> Guesses | None:
        """None where nothing was guessed."""
        drafted = sum(one.drafted for one in passes)
        elapsed_s = sum(one.elapsed_s for one in passes)
        if not drafted or elapsed_s <= 0:
            return None
        decodes = sum(one.sequences for one in passes)
        accepted = sum(one.accepted for one in passes)
        alone_s = sum(one.alone_s for one in passes)
        # As many steps without guesses as give each sequence what it had here.
        without_s = sum(one.alone_s * (1 + one.accepted / one.sequences) for one in passes)
        return cls(
            passes=len(passes),
            drafted=drafted,
            accepted=accepted,
            tokens_per_pass=1 + accepted / decodes,
            slowdown=elapsed_s / alone_s,
            gain=without_s / elapsed_s,
        )


@dataclass(slots=True)
class _Replayed:
    """Implements `DraftedSequence`: a text as far as it has been written."""

    arrival: int
    text: Sequence[int]
    token_ids: list[int]
    prompt_length: int
    limit: int
    speculation: SpeculationParams
    tenant: str = ""
    forced: Sequence[int] | None = None

    def follow(self, tree: DraftTree) -> list[int]:
        """The nodes that the text goes along."""
        descent, written, end = Descent(tree), len(self.token_ids), len(self.text)
        while written + len(descent.nodes) < end:
            if descent.go(self.text[written + len(descent.nodes)]) is None:
                break
        return descent.nodes

    def write(self, count: int) -> bool:
        """Take on so many tokens, or all that there are; whether there are more."""
        written = len(self.token_ids)
        self.token_ids += self.text[written : written + count]
        return len(self.token_ids) < len(self.text)


def replay(
    texts: Sequence[KnownText],
    batch: int,
    room: int,
    seconds_of: Callable[[Sequence[int]], Seconds],
    params: SpeculationParams | None = None,
) -> Iterator[Pass]:
    """The steps that write the texts' answers, `batch` at a time in their order, with as many guesses as the
    controller takes for them, `room` at most. `seconds_of` predicts the steps of decodes whose rows see so
    many slots each. The first token of an answer is its prompt's. What drafting takes is not counted, so that
    the same texts always come to the same.
    """
    speculator = Speculator.of_lookups(clock=lambda: 0.0)
    params = params or SpeculationParams()
    waiting = deque(
        _Replayed(number, whole, whole[: len(text.prompt) + 1], len(text.prompt), len(whole), params)
        for number, text in enumerate(texts)
        if len(whole := [*text.prompt, *text.answer]) > len(text.prompt) + 1
    )
    running: list[_Replayed] = []
    while waiting or running:
        while waiting and len(running) < batch:
            running.append(waiting.popleft())
        seconds = seconds_of([len(one.token_ids) for one in running])
        rows = len(running)
        trees = speculator.draft(running, StepCost(rows, rows, room, seconds))
        drafted, accepted, left = sum(map(len, trees)), 0, []
        for one, tree in zip(running, trees, strict=True):
            nodes = one.follow(tree) if len(tree) else []
            if len(tree):
                speculator.verified(one, tree, nodes)
            accepted += len(nodes)
            if one.write(len(nodes) + 1):
                left.append(one)
            else:
                speculator.forget(one)
        alone_s = seconds(rows)
        yield Pass(rows, drafted, accepted, seconds(rows + drafted) if drafted else alone_s, alone_s)
        running = left
