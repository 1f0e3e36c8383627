"""What drafting costs the CPU: microseconds of processor time for each sequence and step.

    python bench/drafting.py [--sequences 64] [--steps 200] [--prompt 1000]

Texts of each kind are replayed token by token through the drafters, and every step drafts for a batch of
sequences: copy (a file repeated with small changes), template (records with the same keys), prose (words by
frequency, Zipf's law, that repeat only by chance) and loop (one phrase over and over). Prints, for each kind
and drafter, the processor time of a sequence's step: of taking on a token and proposing, and that with the
controller's decision; how much was proposed and what the text then had of it; and a last line of JSON. Times
of one run are for comparison with each other only.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ridgeline.sampling.drafting.controller import Controller
from ridgeline.sampling.drafting.costs import StepCost
from ridgeline.sampling.drafting.drafter import Drafter
from ridgeline.sampling.drafting.histories import Histories
from ridgeline.sampling.drafting.index import TokenIndex
from ridgeline.sampling.drafting.ngram import NgramDrafter
from ridgeline.sampling.drafting.outputs import PastOutputs
from ridgeline.sampling.drafting.speculator import Speculator
from ridgeline.sampling.drafting.suffix import SuffixDrafter
from ridgeline.sampling.drafting.tree import Descent, DraftTree
from ridgeline.types import SpeculationParams

VOCABULARY = 49_152
BUDGET = 16
PAST_OUTPUTS = 200


@dataclass(slots=True)
class Replayed:
    """A sequence whose whole text is known beforehand."""

    arrival: int
    text: list[int]
    prompt_length: int
    token_ids: list[int] = field(default_factory=list)
    limit: int = 1 << 30
    tenant: str = ""
    speculation: SpeculationParams | None = field(default_factory=SpeculationParams)
    forced: Sequence[int] = ()

    def __post_init__(self) -> None:
        self.token_ids = self.text[: self.prompt_length]

    def token_after(self, ahead: int) -> int:
        """What the text has so many tokens beyond the next one."""
        return self.text[(len(self.token_ids) + ahead) % len(self.text)]

    def follow(self, tree: DraftTree) -> list[int]:
        """The nodes of a tree that the text goes along."""
        descent = Descent(tree)
        while descent.go(self.token_after(len(descent.nodes))) is not None:
            pass
        return descent.nodes


# -------------------------------------------------------------------------------------------- texts


def zipf(rng: random.Random, count: int) -> list[int]:
    """Tokens of which the k-th most frequent has 1/k of the first one's frequency."""
    return [int(VOCABULARY ** rng.random()) - 1 for _ in range(count)]


def copy(rng: random.Random, prompt: int, steps: int) -> list[int]:
    """A text, and then the same with every fiftieth token changed."""
    first = zipf(rng, prompt)
    again = [rng.randrange(VOCABULARY) if rng.random() < 0.02 else token for token in first]
    return (first + again * (steps // prompt + 1))[: prompt + steps]


def template(rng: random.Random, prompt: int, steps: int) -> list[int]:
    """Records of the same ten keys, of four tokens each, and values of their own."""
    keys = [zipf(rng, 4) for _ in range(10)]
    text: list[int] = []
    while len(text) < prompt + steps:
        for key in keys:
            text += [*key, *zipf(rng, rng.randint(1, 5))]
    return text[: prompt + steps]


def prose(rng: random.Random, prompt: int, steps: int) -> list[int]:
    """Tokens by frequency alone."""
    return zipf(rng, prompt + steps)


def loop(rng: random.Random, prompt: int, steps: int) -> list[int]:
    """One phrase of seven tokens, over and over."""
    return (zipf(rng, 7) * ((prompt + steps) // 7 + 1))[: prompt + steps]


KINDS: dict[str, Callable[[random.Random, int, int], list[int]]] = {
    "copy": copy,
    "template": template,
    "prose": prose,
    "loop": loop,
}


def batch(kind: str, sequences: int, prompt: int, steps: int) -> list[Replayed]:
    """Sequences of texts of one kind, each its own."""
    return [
        Replayed(i, KINDS[kind](random.Random(i), prompt, steps + BUDGET), prompt) for i in range(sequences)
    ]


# ------------------------------------------------------------------------------------------- timing


def advance(sequences: Sequence[Replayed]) -> None:
    """One token on each."""
    for sequence in sequences:
        sequence.token_ids.append(sequence.text[len(sequence.token_ids)])


def outputs_of(kind: str) -> PastOutputs:
    """What a tenant has been told before: texts of the same kind."""
    past = PastOutputs()
    for i in range(PAST_OUTPUTS):
        past.add("", KINDS[kind](random.Random(10_000 + i), 100, 200))
    return past


def drafters(kind: str) -> Iterator[tuple[str, Drafter]]:
    """Each drafter, fresh."""
    yield "ngram", NgramDrafter(Histories())
    yield "suffix", SuffixDrafter(Histories(), PastOutputs())
    yield "suffix and past", SuffixDrafter(Histories(), outputs_of(kind))


def propose(drafter: Drafter, sequences: list[Replayed], steps: int) -> dict[str, float]:
    """Microseconds of a sequence's step, and how much of what was proposed was right."""
    budgets = [BUDGET] * len(sequences)
    drafter.propose(sequences, budgets)  # takes the prompts on
    spent_s, drafted, right = 0.0, 0, 0
    for _ in range(steps):
        advance(sequences)
        began_s = time.process_time()
        trees = drafter.propose(sequences, budgets)
        spent_s += time.process_time() - began_s
        for sequence, tree in zip(sequences, trees, strict=True):
            drafted, right = drafted + len(tree), right + len(sequence.follow(tree))
    calls = steps * len(sequences)
    return {"us": 1e6 * spent_s / calls, "drafted": drafted / calls, "accepted": right / calls}


def decide(speculator: Speculator, sequences: list[Replayed], steps: int) -> dict[str, float]:
    """The same with the controller, of a machine on which rows cost a tenth of the first each."""
    cost = StepCost(len(sequences), len(sequences), 512, lambda rows: 1e-3 * (10 + rows))
    speculator.draft(sequences, cost)
    spent_s, drafted = 0.0, 0
    for _ in range(steps):
        advance(sequences)
        began_s = time.process_time()
        trees = speculator.draft(sequences, cost)
        spent_s += time.process_time() - began_s
        for sequence, tree in zip(sequences, trees, strict=True):
            if len(tree):
                nodes = sequence.follow(tree)
                began_s = time.process_time()
                speculator.verified(sequence, tree, nodes)
                spent_s += time.process_time() - began_s
                drafted += len(tree)
    calls = steps * len(sequences)
    return {"us": 1e6 * spent_s / calls, "drafted": drafted / calls}


def take_on(tokens: int) -> float:
    """Microseconds for each token of a prompt."""
    text = zipf(random.Random(0), tokens)
    began_s = time.process_time()
    TokenIndex(text)
    return 1e6 * (time.process_time() - began_s) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description="What drafting costs the CPU.")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prompt", type=int, default=1000, help="tokens of each sequence's prompt")
    args = parser.parse_args()
    report: dict[str, dict[str, dict[str, float]]] = {}
    for kind in KINDS:
        row = report[kind] = {}
        for name, drafter in drafters(kind):
            row[name] = propose(drafter, batch(kind, args.sequences, args.prompt, args.steps), args.steps)
        histories = Histories()
        both = (SuffixDrafter(histories, outputs_of(kind)), NgramDrafter(histories))
        speculator = Speculator(both, Controller())
        sequences = batch(kind, args.sequences, args.prompt, args.steps)
        row["auto, decided"] = decide(speculator, sequences, args.steps)
        for name, figures in row.items():
            told = ", ".join(f"{key} {value:.2f}" for key, value in figures.items())
            print(f"{kind:10} {name:16} {told}")
    print(json.dumps({**report, "prompt_us": {n: take_on(n) for n in (1000, 8000, 32000)}}))


if __name__ == "__main__":
    main()
