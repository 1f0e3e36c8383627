"""The figures of an answer: how many tokens, how fast, and which share of the memory bandwidth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ridgeline.resources.roofline import mbu
from ridgeline.types import RequestOutput, RidgelineError, Work

if TYPE_CHECKING:
    from ridgeline.resources.ceilings import Ceilings


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one answer. `decode_s` runs from the first token to the last; `decode_work` was done meanwhile."""

    prompt_tokens: int
    output_tokens: int
    first_token_s: float
    decode_s: float
    decode_work: Work

    @classmethod
    def of(cls, output: RequestOutput, before: Work, after: Work) -> Figures:
        """From a finished request that ran alone, and the engine's total decode work around it."""
        times = output.metrics
        first = times.first_token_s or times.arrived_s
        return cls(
            prompt_tokens=len(output.prompt_token_ids),
            output_tokens=len(output.outputs[0].token_ids),
            first_token_s=first - times.arrived_s,
            decode_s=(times.finished_s or first) - first,
            decode_work=after - before,
        )

    @property
    def tokens_per_s(self) -> float | None:
        """Speed of the tokens after the first; None where there was no second."""
        return (
            (self.output_tokens - 1) / self.decode_s if self.output_tokens > 1 and self.decode_s > 0 else None
        )

    def line(self, ceilings: Ceilings | None) -> str:
        parts = [
            f"{self.prompt_tokens} prompt + {self.output_tokens} output tokens",
            f"first token {self.first_token_s:.2f} s",
        ]
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:.1f} tokens/s")
            if ceilings is not None and self.decode_work.bytes:
                share = mbu(self.decode_work, self.decode_s, ceilings)
                limit = ceilings.read_bytes_per_s / 1e9
                parts.append(f"{share:.0%} of the memory bandwidth ({limit:.1f} GB/s)")
        return " · ".join(parts)


def known_ceilings(threads: int | None, measure: bool = False, device: str = "cpu") -> Ceilings | None:
    """The ceilings of an engine's device for a figure beside an answer, None where they cannot be had.

    With `measure`, a device that is not known yet is measured quickly, once: in about a second, a GPU in
    some seconds.
    """
    from ridgeline.resources import probe

    try:
        if measure:
            return probe.quick_ceilings(threads, device=device)
        return probe.known_ceilings(threads, device=device)
    except RidgelineError:
        return None  # an answer is worth more than a figure


def limits(ceilings: Ceilings) -> str:
    """The ceilings in one line: 24.5 GB/s read, 917 Gop/s int8 (2 threads, avx512_vnni)."""
    shown = [f"{ceilings.read_bytes_per_s / 1e9:.1f} GB/s read"]
    shown += (f"{peak} {name}" for name, peak in peaks(ceilings).items())
    return f"{', '.join(shown)} ({ceilings.threads} {parallel_units(ceilings)}, {ceilings.isa})"


def rate(per_s: float, unit: str) -> str:
    """Arithmetic per second for people: 917 Gop/s, 788.1 Tflop/s."""
    return f"{per_s / 1e12:.1f} T{unit}/s" if per_s >= 1e13 else f"{per_s / 1e9:.0f} G{unit}/s"


def peaks(ceilings: Ceilings) -> dict[str, str]:
    """The arithmetic peaks by format, of which the hardware may lack some."""
    rates = {
        "int8": (ceilings.int8_ops_per_s, "op"),
        "fp8": (ceilings.fp8_flops_per_s, "flop"),
        "bf16": (ceilings.bf16_flops_per_s, "flop"),
        "fp32": (ceilings.fp32_flops_per_s, "flop"),
    }
    return {name: rate(per_s, unit) for name, (per_s, unit) in rates.items() if per_s > 0}


def parallel_units(ceilings: Ceilings) -> str:
    """What `Ceilings.threads` counts on this device."""
    return "multiprocessors" if ceilings.device == "cuda" else "threads"
