"""A chat's state: what has been said, the system prompt and the sampling settings."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ridgeline.types import RequestError, SamplingParams

Message = dict[str, str]
_ROLES = ("system", "user", "assistant")
_FIXED = ("n", "logprobs", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "logit_bias")
"""Sampling settings that make no sense in a chat, where one answer is read by a person."""

SETTINGS = tuple(f.name for f in fields(SamplingParams) if f.name not in _FIXED)


@dataclass(slots=True)
class Conversation:
    """Turns alternate between user and assistant and start with the user's."""

    system: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    turns: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """What a chat template takes."""
        opening = [{"role": "system", "content": self.system}] if self.system else []
        return [*opening, *self.turns]

    def say(self, role: str, content: str) -> None:
        self.turns.append({"role": role, "content": content})

    def take_back(self) -> str:
        """Remove the last user turn and what follows it; its text, empty if there is none."""
        while self.turns:
            turn = self.turns.pop()
            if turn["role"] == "user":
                return turn["content"]
        return ""

    def forget_oldest(self) -> bool:
        """Drop the oldest question and its answer; False when only the newest question is left."""
        later = [i for i, turn in enumerate(self.turns) if turn["role"] == "user" and i > 0]
        if not later:
            return False
        del self.turns[: later[0]]
        return True

    def set(self, name: str, text: str) -> Any:
        """Set a sampling parameter from what a user typed; returns its value. Raises RequestError."""
        if name not in SETTINGS:
            raise RequestError(f"setting is {name!r}; accepted: {', '.join(SETTINGS)}")
        try:
            value = json.loads(text)
        except ValueError:
            value = None if text == "none" else text
        SamplingParams(**{**self.sampling, name: value})
        self.sampling[name] = value
        return value

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.messages(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    def load(self, path: Path) -> None:
        """Replace the turns and the system prompt by a file's; raises RequestError for anything else."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RequestError(f"{path} is not JSON; accepted: a file that /save wrote") from error
        if not isinstance(content, list) or not all(_is_message(message) for message in content):
            raise RequestError(f"{path} holds no conversation; accepted: a list of role and content")
        self.system = next((m["content"] for m in content if m["role"] == "system"), None)
        self.turns = [m for m in content if m["role"] != "system"]


def _is_message(value: object) -> bool:
    if not isinstance(value, dict) or set(value) != {"role", "content"}:
        return False
    return value["role"] in _ROLES and isinstance(value["content"], str)
