"""What the form of an answer leaves no choice about: long keys, brackets, the rest of an enumeration."""

from __future__ import annotations

from collections.abc import Sequence

from ridgeline.sampling.drafting.drafter import DraftedSequence
from ridgeline.sampling.drafting.tree import NO_DRAFT, DraftTree
from ridgeline.types import MAX_DRAFT_TOKENS


class GrammarDrafter:
    """Guesses the tokens that a sequence's form permits alone. They cannot be wrong: the mask of each has one
    token. It is still the target that says them, so that log-probabilities are there."""

    name = "grammar"

    def propose(self, sequences: Sequence[DraftedSequence], budgets: Sequence[int]) -> list[DraftTree]:
        """As `Drafter` says."""
        return [self._propose(*each) for each in zip(sequences, budgets, strict=True)]

    def _propose(self, sequence: DraftedSequence, budget: int) -> DraftTree:
        forced = (sequence.forced or ())[:budget]
        # By the longest match there is: nothing is as certain.
        return DraftTree.chain(forced, 1.0, self.name, MAX_DRAFT_TOKENS) if forced else NO_DRAFT

    def accepted(self, sequence: DraftedSequence, tree: DraftTree, nodes: Sequence[int]) -> None:
        """Nothing to note: the form has taken them in."""

    def forget(self, sequence: DraftedSequence) -> None:
        """Nothing is known of it."""
