"""Requests under way while a test does something to the server."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx

from faults.house import House

LONG: dict[str, Any] = {"prompt": "x", "max_tokens": 500, "ignore_eos": True, "temperature": 0}
"""As long as the tiny model's context allows."""
COMPLETIONS = "/v1/completions"


class Asked:
    """A request in a thread of its own. `events` are what a stream has brought so far."""

    def __init__(self, house: House, body: dict[str, Any], path: str = COMPLETIONS, **headers: str) -> None:
        self.status = 0
        self.events: list[dict[str, Any] | str] = []
        self.broken = ""  # the connection's end, if it was none of HTTP's
        self.answer: httpx.Response | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(house, body, path, headers))
        self._thread.start()

    def _read(self, house: House, body: dict[str, Any], path: str, headers: dict[str, str]) -> None:
        try:
            with (
                house.web(timeout=60) as web,
                web.stream("POST", path, json=body, headers=headers) as answer,
            ):
                self.status = answer.status_code
                if "event-stream" in answer.headers["content-type"]:
                    for line in answer.iter_lines():
                        self._take(line)
                answer.read() if not answer.is_stream_consumed else None
                self.answer = answer
        except httpx.HTTPError as error:
            self.broken = type(error).__name__
        self._begun.set()

    def _take(self, line: str) -> None:
        data = line.removeprefix("data: ")
        if data:
            self.events.append(json.loads(data) if data.startswith("{") else data)
            self._begun.set()

    def begun(self) -> Asked:
        """Once the first event is there, or the end."""
        assert self._begun.wait(60)
        return self

    def ended(self) -> Asked:
        self._thread.join(60)
        assert not self._thread.is_alive(), "it hangs"
        return self

    @property
    def last(self) -> dict[str, Any] | str:
        return self.events[-1]

    def error_code(self) -> str:
        """Of the answer, or of the event that ended the stream."""
        if self.events:
            assert isinstance(self.last, dict), self.last
            code: str = self.last["error"]["code"]
        else:
            assert self.answer is not None, self.broken
            code = self.answer.json()["error"]["code"]
        return code

    def text(self) -> str:
        """What a stream's first choice, or an answer's, says."""
        if not self.events:
            assert self.answer is not None, self.broken
            return str(self.answer.json()["choices"][0]["text"])
        assert self.last == "[DONE]", self.last
        return "".join(event["choices"][0]["text"] for event in self.events if isinstance(event, dict))


def full(house: House) -> bool:
    """Whether the queue takes nobody any more."""
    with house.web() as web:
        return web.post(COMPLETIONS, json={"max_tokens": -1}).status_code == 429
