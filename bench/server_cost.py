"""What the server itself costs: CPU time of its HTTP process per streamed token, memory of idle streams.

    python bench/server_cost.py --model model.gguf

`ridgeline serve` is two processes; the engine's, which runs the model, is not counted here. The CPU time is
that of a closed loop of streamed completions, all of it: prompts are tokenized in it and answers begun and
ended. Idle streams are measured in two states: `waiting` in the queue behind a long answer, and `begun`,
which have had tokens and whose engine was then suspended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from server_runs import Sizes, asking_of, closed_loop, leave_on_sigterm, running

from ridgeline.apps.load.client import Answer, ask
from ridgeline.apps.load.connections import Connections
from ridgeline.apps.load.dataset import Lengths, random_samples
from ridgeline.types import RidgelineError

WAIT_S = 300.0


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def cpu_per_token(command: Sequence[str], sizes: Sizes, rounds: int) -> dict[str, Any]:
    """CPU time of the HTTP process, per token that the clients received, those of the warm-up included."""
    per_token, tokens, clients_s = [], 0, 0.0
    with running(command) as (url, started):
        http = psutil.Process(started.pid)
        for number in range(rounds):
            before_s = cpu_s(http)
            run = asyncio.run(closed_loop(url, sizes, seed=number))
            used_s = cpu_s(http) - before_s
            failed = [answer for answer in run.answers if answer.cause is not None]
            if failed:
                raise SystemExit(
                    f"error: {len(failed)} requests failed: {failed[0].cause}: {failed[0].detail}"
                )
            tokens = sum(answer.output_tokens for answer in run.answers) + sizes.clients * sizes.output_tokens
            per_token.append(used_s / tokens * 1e6)
            clients_s = run.cpu_s
    return {
        "cpu_us_per_token": median(per_token),
        "cpu_us_per_token_of_rounds": per_token,
        "tokens_of_a_round": tokens,
        "client_cpu_us_per_token": clients_s / (sizes.requests * sizes.output_tokens) * 1e6,
    }


# ------------------------------------------------------------------------------------------ idle streams


def gauge(url: str, name: str) -> float:
    """A gauge of /metrics, summed over its labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"ridgeline_{name}"))


async def until_gauge(url: str, name: str, least: int, tasks: Sequence[asyncio.Task[Answer]]) -> None:
    """Wait until a gauge is at least so high. None of the streams may end meanwhile."""
    end_s = time.monotonic() + WAIT_S
    while await asyncio.to_thread(gauge, url, name) < least:
        check_open(tasks)
        if time.monotonic() > end_s:
            raise SystemExit(f"error: {name} does not reach {least} within {WAIT_S:.0f} s")
        await asyncio.sleep(0.5)


def check_open(tasks: Sequence[asyncio.Task[Answer]]) -> None:
    ended = [task.result() for task in tasks if task.done()]
    if ended:
        raise SystemExit(f"error: {len(ended)} streams ended early: {ended[0].cause}: {ended[0].detail}")


async def open_streams(url: str, count: int, begun: bool, http: psutil.Process) -> int:
    """RSS of the HTTP process, in bytes, by which `count` open streams that get nothing made it grow."""
    connections = Connections(url)
    asking = await asking_of(url, connections)
    samples = random_samples(Lengths(8, 400), seed=1)
    tasks: list[asyncio.Task[Answer]] = []
    try:
        if not begun:  # what keeps the engine busy with the only seat
            tasks.append(
                asyncio.create_task(ask(connections, asking, next(random_samples(Lengths(8, 4000), 0))))
            )
            await until_gauge(url, "num_requests_running", 1, tasks)
        before_bytes = http.memory_info().rss
        tasks += [asyncio.create_task(ask(connections, asking, next(samples))) for _ in range(count)]
        if begun:
            await until_gauge(url, "num_requests_running", count, tasks)
            (engine,) = http.children()
            engine.send_signal(signal.SIGSTOP)
        else:
            await until_gauge(url, "num_requests_waiting", count, tasks)
        await asyncio.sleep(2)
        after_bytes = http.memory_info().rss
        check_open(tasks)
        return int(after_bytes - before_bytes)
    finally:
        if begun:
            for engine in http.children():
                engine.send_signal(signal.SIGCONT)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await connections.close()


def idle_memory(command: Sequence[str], count: int, begun: bool) -> int:
    seats = ("--max-num-seqs", str(count if begun else 1), "--max-queue", str(2 * count))
    with running([*command, *seats, "--queue-timeout", "3600"]) as (url, started):
        return asyncio.run(open_streams(url, count, begun, psutil.Process(started.pid)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what ridgeline serve's HTTP process costs.")
    parser.add_argument("--model", required=True, help="a model that ridgeline serves")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=130)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=512, help="idle ones; 0 measures none")
    chosen = parser.parse_args()
    leave_on_sigterm()
    if not Path(chosen.model).exists():
        raise SystemExit(f"error: {chosen.model} does not exist; accepted: a model file or folder")
    command = [sys.executable, "-m", "ridgeline.cli.main", "serve", chosen.model]
    command += ["--threads", str(chosen.threads)]
    sizes = Sizes(chosen.clients, chosen.prompt_tokens, chosen.output_tokens, chosen.requests)
    try:
        result = {**vars(sizes), **cpu_per_token(command, sizes, chosen.rounds)}
        if chosen.streams:
            for state in ("waiting", "begun"):
                size_bytes = idle_memory(command, chosen.streams, state == "begun")
                result[f"{state}_streams"] = chosen.streams
                result[f"{state}_streams_bytes"] = size_bytes
    except RidgelineError as error:
        raise SystemExit(f"error: {error}") from None
    print(json.dumps(result))


if __name__ == "__main__":
    main()
