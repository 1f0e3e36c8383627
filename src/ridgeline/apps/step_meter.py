"""Time chosen steps of an engine: decodes of any batch at any context, and whole prompts.

A long context is not computed for it. Pages are taken from the engine's prefix cache, filled with copies of
one that was computed, and kept there as what random prompts have left behind. Sequences that begin with these
prompts find them, and run as they would behind any other keys and values.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from ridgeline.cache.radix import Scope
from ridgeline.config import PAGE_TOKENS
from ridgeline.engine import Engine
from ridgeline.resources.ceilings import Ceilings
from ridgeline.types import CapacityError, PageCopy, Request, SamplingParams

_SALT = "kept"
_CHUNK = 512
_MOST_STEPS = 16
_WHOLE = 0.85
"""Of the best arithmetic peak seen: below it other work took some."""
_WRITTEN = 0
"""The page that the first sequence of all wrote to, in every pool."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Steps to time: decodes of `batch` sequences at `context` tokens, or the reading of one prompt of
    `context` tokens where `batch` is 0."""

    batch: int
    context: int

    @property
    def name(self) -> str:
        if self.batch:
            return f"decode, batch {self.batch}, context {self.context}"
        return f"prefill {self.context}"

    @property
    def kept_tokens(self) -> int:
        """Tokens of the prompt that are found computed."""
        return max((self.context - 1) // PAGE_TOKENS - 1, 0) * PAGE_TOKENS if self.batch else 0


@dataclass(frozen=True, slots=True)
class Turn:
    """A cell that was timed, and the ceilings measured right before and after it."""

    cell: Cell
    seconds: float
    before: Ceilings
    after: Ceilings

    @property
    def peaks(self) -> tuple[float, float]:
        """Of the fp32 arithmetic, which every machine has, before and after."""
        return self.before.fp32_flops_per_s, self.after.fp32_flops_per_s


def undisturbed(turns: Sequence[Turn]) -> list[Turn]:
    """Those of a machine that had all of its arithmetic before and after; of cells without such a turn, all.

    Steps wait for the slowest thread and ceilings are the best of many samples, so that a prediction for a
    disturbed machine is too fast. Bandwidth says nothing: it may change with where the system puts threads.
    """
    whole = _whole(turns)
    rest = {turn.cell for turn in turns} - {turn.cell for turn in whole}
    return whole + [turn for turn in turns if turn.cell in rest]


def _whole(turns: Sequence[Turn]) -> list[Turn]:
    best = max((max(turn.peaks) for turn in turns), default=0.0)
    return [turn for turn in turns if min(turn.peaks) >= _WHOLE * best]


class StepMeter:
    """Drives an engine that is idle, and idle again after every call. The engine keeps prefixes."""

    def __init__(self, engine: Engine, max_step_tokens: int) -> None:
        self._engine, self._most = engine, max_step_tokens
        self._ids = map("meter {}".format, itertools.count())
        self._random = np.random.default_rng(0)
        self._prompts: list[tuple[int, ...]] = []

    def fits(self, cell: Cell) -> bool:
        """Whether the context and the pools hold the cell."""
        if cell.context + 2 * PAGE_TOKENS > self._engine.model.max_model_len:
            return False
        pools = self._engine.scheduler.cache.pools
        pages = max(cell.batch, 1) * -(-cell.context // PAGE_TOKENS)
        return all(pool.pages >= pages for pool in pools)

    def warm(self) -> None:
        """Run the largest step, which touches every buffer."""
        self.seconds(Cell(0, min(self._most, self._engine.model.max_model_len - 1)))

    def keep(self, cells: Sequence[Cell]) -> None:
        """Fill the contexts of all cells; after `warm`. Raises CapacityError when the pools are too small."""
        batch = max((cell.batch for cell in cells), default=0)
        kept = [max(cell.kept_tokens for cell in cells if cell.batch > one) for one in range(batch)]
        self._prompts = [self._tokens(tokens + 2 * PAGE_TOKENS) for tokens in kept]
        for prompt, tokens in zip(self._prompts, kept, strict=True):
            self._keep(prompt, tokens)

    @property
    def pages(self) -> tuple[int, ...]:
        """Pages of each memory group that hold something."""
        return tuple(pool.used_pages + pool.evictable_pages for pool in self._engine.scheduler.cache.pools)

    def seconds(self, cell: Cell, steps: int = 1, settle_s: float = 0.0) -> float:
        """Wall time of the median of `steps` decodes, the middle one of which has the cell's context; or of
        the whole prompt. Decodes are run again until `settle_s` have gone by, and the last count."""
        if not cell.batch:
            return self._prefill(cell)
        end_s = time.perf_counter() + settle_s
        found_s = self._decode(cell, steps)
        while time.perf_counter() < end_s:
            found_s = self._decode(cell, steps)
        return found_s

    def turns(
        self, cells: Sequence[Cell], rounds: int, cell_s: float, ceilings_now: Callable[[], Ceilings]
    ) -> list[Turn]:
        """Time all cells in turns, `rounds` times, about `cell_s` seconds each; in between the ceilings.

        Measuring these empties the caches, and a last-level cache takes ten to thirty steps until it holds
        what it can of weights, keys and values: so decodes run for twice as long, and the last are timed.

        Cells that were timed while other work had taken arithmetic from the machine are timed again, in at
        most as many rounds more. `undisturbed` says which of the turns count.
        """
        steps = {cell: self._steps(self.seconds(cell), cell_s) for cell in cells}
        found: list[Turn] = []
        before = ceilings_now()
        for number in range(2 * rounds):
            counting = Counter(turn.cell for turn in _whole(found))
            for cell in [cell for cell in cells if number < rounds or counting[cell] < rounds]:
                seconds = self.seconds(cell, steps[cell], 2 * cell_s)
                steps[cell] = self._steps(seconds, cell_s)
                after = ceilings_now()
                found.append(Turn(cell, seconds, before, after))
                before = after
        return found

    @staticmethod
    def _steps(seconds: float, cell_s: float) -> int:
        return min(max(int(cell_s / seconds), 3), _MOST_STEPS)

    def _prefill(self, cell: Cell) -> float:
        name = self._add(self._tokens(cell.context), 1, salt=next(self._ids))
        start_s = time.perf_counter()
        while self._engine.has_work:
            self._engine.step()
        elapsed_s = time.perf_counter() - start_s
        self._engine.abort(name)
        return elapsed_s

    def _decode(self, cell: Cell, steps: int) -> float:
        """A step that is launched before the one before it is done, as on a GPU, counts where it is taken
        in: in a row of like steps that makes no difference."""
        engine = self._engine
        prompt = max(cell.context - steps // 2 - 1, cell.kept_tokens + 1)
        names = [self._add(tokens[:prompt], 2 * PAGE_TOKENS, _SALT) for tokens in self._prompts[: cell.batch]]
        taken: list[float] = []
        try:
            while len(taken) < steps:
                if not engine.has_work:
                    raise CapacityError(f"the KV cache does not hold {cell.name}; accepted: a larger one")
                before = engine.stats.decode.rows
                start_s = time.perf_counter()
                engine.step()
                step_s = time.perf_counter() - start_s
                # The first steps read what of the prompts was not kept.
                if engine.stats.decode.rows - before == cell.batch and self._decoding(names):
                    taken.append(step_s)
        finally:
            for name in names:
                engine.abort(name)
        return median(taken)  # a step that the system interrupted says nothing of the others

    def _decoding(self, names: Sequence[str]) -> bool:
        running = self._engine.scheduler.running
        return len(running) == len(names) and all(one.generated > 1 for one in running)

    def _add(self, tokens: tuple[int, ...], output: int, salt: str) -> str:
        name = next(self._ids)
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, speculation=False)
        self._engine.add(Request(name, tokens, params, salt), stream=False)
        return name

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._random.integers(0, self._engine.model.vocabulary_size, count).tolist())

    def _keep(self, prompt: tuple[int, ...], tokens: int) -> None:
        """Let the prefix cache have the first tokens of a prompt, in copies of a page that was written."""
        cache, executor = self._engine.scheduler.cache, self._engine.executor
        pages = cache.new_sequence(Scope(salt=_SALT))
        try:
            cache.restore(pages, prompt, 0, tokens)
            for end in range(_CHUNK, tokens + _CHUNK, _CHUNK):
                end = min(end, tokens)
                begin = pages.length
                if not cache.grow(pages, end):
                    raise CapacityError(f"the KV cache does not hold {tokens} tokens; accepted: a larger one")
                fresh = [(g, page) for g, table in enumerate(pages.tables) for page in table[begin:]]
                executor.transfer([PageCopy(group, _WRITTEN, page) for group, page in fresh])
                cache.store(pages, prompt, end)
                cache.trim(pages, end)
        finally:
            cache.release(pages)
