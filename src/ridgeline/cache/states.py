"""Slots of recurrent state: which sequence's is where, and which are kept for others to go on from.

A sequence uses the slot with the state behind its computed tokens. A state cannot be wound back, so whoever
is to go on from an earlier one needs it as it was: a *checkpoint* is a slot that the prefix tree keeps at the
end of a page of tokens. Nothing is copied for it. A step reads a state from one slot and writes it to the
same one, but at the end of a page to another: to snapshot a state is to leave it where it is, and to restore
one is to read it, as many sequences at once as begin with it.

Checkpoints are as many as there are slots that no sequence uses; the pool evicts the one that has been used
least recently. A sequence uses two slots at most, and only while a step of its is planned, so with two for
each sequence that runs there is always one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ridgeline.cache.pages import PagePool
from ridgeline.cache.table import SequencePages
from ridgeline.config import PAGE_TOKENS
from ridgeline.types import NO_STATE


class StateSlots:
    """The slots 0 … slots−1. With `checkpoints`, the prefix tree keeps some of them.

    `SequencePages.states` has the slots that a sequence uses, by the tokens behind which the state in them
    is, or will be once the planned step has run; `planned` what that step reads and writes.
    """

    def __init__(self, slots: int, checkpoints: bool) -> None:
        if slots < 2:
            raise ValueError(f"state slots are {slots}; accepted: at least 2, as many as one sequence needs")
        self.pool = PagePool(slots)
        self._checkpoints = checkpoints

    @property
    def max_sequences(self) -> int:
        """So many may run at once."""
        return self.pool.pages // 2

    def plan(self, pages: SequencePages, computed: int, end: int) -> None:
        """Choose the slots for a step that runs a sequence's rows from `computed` to `end`."""
        self._keep_only(pages, computed)  # a plan that was dropped may have taken another
        read = pages.states.get(computed, NO_STATE)
        written = read
        # What is at the end of a page others go on from, or may, as soon as all tokens before it are known.
        if read == NO_STATE or (self._checkpoints and computed % PAGE_TOKENS == 0):
            (written,) = self.pool.allocate(1)
            pages.states[end] = written
        pages.planned = (read, written)

    def launch(self, pages: SequencePages, before: int, computed: int) -> None:
        """The planned step is launched. The state that it went on from is there, where it wrote to another
        slot, until `settle`."""
        assert pages.planned is not None
        read, written = pages.planned
        if read == written:
            del pages.states[before]
        pages.states[computed] = written
        pages.planned = None

    def settle(self, pages: SequencePages, computed: int) -> None:
        """Stop using the state that the last step went on from."""
        self._keep_only(pages, computed)

    def restore(self, pages: SequencePages, tokens: int, slot: int) -> None:
        """Let a sequence go on from a checkpoint behind so many tokens."""
        self.pool.share([slot])
        self.drop(pages)
        pages.states[tokens] = slot

    def take_in(self, pages: SequencePages, tokens: int) -> int:
        """Let a sequence go on from a state behind so many tokens that is about to be filled in; its slot."""
        self.drop(pages)
        (slot,) = self.pool.allocate(1)
        pages.states[tokens] = slot
        return slot

    def drop(self, pages: SequencePages) -> None:
        """A sequence has no state any more."""
        pages.planned = None
        self._keep_only(pages, None)

    def _keep_only(self, pages: SequencePages, tokens: int | None) -> None:
        for other in [each for each in pages.states if each != tokens]:
            self.pool.free([pages.states.pop(other)])

    def check_integrity(self, sequences: Iterable[SequencePages]) -> None:
        """Raise AssertionError unless every slot counts exactly its users among `sequences`, and is one's own
        amid a page."""
        self.pool.check_integrity()
        users: Counter[int] = Counter()
        for pages in sequences:
            users.update(pages.states.values())
            amid = [slot for tokens, slot in pages.states.items() if tokens % PAGE_TOKENS]
            own = all(self.pool.users(slot) == 1 and not self.pool.is_kept(slot) for slot in amid)
            assert own, "a state that is written over is needed by others"
        for slot, count in users.items():
            seen = self.pool.users(slot)
            assert seen == count, f"a state has {count} users and counts {seen}"
        assert len(users) == self.pool.used_pages, "a state in use is nobody's"
