"""A server under mixed load for an hour, with kills: `python -m faults.soak --minutes 60 [--model PATH]`.

In the first half the engine process is killed or stopped every minute or so; in the second it lives, so that
its own memory has a slope. Clients come and go all the time. Every few minutes the load pauses, and the
house must be as it was in the beginning. Exit code 1 when it was not, or when a criterion fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import httpx
import psutil

from faults.clients import CLIENTS, RUDE, Client, World, asker, bore
from faults.house import Belongings, House
from faults.soak_report import Plan, Report, Sample

LIMIT_S = 120.0
"""No client may take longer, whatever happens to it: requests wait for 20 s at most, sloths read for 45."""
SERVE = ("--max-num-seqs", 8, "--max-queue", 24, "--queue-timeout", 20)


def _count(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1


class Soak:
    """One run of a plan against a house."""

    def __init__(self, house: House, plan: Plan) -> None:
        self.house = house
        self.report = Report(plan)
        self._plan = plan
        self._server = psutil.Process(house.server.process.pid)
        self._visits: dict[asyncio.Task[None], Client] = {}
        self._may_come = asyncio.Event()
        self._awake = asyncio.Lock()
        self._began_s = 0.0

    @property
    def _minute(self) -> float:
        return (time.monotonic() - self._began_s) / 60

    async def run(self) -> Report:
        plan, house = self._plan, self.house
        with house.web() as web:
            context = web.get("/v1/models").json()["data"][0]["max_model_len"]
        self._world = World(house.url, context, plan.sloth_s, _http(house.url))
        await self._learn()
        self._began_s = time.monotonic()
        tasks = [asyncio.create_task(self._come(Random(f"{plan.seed} {n}"))) for n in range(plan.clients)]
        tasks.append(asyncio.create_task(self._sample()))
        tasks.append(asyncio.create_task(self._harm(Random(plan.seed))))
        while self._minute < plan.minutes:
            self._may_come.set()
            left_s = 60 * (plan.minutes - self._minute)
            await asyncio.wait(tasks, timeout=min(plan.rest_s, left_s), return_when=asyncio.FIRST_EXCEPTION)
            await self._rest()
            for task in tasks:
                if task.done() and (error := task.exception()) is not None:
                    raise error
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._world.http.aclose()
        return self.report

    async def _learn(self) -> None:
        """Take the answers before anything has happened, one at a time; then let everybody in at once, so
        that what is made on first use is there, and see what the house holds."""
        world = self._world
        for number in range(len(world.questions)):
            while number not in world.answers:
                await self._visit(asker, _Always(number))
        await asyncio.gather(*(self._visit(asker, Random(n)) for n in range(24)))
        await asyncio.gather(*(self._visit(bore, Random(n)) for n in range(12)))
        await self._renew()
        self.house.before = await asyncio.to_thread(self._at_rest)

    def _at_rest(self) -> Belongings:
        time.sleep(1)  # connections that were closed a moment ago
        return Belongings.of(self.house.server)

    # --------------------------------------------------------------------------------------- clients

    async def _come(self, random: Random) -> None:
        clients, weights = list(CLIENTS), list(CLIENTS.values())
        while True:
            await self._may_come.wait()
            (client,) = random.choices(clients, weights)
            visit = asyncio.create_task(self._visit(client, random))
            self._visits[visit] = client
            try:
                await asyncio.wait({visit})
            finally:
                visit.cancel()
                del self._visits[visit]
            visit.result()
            await asyncio.sleep(random.expovariate(1 / self._plan.think_s))

    async def _visit(self, client: Client, random: Random) -> None:
        name, began_s, report = client.__name__, time.monotonic(), self.report
        try:
            async with asyncio.timeout(LIMIT_S):
                outcome = await client(self._world, random)
        except TimeoutError:
            outcome = "hung"
            report.hangs += 1
            report.fail(f"minute {self._minute:.2f}: {name} hung")
        except asyncio.CancelledError:
            outcome = "killed"
        except (AssertionError, httpx.HTTPError, OSError, ValueError, LookupError) as error:
            outcome = "failed"
            report.fail(f"minute {self._minute:.2f}: {name}: {type(error).__name__}: {error}")
        _count(report.outcomes.setdefault(name, {}), outcome)
        took_s = time.monotonic() - began_s
        report.longest_s[name] = max(report.longest_s.get(name, 0.0), took_s)

    # ---------------------------------------------------------------------------------------- faults

    async def _harm(self, random: Random) -> None:
        """Kill the engine, or stop it for a while, until half the time is over."""
        while True:
            await asyncio.sleep(random.expovariate(1 / self._plan.kill_s))
            await self._may_come.wait()
            if self._minute > self._plan.rough_minutes:
                return
            for engine in self._server.children():
                if not self.report.faults or random.random() < 0.7:
                    self._world.engine_gone_s = time.monotonic()
                    engine.kill()
                    _count(self.report.faults, "engine killed")
                else:
                    await self._suspend(engine, random.uniform(0.5, 8))

    async def _suspend(self, engine: psutil.Process, seconds: float) -> None:
        _count(self.report.faults, "engine stopped for a while")
        with contextlib.suppress(psutil.NoSuchProcess):
            engine.suspend()
            try:
                await asyncio.sleep(seconds)
            finally:
                engine.resume()

    # -------------------------------------------------------------------------------------- measures

    async def _sample(self) -> None:
        while True:
            async with self._awake:
                state = await self._health()
            server = self._server
            sample = Sample(
                round(self._minute, 3),
                state,
                server.memory_info().rss / 1e6,
                server.num_fds(),
                server.num_threads(),
            )
            with contextlib.suppress(psutil.Error, ValueError):
                (engine,) = server.children()
                sample.engine_mb, sample.engine = engine.memory_info().rss / 1e6, engine.pid
            self.report.samples.append(sample)
            await asyncio.sleep(self._plan.sample_s)

    async def _health(self) -> str:
        began_s = time.monotonic()
        try:
            answer = await self._world.http.get("/health", timeout=LIMIT_S)
        except httpx.HTTPError as error:
            self.report.fail(f"minute {self._minute:.2f}: /health: {error!r}")
            return "unknown"
        took_s = time.monotonic() - began_s
        self.report.longest_s["health"] = max(self.report.longest_s.get("health", 0.0), took_s)
        return "ready" if answer.status_code == 200 else str(answer.json()["error"]["code"])

    async def _rest(self) -> None:
        """Let everybody end, kill who would not, and look at the house."""
        self._may_come.clear()
        for visit, client in self._visits.items():
            if client in RUDE:
                visit.cancel()
        while self._visits:  # none of them takes longer than LIMIT_S
            await asyncio.sleep(0.02)
        async with self._awake:
            await self._renew()
            try:
                await asyncio.to_thread(self.house.check)
            except AssertionError as error:
                self.report.fail(f"minute {self._minute:.2f}: the house at rest: {error}")
            self.report.rests.append(await asyncio.to_thread(self._look))
        print(f"minute {self._minute:6.2f}: {self.report.rests[-1]}", flush=True)

    def _look(self) -> dict[str, Any]:
        """What each process holds now."""

        def held(process: psutil.Process) -> dict[str, float]:
            return {
                "descriptors": process.num_fds(),
                "threads": process.num_threads(),
                "children": len(process.children()),
                "mb": round(process.memory_info().rss / 1e6, 2),
            }

        engine = self.house.server.engine
        return {"minute": round(self._minute, 2), "server": held(self._server), "engine": held(engine)}

    async def _renew(self) -> None:
        """Close all connections."""
        old, self._world.http = self._world.http, _http(self.house.url)
        await old.aclose()


class _Always(Random):
    """For asking one question in particular."""

    def __init__(self, number: int) -> None:
        super().__init__(0)
        self._number = number

    def randrange(self, *arguments: Any) -> int:
        return self._number


def _http(url: str) -> httpx.AsyncClient:
    """Without a limit in time: the visit has one."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    return httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False)


def soak(model: Path, plan: Plan, *serve: object) -> Report:
    """Run a plan on a house of its own."""
    with House.open(model, *SERVE, *serve) as house:
        report = asyncio.run(Soak(house, plan).run())
        engine = house.server.engine
        report.exit_code = house.server.end()
        if engine.is_running():
            report.fail("the engine outlives the server")
        log = house.server.log
        for number, line in enumerate(log):
            if line.startswith("Traceback"):
                report.fail("in the log: " + " | ".join(log[max(0, number - 2) : number + 40]))
    return report


def main() -> int:
    parser = argparse.ArgumentParser(prog="faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--model", type=Path, help="default: a tiny random llama")
    parser.add_argument("--kill-seconds", type=float, default=Plan.kill_s, help="mean time between kills")
    parser.add_argument("--clients", type=int, default=Plan.clients)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where everything that was seen goes")
    parser.add_argument("serve", nargs="*", help="arguments for ridgeline serve, after --")
    given = parser.parse_args()
    plan = Plan(given.minutes, given.clients, kill_s=given.kill_seconds, seed=given.seed)
    with tempfile.TemporaryDirectory() as folder:
        model = given.model
        if model is None:
            import tiny_models

            model = tiny_models.make("llama", Path(folder)).folder
        report = soak(model, plan, *given.serve)
    if given.json:
        given.json.write_text(json.dumps(report.as_json(), indent=1))
    print(report.summary())
    return 0 if all(report.criteria().values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
