"""What users will see: the time to their first token, the time between tokens, and all of their throughput.

The picture is a steady one: `users` sequences are under way at all times, and whoever is done is followed by
another at once. A step decodes a token of each of them, beside a part of the prompt that has come last.
"""

from __future__ import annotations

from dataclasses import dataclass

from ridgeline.apps.plan.host import Host
from ridgeline.apps.plan.ledger import step_tokens
from ridgeline.apps.plan.model import FormattedModel
from ridgeline.apps.plan.steps import StepTime, load_of, prompt_loads, step_time
from ridgeline.types import ConfigError

MOST_TOKENS = 1 << 30
MOST_USERS = 4096


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of `prompt` and `output` tokens from `users` at once, and what they want at most; None is no
    target. Raises ConfigError for what cannot be."""

    prompt: int = 512
    output: int = 128
    users: int = 1
    ttft_s: float | None = None
    itl_s: float | None = None

    def __post_init__(self) -> None:
        for name, most in (("prompt", MOST_TOKENS), ("output", MOST_TOKENS), ("users", MOST_USERS)):
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise ConfigError(f"{name} is {value}; accepted: 1 to {most}")
        for name, target in (("ttft", self.ttft_s), ("itl", self.itl_s)):
            if target is not None and not 0 < target < 1e6:
                raise ConfigError(f"{name} is {target * 1e3:g} ms; accepted: more than 0, less than 1e9")

    @property
    def tokens(self) -> int:
        """How long a sequence becomes."""
        return self.prompt + self.output


@dataclass(frozen=True, slots=True)
class Time:
    """The least that the roofline allows, and what to expect."""

    least_s: float
    expected_s: float


@dataclass(frozen=True, slots=True)
class Rate:
    """The most that the roofline allows, and what to expect."""

    most_per_s: float
    expected_per_s: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """`ttft` is of a prompt that comes while all other users decode; `itl` between two tokens when no prompt
    is read, `itl_prefill` when one is. `throughput` counts the output tokens of all users while prompts are
    read too; `decode` those of steps that read none. Energy and money are of an output token at the expected
    throughput."""

    users: int
    ttft: Time
    itl: Time
    itl_prefill: Time
    throughput: Rate
    decode: Rate
    decode_step: StepTime
    prefill_step: StepTime
    joules_per_token: float | None
    usd_per_million_tokens: float | None

    def meets(self, workload: Workload) -> bool:
        """Whether what is expected is within the targets."""
        first = workload.ttft_s is None or self.ttft.expected_s <= workload.ttft_s
        return first and (workload.itl_s is None or self.itl.expected_s <= workload.itl_s)


def forecast(model: FormattedModel, host: Host, workload: Workload, users: int | None = None) -> Forecast:
    """What `users`, by default the workload's, will see."""
    users = users or workload.users
    one, decode = (step_time(model, load_of(model, 1, _decoded_at(workload), n), host) for n in (1, users))
    alone, beside = _prefill(model, host, workload, 1), _prefill(model, host, workload, users)
    least_s, round_s = _round(alone, one, decode, workload, users)
    made = users * workload.output
    joules, usd = host.joules(round_s), host.usd(round_s)
    return Forecast(
        users=users,
        ttft=Time(sum(step.bound_s for step in beside), sum(step.expected_s for step in beside)),
        itl=Time(decode.bound_s, decode.expected_s),
        itl_prefill=Time(max(s.bound_s for s in beside), max(s.expected_s for s in beside)),
        throughput=Rate(made / least_s, made / round_s),
        decode=Rate(users / decode.bound_s, users / decode.expected_s),
        decode_step=decode,
        prefill_step=max(alone, key=lambda step: step.expected_s),
        joules_per_token=None if joules is None else joules / made,
        usd_per_million_tokens=None if usd is None else usd / made * 1e6,
    )


def _decoded_at(workload: Workload) -> int:
    """The mean length of a sequence while it is decoded."""
    return workload.prompt + (workload.output + 1) // 2


def _prefill(model: FormattedModel, host: Host, workload: Workload, users: int) -> list[StepTime]:
    """The steps that read one prompt while all other users decode."""
    most = step_tokens(users) - (users - 1)
    others = load_of(model, 1, _decoded_at(workload), users - 1)
    loads = prompt_loads(model, workload.prompt, most)
    return [step_time(model, load + others, host) for load in loads]


def _round(
    alone: list[StepTime], one: StepTime, decode: StepTime, workload: Workload, users: int
) -> tuple[float, float]:
    """Seconds in which every user has one request answered: the least, and those to expect.

    Where decodes ride along with a prompt they find its weights read already. For the least time every read
    for prompts is hidden like that, but nobody's tokens come faster than if he were alone; expected are
    prompts that are read on their own. `one` is a decode step of a single user.
    """
    steps = workload.output - 1  # the first token comes from the prompt's last step
    arithmetic = users * sum(step.arithmetic_s for step in alone) + steps * decode.arithmetic_s
    together_s = max(arithmetic, steps * decode.memory_s) + steps * decode.overhead_s
    alone_s = sum(step.bound_s for step in alone) + steps * one.bound_s
    expected = users * sum(step.expected_s for step in alone) + steps * decode.expected_s
    return max(together_s, alone_s), expected
