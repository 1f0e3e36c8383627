"""The slash commands of a chat."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ridgeline.cli.conversation import SETTINGS, Conversation
from ridgeline.types import RequestError


class ChatCommands:
    """Obeys `/name argument` on a conversation; `left` is set once the user wants to go."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.left = False
        self.last_line = "no answer yet"
        self._commands: dict[str, tuple[Callable[[str], str], str]] = {
            "help": (self._help, "this list"),
            "system": (self._system, "TEXT: set the system prompt; alone: show it; `none` removes it"),
            "set": (self._set, f"NAME VALUE: sampling settings: {', '.join(SETTINGS)}"),
            "clear": (self._clear, "forget the conversation"),
            "undo": (self._undo, "take back the last question and its answer"),
            "save": (self._save, "FILE: write the conversation as JSON"),
            "load": (self._load, "FILE: go on with a conversation that was saved"),
            "stats": (self._stats, "figures of the last answer"),
            "exit": (self._exit, "leave (also /bye, /quit, Ctrl-D)"),
        }
        self._aliases = {"bye": "exit", "quit": "exit", "?": "help"}

    def run(self, line: str) -> str:
        """Obey one line; returns what to show. Raises RequestError, OSError."""
        name, _, argument = line.removeprefix("/").partition(" ")
        command = self._commands.get(self._aliases.get(name, name))
        if command is None:
            known = ", ".join(f"/{known}" for known in self._commands)
            raise RequestError(f"command is {line.split()[0]!r}; accepted: {known}")
        return command[0](argument.strip())

    def _help(self, argument: str) -> str:
        lines = [f"  /{name:<8} {text}\n" for name, (_, text) in self._commands.items()]
        return "".join([*lines, '  """       begins and ends a text of several lines\n'])

    def _system(self, argument: str) -> str:
        if argument:
            self.conversation.system = None if argument == "none" else argument
        return f"system prompt: {self.conversation.system or 'none'}\n"

    def _set(self, argument: str) -> str:
        name, _, value = argument.partition(" ")
        if not value:
            raise RequestError("/set takes a name and a value; accepted: for example /set temperature 0.2")
        self.conversation.set(name, value.strip())
        return f"{name} = {json.dumps(self.conversation.sampling[name])}\n"

    def _clear(self, argument: str) -> str:
        self.conversation.turns.clear()
        return "conversation forgotten\n"

    def _undo(self, argument: str) -> str:
        question = self.conversation.take_back()
        return f"took back: {question}\n" if question else "nothing to take back\n"

    def _save(self, argument: str) -> str:
        path = _file(argument)
        self.conversation.save(path)
        return f"saved {len(self.conversation.turns)} turns to {path}\n"

    def _load(self, argument: str) -> str:
        path = _file(argument)
        self.conversation.load(path)
        return f"loaded {len(self.conversation.turns)} turns from {path}\n"

    def _stats(self, argument: str) -> str:
        return f"{self.last_line}\n"

    def _exit(self, argument: str) -> str:
        self.left = True
        return ""


def _file(argument: str) -> Path:
    if not argument:
        raise RequestError("the command takes a file; accepted: for example /save talk.json")
    return Path(argument).expanduser()
