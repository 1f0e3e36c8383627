"""SIGTERM and SIGINT."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from faults.asking import COMPLETIONS, LONG, Asked, full
from faults.house import House, error_of, until
from faults.test_socket import socket_of


@contextmanager
def ending(model: Path, *arguments: object) -> Iterator[House]:
    """A server that is to end in this block, with code 0 and its engine."""
    with House.open(model, *arguments) as house:
        engine, path = house.server.engine, socket_of(house)
        yield house
        assert house.server.process.wait(30) == 0
        _, alive = psutil.wait_procs([engine], timeout=30)
        assert not alive
        assert not path.parent.exists()
        house.server.await_log(" stopped")
        assert not any("Traceback" in line for line in house.server.log)


def drains(house: House) -> bool:
    with house.web() as web:
        return web.get("/health").status_code == 503


def test_row_50_an_idle_server_ends_at_once(tiny_llama: Path) -> None:
    with ending(tiny_llama, "--drain-timeout", 300) as house:
        house.server.process.send_signal(signal.SIGTERM)


def test_row_50_open_requests_end_and_new_ones_are_refused(tiny_llama: Path) -> None:
    with ending(tiny_llama, "--drain-timeout", 300) as house:
        stream = Asked(house, {**LONG, "n": 4, "stream": True}).begun()
        house.server.engine.suspend()
        whole = Asked(house, LONG)
        with house.web() as web:  # connected before the listener is closed
            web.get("/live")
            house.server.process.send_signal(signal.SIGINT)
            until(lambda: drains(house), "draining")
            assert error_of(web.post(COMPLETIONS, json=LONG), 503)["code"] == "draining"
            assert web.get("/live").status_code == 200
        house.server.engine.resume()
        assert stream.ended().last == "[DONE]"
        assert whole.ended().status in (200, 503)


def test_row_50_what_does_not_end_in_time_is_told_so(tiny_llama: Path) -> None:
    with ending(tiny_llama, "--drain-timeout", 0.5) as house:
        stream = Asked(house, {**LONG, "n": 4, "stream": True}).begun()
        house.server.engine.suspend()
        house.server.process.send_signal(signal.SIGTERM)
        assert stream.ended().error_code() == "engine_stopped"
        house.server.await_log("drain cut short", "open_requests=1")


def test_row_50_a_second_signal_ends_at_once(tiny_llama: Path) -> None:
    with ending(tiny_llama, "--drain-timeout", 300, "--max-num-seqs", 1, "--max-queue", 0) as house:
        house.server.engine.suspend()  # nothing will ever end
        asked = Asked(house, LONG)
        until(lambda: full(house), "open")
        house.server.process.send_signal(signal.SIGINT)
        house.server.await_log("open_requests=1")
        assert house.server.process.poll() is None
        house.server.process.send_signal(signal.SIGTERM)
        asked.ended()
        assert asked.broken or asked.status == 503
