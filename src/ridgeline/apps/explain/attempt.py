"""Try what was suggested, in turns with the settings as they are: the gain beside the predicted one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

from ridgeline.apps.benchmark import Phase, Round, Workload, measure
from ridgeline.apps.calibrate import fitted_costs
from ridgeline.apps.explain.answer import Explanation
from ridgeline.apps.explain.gains import Gains
from ridgeline.apps.explain.suggest import Suggestion
from ridgeline.apps.explain.texts import answer_texts
from ridgeline.apps.load.dataset import Sample
from ridgeline.apps.operations import Run, bench_room
from ridgeline.config import EngineConfig
from ridgeline.loading import LoadedModel, load_engine
from ridgeline.precision.formats import FORMATS
from ridgeline.records import StepRecord
from ridgeline.resources import probe
from ridgeline.resources.step_costs import load_costs
from ridgeline.types import ConfigError, Work


@dataclass(frozen=True, slots=True)
class Attempt:
    """A suggestion that was tried: the medians of the gains of `rounds` pairs, and the least and the most
    that a whole run gained."""

    suggestion: Suggestion
    measured: Gains
    between: tuple[float, float]
    rounds: int

    @property
    def error(self) -> float:
        """How much the predicted gain is above the measured one, as a share of it."""
        return self.suggestion.gains.run / self.measured.run - 1


def explained_by_fits(run: Run, explain: Callable[[], Explanation]) -> Explanation:
    """An explanation whose first suggestion compares formats that were both fitted on this machine: costs
    fitted for one and assumed for the other make no ratio. Fitting takes half a minute a format."""
    threads, device = run.config.threads, run.config.device
    now = partial(probe.measure, threads, seconds=probe.QUICK_PROBE_S, device=device)
    config = EngineConfig(device=device, threads=threads)
    found = explain()
    for _ in FORMATS:  # fits may bring another suggestion to the front
        first = found.suggestions[0].changes if found.suggestions else {}
        compared = {found.model.main_format, first.get("weights", found.model.main_format)}
        missing = [one for one in sorted(compared) if load_costs(run.ceilings, one) is None]
        if not missing:
            break
        for name in missing:
            fitted_costs(config, name, now)
        found = explain()
    return found


def attempt(
    suggestion: Suggestion,
    asked: EngineConfig,
    workload: Workload,
    rounds: int,
    samples: Sequence[Sample] = (),
) -> Attempt:
    """Load the model as it was `asked` for and as suggested, and run the workload on both in turns; to try
    guesses, answer the `samples`.

    Raises ConfigError where the suggestion is another machine, and as loading and `benchmark.measure` do.
    """
    if not suggestion.changes:
        raise ConfigError(
            f"{suggestion.text}, which cannot be tried here; accepted: a change of this machine's"
        )
    changes = dict(suggestion.changes)
    batch = changes.pop("batch", workload.batch)
    changed = replace(asked, **changes, **bench_room(batch))
    with ExitStack() as stack:
        cases = []
        for config, work in ((asked, workload), (changed, replace(workload, batch=batch))):
            loaded = load_engine(config)
            stack.callback(loaded.engine.close)
            cases.append((loaded, work))
        if suggestion.kind == "speculation":
            pairs = [[_answers(*case, samples, number) for case in cases] for number in range(rounds)]
        else:
            pairs = [[_round(*case) for case in cases] for _ in range(rounds)]
    gains = [_gains(now, then, batch / workload.batch) for now, then in pairs]
    whole = [one.run for one in gains]
    middle = Gains(median(whole), median(one.prefill for one in gains), median(one.decode for one in gains))
    return Attempt(suggestion, middle, (min(whole), max(whole)), rounds)


def _round(loaded: LoadedModel, workload: Workload) -> Round:
    return measure(loaded.engine, workload, loaded.config.max_num_batched_tokens, 1)[0]


def _answers(loaded: LoadedModel, workload: Workload, samples: Sequence[Sample], number: int) -> Round:
    """A round that answers texts; what was said in others is not looked up."""
    done = answer_texts(loaded, samples, workload.batch, workload.output_tokens, f"round {number}")
    decodes = [step for step in done.steps if step.kind == "decode"]
    others = [step for step in done.steps if step.kind != "decode"]
    return Round(_phase(others), _phase(decodes))


def _phase(steps: Sequence[StepRecord]) -> Phase:
    tokens = sum(step.prompt_tokens + step.decoded_tokens for step in steps)
    elapsed_s, executor_s = (sum(getattr(step, name) for step in steps) for name in ("wall_s", "elapsed_s"))
    return Phase(tokens, len(steps), elapsed_s, executor_s, Work())


def _gains(now: Round, then: Round, more: float) -> Gains:
    """`more` is by how many times there are more sequences then."""
    return Gains(
        more
        * (now.prefill.elapsed_s + now.decode.elapsed_s)
        / (then.prefill.elapsed_s + then.decode.elapsed_s),
        more * now.prefill.elapsed_s / then.prefill.elapsed_s,
        more * now.decode.elapsed_s / then.decode.elapsed_s,
    )
