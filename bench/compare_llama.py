"""Compare Ridgeline with llama.cpp on one GGUF file: prefill, and decode at batch 1.

    python bench/compare_llama.py --model model.gguf --llama-python /path/to/venv/bin/python

Each side is a process of its own, run by the Python that has it installed, which loads the model once and
then waits. Rounds alternate between the sides, so that both see the same drift of the machine; a figure is
the median of its rounds, a ratio the median of the rounds' ratios; beside it stands the ratio of each
side's best round, which other work on the machine disturbs least. Both sides take the likeliest token of
each step, with the same number of threads. A side that is not installed is named as absent.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

FIGURES = ("prefill_tokens_per_s", "decode_tokens_per_s")


@dataclass(frozen=True)
class Settings:
    model: str
    threads: int
    prompt_tokens: int
    output_tokens: int


# ------------------------------------------------------------------------------- the sides' processes


def drive_ridgeline(settings: Settings) -> Callable[[], dict[str, float]]:
    """Load the model into our engine; the function runs one round and measures the bandwidth around it."""
    from ridgeline.apps.benchmark import Workload, measure
    from ridgeline.config import EngineConfig
    from ridgeline.loading import load_engine
    from ridgeline.resources.probe import read_bandwidth

    loaded = load_engine(EngineConfig(model=settings.model, threads=settings.threads))
    workload = Workload(settings.prompt_tokens, settings.output_tokens, batch=1)

    def run() -> dict[str, float]:
        (done,) = measure(loaded.engine, workload, loaded.config.max_num_batched_tokens, repeats=1)
        return {
            "prefill_tokens_per_s": done.prefill.tokens_per_s,
            "decode_tokens_per_s": done.decode.tokens_per_s,
            "read_bytes_per_s": max(read_bandwidth(settings.threads).values()),
        }

    return run


def drive_llama(settings: Settings) -> Callable[[], dict[str, float]]:
    """Load the model through llama-cpp-python's bindings of llama.cpp's own functions."""
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        settings.model.encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise SystemExit(f"llama.cpp does not load {settings.model}")
    wanted = llama_cpp.llama_context_default_params()
    wanted.n_ctx = settings.prompt_tokens + settings.output_tokens + 64
    wanted.n_batch = wanted.n_ubatch = max(settings.prompt_tokens, 32)
    wanted.n_threads = wanted.n_threads_batch = settings.threads
    context = llama_cpp.llama_init_from_model(model, wanted)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    draw = random.Random(0)
    prompt = [draw.randrange(vocabulary) for _ in range(settings.prompt_tokens)]

    def decode(tokens: list[int]) -> int:
        held = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(held, len(tokens))):
            raise SystemExit("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        return int(
            np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (vocabulary,)).argmax()
        )

    def once(steps: int) -> tuple[float, float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        start = time.perf_counter()
        token = decode(prompt)
        middle = time.perf_counter()
        for _ in range(steps):
            token = decode([token])
        return middle - start, time.perf_counter() - middle

    def run() -> dict[str, float]:
        once(2)
        steps = settings.output_tokens - 1
        prefill_s, decode_s = once(steps)
        return {
            "prefill_tokens_per_s": settings.prompt_tokens / prefill_s,
            "decode_tokens_per_s": steps / decode_s,
        }

    return run


DRIVERS = {"ridgeline": drive_ridgeline, "llama.cpp": drive_llama}


def serve(side: str, settings: Settings) -> None:
    """Answer each line on standard input with one round's figures; the first line out says that it loaded."""
    try:
        run = DRIVERS[side](settings)
    except ImportError as error:
        print(json.dumps({"absent": str(error)}), flush=True)
        return
    print("{}", flush=True)
    for _ in sys.stdin:
        print(json.dumps(run()), flush=True)


# ----------------------------------------------------------------------------------- the comparison


class Side:
    """One process that waits to run rounds."""

    def __init__(self, name: str, python: str, settings: Settings) -> None:
        self.name = name
        self.rounds: list[dict[str, float]] = []
        self.absent: str | None = None
        self._process: subprocess.Popen[str] | None = None
        fields = [f"--{key.replace('_', '-')}={value}" for key, value in vars(settings).items()]
        command = [python, str(Path(__file__).resolve()), "--drive", name, *fields]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
            )
        except OSError as error:
            self.absent = f"{python}: {error.strerror}"
            return
        self.absent = self._read().get("absent")

    def run(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.rounds.append(self._read())

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._said.seek(0)
            said = self._said.read().strip().splitlines()
            raise SystemExit(f"error: {self.name} stopped: {said[-1] if said else 'no message'}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def compare(ours: Side, theirs: Side, rounds: int) -> dict[str, Any]:
    """Alternate the rounds; medians, and where both sides are there the ratios and their spread."""
    present = [side for side in (ours, theirs) if side.absent is None]
    for _ in range(rounds):
        for side in present:
            side.run()
    result: dict[str, Any] = {"absent": {s.name: s.absent for s in (ours, theirs) if s.absent is not None}}
    for side in present:
        result[side.name] = {key: median(r[key] for r in side.rounds) for key in side.rounds[0]}
    if len(present) == 2:
        for key in FIGURES:
            ratios = sorted(a[key] / b[key] for a, b in zip(ours.rounds, theirs.rounds, strict=True))
            result[f"{key.removesuffix('_tokens_per_s')}_ratio"] = {
                "median": median(ratios),
                "least": ratios[0],
                "most": ratios[-1],
                "of_best_rounds": max(r[key] for r in ours.rounds) / max(r[key] for r in theirs.rounds),
            }
    return result


def show(result: dict[str, Any], ours: Side, theirs: Side) -> None:
    print(f"{'tokens/s':<12}{'prefill':>10}{'decode':>10}")
    for side in (ours, theirs):
        if side.absent is not None:
            print(f"{side.name:<12}absent: {side.absent}")
            continue
        figures = [f"{result[side.name][key]:>10.1f}" for key in FIGURES]
        print(f"{side.name:<12}{''.join(figures)}")
    for phase in ("prefill", "decode"):
        ratio = result.get(f"{phase}_ratio")
        if ratio:
            spread = f"{ratio['least']:.2f} to {ratio['most']:.2f}; best rounds {ratio['of_best_rounds']:.2f}"
            print(f"{phase}: {ratio['median']:.2f} times llama.cpp ({spread})")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare Ridgeline with llama.cpp on one GGUF file.")
    parser.add_argument("--model", required=True, help="the GGUF file that both load")
    parser.add_argument("--llama-python", default=sys.executable, help="a Python with llama-cpp-python")
    parser.add_argument("--ridgeline-python", default=sys.executable, help="a Python with ridgeline")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--drive", choices=sorted(DRIVERS), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    settings = Settings(chosen.model, chosen.threads, chosen.prompt_tokens, chosen.output_tokens)
    if chosen.drive:
        serve(chosen.drive, settings)
        return
    if not Path(chosen.model).is_file():
        raise SystemExit(f"error: {chosen.model} is not a file; accepted: a GGUF that both sides read")
    ours = Side("ridgeline", chosen.ridgeline_python, settings)
    theirs = Side("llama.cpp", chosen.llama_python, settings)
    result = compare(ours, theirs, chosen.rounds)
    for side in (ours, theirs):
        side.close()
    show(result, ours, theirs)
    print(json.dumps({**vars(settings), "rounds": chosen.rounds, **result}))


if __name__ == "__main__":
    main()
