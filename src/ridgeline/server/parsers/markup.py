"""Answers in which markers set off reasoning and tool calls: most families, each by a description of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from ridgeline.server.parsers.deltas import Delta, Output
from ridgeline.server.parsers.json_calls import JsonCalls
from ridgeline.server.parsers.markers import PIECE, MarkerSearch, SpecialCutter
from ridgeline.server.parsers.named_calls import (
    DEEPSEEK_HEAD,
    DEEPSEEK_MARKS,
    MISTRAL_HEAD,
    MISTRAL_MARKS,
    NamedCall,
)


class Form(Enum):
    """How calls are written after their marker."""

    JSON = "json"  # an object with name and arguments, or a list of them
    FENCED = "fenced"  # the same, in a Markdown code block
    MISTRAL = "mistral"  # a list of objects, or a name and an object of arguments
    DEEPSEEK = "deepseek"  # a name, and an object of arguments in a Markdown code block

    @property
    def in_heads(self) -> tuple[str, ...]:
        """Markers between the name and the arguments."""
        return {Form.MISTRAL: MISTRAL_MARKS, Form.DEEPSEEK: DEEPSEEK_MARKS}.get(self, ())


@dataclass(frozen=True, slots=True)
class Calls:
    """Tool calls after the marker `opens`. Any of `closes` may follow them.

    `leads`: the marker is one only where nothing was said before it.
    """

    opens: str
    closes: tuple[str, ...] = ()
    form: Form = Form.JSON
    leads: bool = False


@dataclass(frozen=True, slots=True)
class Markup:
    """What a family writes around the parts of its answers.

    `think` has pairs of markers around reasoning; `frames` are markers that only stand around other parts.
    `bare`: an object that begins the answer may be a call without a marker. `short_ids` as for `Output`.
    """

    think: tuple[tuple[str, str], ...] = ()
    calls: tuple[Calls, ...] = ()
    frames: tuple[str, ...] = ()
    bare: bool = False
    short_ids: bool = False

    @property
    def markers(self) -> frozenset[str]:
        pairs = [marker for pair in self.think for marker in pair]
        calls = [marker for each in self.calls for marker in (each.opens, *each.closes, *each.form.in_heads)]
        return frozenset([*pairs, *calls, *self.frames])


class _Body(Protocol):
    """Reads what follows the marker of tool calls."""

    @property
    def ended(self) -> bool: ...
    def feed(self, text: str) -> int: ...
    def special(self, text: str) -> bool: ...
    def unread(self) -> str: ...


class MarkupParser:
    """Reads answers with the markers of `markup`.

    `cutter` finds special tokens, of which those in `special` are known by their token and all other markers
    by their text; `strip` takes out the special tokens that are no markers. `thinking` has the closing marker
    of the reasoning in which the prompt ends, if it does.

    Space next to a marker belongs to it. A marker of reasoning that is known by its text is one only where
    nothing was said before it, since an answer may well speak of `<think>`.
    """

    def __init__(
        self,
        markup: Markup,
        cutter: SpecialCutter | None = None,
        special: frozenset[str] = frozenset(),
        strip: bool = True,
        thinking: str | None = None,
    ) -> None:
        self._out = Output(markup.short_ids)
        self._cutter = cutter
        self._special = special
        self._strip = strip
        self._bare = markup.bare
        self._closing = dict(markup.think)
        self._calls = {each.opens: each for each in markup.calls}
        self._markers = markup.markers
        texts = [*self._closing, *self._calls, *markup.frames]
        self._openings = MarkerSearch(marker for marker in texts if marker not in special)
        self._closings = {
            end: MarkerSearch(m for m in (start, end) if m not in special) for start, end in markup.think
        }
        self._state: Callable[[str], str] = self._in_content
        self._fresh = True  # nothing but space was said in this part of the answer
        self._trim = False  # a marker came last: space that follows is its own
        self._space: list[str] = []  # space that is the next marker's if one follows
        self._held = ""  # what may be the beginning of a marker
        self._end = ""  # the marker that ends the reasoning at hand
        self._body: _Body | None = None
        self._after: Calls | None = None
        self._closed = False  # the calls' own closing marker has come
        self._gap: list[str] = []  # a separator after a call, and the space after that
        if thinking is not None:
            self._think(thinking)

    @property
    def needs_special_tokens(self) -> bool:
        return not self._special.isdisjoint(self._markers)

    @property
    def called_tools(self) -> bool:
        return self._out.calls > 0

    def feed(self, text: str, token_ids: Sequence[int]) -> list[Delta]:
        """What `text` adds. See `OutputParser`."""
        if self._cutter is None:
            self._read(text)
        else:
            for piece in self._cutter.cut(text, token_ids):
                if piece.special:
                    self._read_special(piece.text)
                else:
                    self._read(piece.text)
        return self._out.take()

    def finish(self) -> list[Delta]:
        """What was held back, at the end of the answer."""
        for piece in self._cutter.finish() if self._cutter is not None else []:
            self._read(piece.text)
        self._release()
        if self._body is not None:
            self._leave_body()
        self._show("".join(self._space))
        self._space.clear()
        return self._out.take()

    def _read(self, text: str) -> None:
        for at in range(0, len(text), PIECE):
            piece = text[at : at + PIECE]
            while piece:
                piece = self._state(piece)

    # ------------------------------------------------------------------------------ content and reasoning

    def _in_content(self, text: str) -> str:
        text, self._held = self._held + text, ""
        if self._fresh and self._bare:
            lead = len(text) - len(text.lstrip())
            if text[lead : lead + 1] == "{":
                self._space.append(text[:lead])
                self._enter(Calls(""), JsonCalls(self._out, self._taken_space(), bare=True))
                return text[lead:]
        found = self._openings.find(text)
        if found is None:
            certain = self._openings.certain(text)
            self._say(text[:certain])
            self._held = text[certain:]
            return ""
        start, end = found
        marker = text[start:end]
        self._say(text[:start])
        calls = self._calls.get(marker)
        if not self._fresh and (marker in self._closing or (calls is not None and calls.leads)):
            self._say(marker)
        else:
            self._open(marker)
        return text[end:]

    def _in_reasoning(self, text: str) -> str:
        text, self._held = self._held + text, ""
        search = self._closings[self._end]
        found = search.find(text)
        if found is None:
            certain = search.certain(text)
            self._say(text[:certain])
            self._held = text[certain:]
            return ""
        start, end = found
        self._say(text[:start])
        if text[start:end] == self._end:
            self._answer()
        elif not self._fresh:  # else the model opens what the prompt has opened already
            self._say(text[start:end])
        return text[end:]

    def _say(self, text: str) -> None:
        """Give out text; space at its end waits for what follows."""
        if self._trim:
            text = text.lstrip()
            if not text:
                return
            self._trim = False
        words = text.rstrip()
        if words:
            self._show(self._taken_space() + words)
            self._fresh = False
        if len(words) < len(text):
            self._space.append(text[len(words) :])

    def _show(self, text: str) -> None:
        if self._state == self._in_reasoning:
            self._out.reasoning(text)
        else:
            self._out.content(text)

    def _taken_space(self) -> str:
        space = "".join(self._space)
        self._space.clear()
        return space

    # -------------------------------------------------------------------------------------------- markers

    def _read_special(self, name: str) -> None:
        if self._body is not None and self._body.special(name):
            return
        if name not in self._special or name not in self._markers:
            if not self._strip:
                self._read(name)
            return
        self._release()
        if self._body is not None:
            self._leave_body()
        if self._after is not None:
            if name in self._after.closes:
                self._closed = True
                return
            self._after, self._state = None, self._in_content
        self._open(name)

    def _open(self, marker: str) -> None:
        """Go where a marker leads. Those that close or frame something only end what was before them."""
        if marker in self._closing:
            self._think(self._closing[marker])
        elif marker in self._calls:
            calls = self._calls[marker]
            self._enter(calls, self._body_of(calls, self._taken_space() + marker))
        elif self._state == self._in_reasoning:
            self._answer()
        else:
            self._space.clear()
            self._trim = True

    def _think(self, end: str) -> None:
        self._space.clear()
        self._state, self._end = self._in_reasoning, end
        self._fresh = self._trim = True

    def _answer(self) -> None:
        self._space.clear()
        self._state = self._in_content
        self._fresh = self._trim = True

    def _release(self) -> None:
        """Nothing will complete what may have been a marker: it is text."""
        held, self._held = self._held, ""
        if self._after is not None:
            if held or self._gap:
                self._resume(held)
        elif held:
            self._say(held)

    # ---------------------------------------------------------------------------------------------- calls

    def _body_of(self, calls: Calls, before: str) -> _Body:
        if calls.form is Form.MISTRAL:
            return NamedCall(self._out, before, MISTRAL_HEAD, MISTRAL_MARKS)
        if calls.form is Form.DEEPSEEK:
            return NamedCall(self._out, before, DEEPSEEK_HEAD, DEEPSEEK_MARKS)
        return JsonCalls(self._out, before, fence=calls.form is Form.FENCED)

    def _enter(self, calls: Calls, body: _Body) -> None:
        self._body, self._after, self._closed = body, calls, False
        self._state = self._in_calls

    def _in_calls(self, text: str) -> str:
        assert self._body is not None
        taken = self._body.feed(text)
        if self._body.ended:
            self._leave_body()
        return text[taken:]

    def _leave_body(self) -> None:
        """Its calls are given out; what it could not read is text."""
        assert self._body is not None
        unread = self._body.unread()
        self._body = None
        if unread:
            self._after, self._state, self._trim = None, self._in_content, False
            self._say(unread)
        else:
            self._state, self._fresh = self._after_calls, False

    def _after_calls(self, text: str) -> str:
        """The closing marker, or after a separator another object, or something else."""
        assert self._after is not None
        text, self._held = self._held + text, ""
        words = text.lstrip()
        if self._gap:
            self._gap.append(text[: len(text) - len(words)])
        if not words:
            return ""
        again = not self._closed and self._after.form in (Form.JSON, Form.FENCED)
        if again and words[0] in ";," and not self._gap:
            self._gap.append(words[0])
            return words[1:]
        if again and words[0] == "{":
            gap, bare = "".join(self._gap), not self._after.opens
            self._gap.clear()
            self._enter(self._after, JsonCalls(self._out, gap, bare=bare))
            return words
        for close in () if self._gap else self._after.closes:
            if close not in self._special and words.startswith(close):
                self._closed = True
                return words[len(close) :]
            if close not in self._special and close.startswith(words):
                self._held = words
                return ""
        self._resume("")
        return words

    def _resume(self, text: str) -> None:
        """No more calls here: content again."""
        gap = "".join(self._gap)
        self._gap.clear()
        self._after, self._state, self._trim = None, self._in_content, True
        self._say(gap + text)
