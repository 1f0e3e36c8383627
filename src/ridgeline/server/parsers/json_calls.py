"""Tool calls written as JSON, read as they arrive and in one pass.

The arguments of a call are given on as the text that the model writes, from their opening to their closing
brace. What is not a call is kept, so that it can be shown as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from ridgeline.server.parsers.deltas import Output

_FUNCTION_KEY = "function"  # its value is a name, or an object with name and arguments
_NAME_KEYS = frozenset({"name", "tool_name", _FUNCTION_KEY})
_ARGUMENT_KEYS = frozenset({"arguments", "parameters"})
_OTHER_KEYS = frozenset({"type", "id", "tool_call_id"})
_MAX_WORD = 256  # characters of a key or a name

_SPACE = re.compile(r"[ \t\r\n]*")
_WORD_END = re.compile(r'["\\\x00-\x1f]')
_STRING_END = re.compile(r'["\\]')
# Outside of strings: what changes the depth, and what no JSON has.
_STRUCTURE = re.compile(r'["{}\[\]]|[^\s\w,:.+\-]')
_SCALAR_END = re.compile(r"[^\w.+\-]")
_FENCE = "```json"


class ValueScanner:
    """Finds the end of one JSON value. It knows strings, escapes and how deep it is, nothing else."""

    __slots__ = ("_depth", "_escaped", "_in_string", "_scalar", "broken", "done")

    def __init__(self) -> None:
        self.done = False
        self.broken = False  # it came upon a character that no JSON has there
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._scalar = False

    def scan(self, text: str, at: int) -> int:
        """Where the value ends in `text`, or the end of `text` when it goes on (neither done nor broken)."""
        while at < len(text):
            if self._in_string:
                at = self._string(text, at)
            elif self._scalar or (self._depth == 0 and text[at] not in '"{['):
                return self._word(text, at)
            else:
                at = self._structure(text, at)
            if self.done or self.broken:
                return at
        return at

    def _string(self, text: str, at: int) -> int:
        if self._escaped:
            self._escaped = False
            return at + 1
        found = _STRING_END.search(text, at)
        if found is None:
            return len(text)
        if found[0] == "\\":
            self._escaped = True
        else:
            self._in_string = False
            self.done = self._depth == 0
        return found.end()

    def _structure(self, text: str, at: int) -> int:
        found = _STRUCTURE.search(text, at)
        if found is None:
            return len(text)
        character = found[0]
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.done = self._depth == 0
        else:
            self.broken = True
            return found.start()
        return found.end()

    def _word(self, text: str, at: int) -> int:
        found = _SCALAR_END.search(text, at)
        end = len(text) if found is None else found.start()
        self.done = found is not None and (self._scalar or end > at)
        self.broken = found is not None and not self.done
        self._scalar = self._scalar or end > at
        return end


class JsonCalls:
    """An object with a name and arguments, or a list of such objects.

    `before` is what led to it (a marker), which is a part of `unread` until the first call has begun. With
    `bare`, for formats in which nothing but the JSON itself marks a call, an object must have arguments, and
    no keys that calls do not have. With `fence` it may stand in a Markdown code block.
    """

    def __init__(self, out: Output, before: str, bare: bool = False, fence: bool = False) -> None:
        self.ended = False
        self._out = out
        self._bare = bare
        self._state: Callable[[str, int], int] = self._open_fence if fence else self._open
        self._unread = [before]
        self._begun = False  # the call of this object has been given out
        self._from = 0  # where unread text begins in the piece at hand
        self._in_list = False
        self._calls = 0
        self._fence = 0
        self._word: list[str] = []
        self._word_size = 0
        self._escaped = False
        self._key: str | None = None
        self._name: str | None = None
        self._nested = False  # in the object of the function key
        self._value = ValueScanner()
        self._giving = False  # what is read now is the arguments of a call that has begun
        self._early: list[str] | None = None  # arguments of a call that has not

    def feed(self, text: str) -> int:
        """How many characters were read; fewer than all only where it has `ended`."""
        at = self._from = 0
        while at < len(text) and not self.ended:
            at = self._state(text, at)
        if not self._giving:
            self._unread.append(text[self._from : at])
        return at

    def special(self, text: str) -> bool:
        """Whether a special token belongs here: never."""
        return False

    def unread(self) -> str:
        """The text that no call accounts for; none where that is only what stands between calls."""
        text = "".join(self._unread)
        return "" if self._calls and not text.strip(" \t\r\n,}") else text

    # ------------------------------------------------------------------------------------------- around

    def _open_fence(self, text: str, at: int) -> int:
        if self._fence == 0:
            at = _after_space(text, at)
            if at == len(text):
                return at
        if self._fence < len(_FENCE) and text[at] == _FENCE[self._fence]:
            self._fence += 1
            return at + 1
        if self._fence in (0, 3, len(_FENCE)):
            self._state = self._open
            return at
        return self._fail(at)

    def _open(self, text: str, at: int) -> int:
        at = _after_space(text, at)
        if at == len(text):
            return at
        if text[at] == "{":
            self._state = self._in_object
        elif text[at] == "[" and not self._bare:
            self._in_list = True
            self._state = self._item
        else:
            return self._fail(at)
        return at + 1

    def _item(self, text: str, at: int) -> int:
        at = _after_space(text, at)
        if at == len(text):
            return at
        if text[at] == "]" and self._calls:
            return self._end(at + 1)
        if text[at] != "{":
            return self._fail(at)
        self._state = self._in_object
        return at + 1

    def _between(self, text: str, at: int) -> int:
        at = _after_space(text, at)
        if at == len(text):
            return at
        if text[at] == "]":
            return self._end(at + 1)
        if text[at] != ",":
            return self._fail(at)
        self._state = self._item
        return at + 1

    # ------------------------------------------------------------------------------------------- object

    def _in_object(self, text: str, at: int) -> int:
        at = _after_space(text, at)
        if at == len(text):
            return at
        if text[at] == "}":
            return self._close(at)
        if text[at] != '"':
            return self._fail(at)
        self._key = None
        self._word, self._word_size = ['"'], 0
        self._state = self._in_word
        return at + 1

    def _in_word(self, text: str, at: int) -> int:
        """A key, or a name."""
        if self._escaped:
            self._escaped = False
            return self._take_word(text, at, at + 1)
        limit = at + _MAX_WORD - self._word_size
        found = _WORD_END.search(text, at, limit)
        if found is None:
            return self._take_word(text, at, min(len(text), limit))
        if found[0] == "\\":
            self._escaped = True
        elif found[0] != '"':
            return self._fail(found.start())
        end = self._take_word(text, at, found.end())
        if found[0] == "\\" or self.ended:
            return end
        try:
            word = json.loads("".join(self._word))
        except ValueError:
            return self._fail(end)
        return self._key_read(word, end) if self._key is None else self._name_read(word, end)

    def _take_word(self, text: str, at: int, end: int) -> int:
        self._word.append(text[at:end])
        self._word_size += end - at
        return self._fail(end) if self._word_size == _MAX_WORD else end

    def _key_read(self, key: str, at: int) -> int:
        known = key in _NAME_KEYS or key in _ARGUMENT_KEYS
        if self._bare and not known and key not in _OTHER_KEYS:
            return self._fail(at)
        if key in _ARGUMENT_KEYS and (self._begun or self._early is not None):
            return self._fail(at)
        self._key = key
        self._state = self._colon
        return at

    def _colon(self, text: str, at: int) -> int:
        at = _after_space(text, at)
        if at == len(text):
            return at
        if text[at] != ":":
            return self._fail(at)
        self._state = self._value_start
        return at + 1

    def _value_start(self, text: str, at: int) -> int:
        at = _after_space(text, at)
        if at == len(text):
            return at
        self._value = ValueScanner()
        self._state = self._skipped
        if self._key in _NAME_KEYS and self._name is None:
            return self._name_start(text, at)
        if self._key in _ARGUMENT_KEYS:
            if text[at] not in '{"n':
                return self._fail(at)
            self._early = []
            self._state = self._arguments if text[at] == "{" else self._odd_arguments
            if text[at] == "{" and self._name is not None:
                self._begin(at)
                self._giving = True
        return at

    def _name_start(self, text: str, at: int) -> int:
        if text[at] == "{" and self._key == _FUNCTION_KEY and not self._nested:
            self._nested = True
            self._state = self._in_object
        elif text[at] == '"':
            self._word, self._word_size = ['"'], 0
            self._state = self._in_word
        else:
            return self._fail(at)
        return at + 1

    def _skipped(self, text: str, at: int) -> int:
        return self._value_read(self._value.scan(text, at))

    def _arguments(self, text: str, at: int) -> int:
        end = self._value.scan(text, at)
        if self._giving:
            self._out.arguments(text[at:end])
        else:
            assert self._early is not None
            self._early.append(text[at:end])
        if self._giving and (self._value.done or self._value.broken):
            self._giving, self._from = False, end
        return self._value_read(end)

    def _odd_arguments(self, text: str, at: int) -> int:
        """A string that holds the JSON, or null for none."""
        assert self._early is not None
        end = self._value.scan(text, at)
        self._early.append(text[at:end])
        if self._value.done:
            arguments = _decoded("".join(self._early))
            if arguments is None:
                return self._fail(end)
            self._early = [arguments]
            if self._name is not None:
                self._begin(end)
        return self._value_read(end)

    def _value_read(self, at: int) -> int:
        if self._value.broken:
            return self._fail(at)
        if self._value.done:
            self._state = self._after_value
        return at

    def _name_read(self, name: str, at: int) -> int:
        if not name.strip():
            return self._fail(at)
        self._name = name
        if self._early is not None:
            self._begin(at)
        self._state = self._after_value
        return at

    def _after_value(self, text: str, at: int) -> int:
        at = _after_space(text, at)
        if at == len(text):
            return at
        if text[at] == "}":
            return self._close(at)
        if text[at] != ",":
            return self._fail(at)
        self._state = self._in_object
        return at + 1

    # ---------------------------------------------------------------------------------------------- ends

    def _begin(self, at: int) -> None:
        """Give out the call; what was read up to `at` is accounted for."""
        assert self._name is not None
        assert self._early is not None
        self._out.call(self._name)
        self._out.arguments("".join(self._early))
        self._calls += 1
        self._begun = True
        self._account(at)

    def _account(self, at: int) -> None:
        self._unread.clear()
        self._from = at

    def _close(self, at: int) -> int:
        """The object's closing brace, at `at`."""
        if self._nested:
            self._nested = False
            self._state = self._after_value
            return at + 1
        if not self._begun:
            if self._name is None or self._bare:
                return self._fail(at)
            self._early = ["{}"]
            self._begin(at)
        self._begun, self._name, self._early = False, None, None
        self._account(at + 1)
        self._state = self._between
        return at + 1 if self._in_list else self._end(at + 1)

    def _end(self, at: int) -> int:
        self.ended = True
        self._account(at)
        return at

    def _fail(self, at: int) -> int:
        self.ended = True
        return at


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _decoded(value: str) -> str | None:
    """The JSON object that a JSON string holds; `{}` for null."""
    try:
        decoded = json.loads(value, strict=False)
    except ValueError:
        return None
    if decoded is None:
        return "{}"
    return decoded if isinstance(decoded, str) and decoded.lstrip().startswith("{") else None
