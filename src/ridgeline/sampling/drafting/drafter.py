"""What a drafter is, and what it sees of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ridgeline.sampling.drafting.tree import DraftTree
from ridgeline.types import SpeculationParams


class DraftedSequence(Protocol):
    """A sequence for which tokens may be guessed. `arrival` is its name; `token_ids` holds prompt and output
    and only grows, up to `limit` tokens. What was written for one `tenant` is never used for another.
    `speculation` says what its request wants, None: no draft. `forced` are the next tokens as far as the form
    of the answer leaves no choice, and that is known by now; None: it has no form."""

    @property
    def arrival(self) -> int: ...

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def prompt_length(self) -> int: ...

    @property
    def limit(self) -> int: ...

    @property
    def tenant(self) -> str: ...

    @property
    def speculation(self) -> SpeculationParams | None: ...

    @property
    def forced(self) -> Sequence[int] | None: ...


class Drafter(Protocol):
    """Guesses how sequences go on. One that runs a model does so for all of them at once."""

    @property
    def name(self) -> str: ...

    def propose(self, sequences: Sequence[DraftedSequence], budgets: Sequence[int]) -> list[DraftTree]:
        """A tree for each sequence, of at most its budget of nodes; empty where there is no guess."""
        ...

    def accepted(self, sequence: DraftedSequence, tree: DraftTree, nodes: Sequence[int]) -> None:
        """The target has followed these nodes of a tree, which may be a part of the one that was proposed.
        What the sequence has taken on, it has in its `token_ids` by the next `propose`."""
        ...

    def forget(self, sequence: DraftedSequence) -> None:
        """The sequence has ended, or will not be drafted for again."""
        ...
