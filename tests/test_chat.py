"""The chat: its conversation, commands, interrupts, and markdown as it streams."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.markdown import Markdown

from ridgeline.cli import main as cli
from ridgeline.cli.chat import _read_turn, _stop_on_interrupt
from ridgeline.cli.chat_commands import ChatCommands
from ridgeline.cli.conversation import Conversation
from ridgeline.cli.figures import Figures
from ridgeline.cli.markdown import MarkdownPrinter, split_blocks, with_breaks
from ridgeline.resources.ceilings import Ceilings
from ridgeline.types import RequestError, Work

# -------------------------------------------------------------------------------------- conversation


def talk(*questions: str) -> Conversation:
    conversation = Conversation("be kind")
    for question in questions:
        conversation.say("user", question)
        conversation.say("assistant", f"answer to {question}")
    return conversation


def test_messages_start_with_the_system_prompt() -> None:
    roles = [message["role"] for message in talk("a", "b").messages()]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert Conversation().messages() == []


def test_the_oldest_turns_go_first_and_the_last_question_stays() -> None:
    conversation = talk("a", "b")
    conversation.say("user", "c")
    assert conversation.forget_oldest()
    assert [t["content"] for t in conversation.turns] == ["b", "answer to b", "c"]
    assert conversation.forget_oldest()
    assert not conversation.forget_oldest()
    assert [t["content"] for t in conversation.turns] == ["c"]


def test_take_back_removes_a_question_and_its_answer() -> None:
    conversation = talk("a", "b")
    assert conversation.take_back() == "b"
    assert [t["content"] for t in conversation.turns] == ["a", "answer to a"]
    conversation.take_back()
    assert conversation.take_back() == ""


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("temperature", "0.5", 0.5), ("max_tokens", "none", None), ("stop", "END", "END"), ("top_k", "7", 7)],
)
def test_settings_are_read_as_they_are_typed(name: str, text: str, value: object) -> None:
    conversation = Conversation()
    assert conversation.set(name, text) == value
    assert conversation.sampling == {name: value}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("temperature", "-1"),
        ("n", "2"),
        ("warmth", "1"),
        ("seed", "x"),
        ("stop", "5"),
        ("stop_token_ids", "5"),
    ],
)
def test_settings_out_of_range_change_nothing(name: str, text: str) -> None:
    conversation = Conversation()
    with pytest.raises(RequestError):
        conversation.set(name, text)
    assert conversation.sampling == {}


def test_a_saved_conversation_is_loaded_again(tmp_path: Path) -> None:
    saved = talk("naïve ☃")
    saved.save(tmp_path / "talk.json")
    loaded = Conversation(sampling={"seed": 1})
    loaded.load(tmp_path / "talk.json")
    assert loaded.messages() == saved.messages()
    assert loaded.sampling == {"seed": 1}


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '[{"role": "king", "content": "x"}]', '[{"role": "user"}]']
)
def test_other_files_are_refused_and_change_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(content, encoding="utf-8")
    conversation = talk("a")
    with pytest.raises(RequestError, match="accepted"):
        conversation.load(tmp_path / "file")
    assert conversation.messages() == talk("a").messages()


def test_commands() -> None:
    conversation = talk("a")
    commands = ChatCommands(conversation)
    assert "/system" in commands.run("/help") == commands.run("/?")
    assert commands.run("/system be brief") == "system prompt: be brief\n"
    assert commands.run("/system none") == "system prompt: none\n"
    assert conversation.system is None
    assert commands.run("/set temperature 0.25") == "temperature = 0.25\n"
    assert commands.run("/undo") == "took back: a\n"
    assert commands.run("/undo") == "nothing to take back\n"
    commands.run("/clear")
    assert conversation.turns == []
    for wrong in ("/frob", "/", "/set", "/set temperature", "/save", "/load"):
        with pytest.raises(RequestError, match="accepted"):
            commands.run(wrong)
    assert not commands.left
    commands.run("/bye")
    assert commands.left


# ----------------------------------------------------------------------------------------- interrupts


def test_ctrl_c_is_told_once_and_then_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), _stop_on_interrupt() as stopped:  # noqa: PT012
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def read_terminal(descriptor: int, until: str, seconds: float = 30.0) -> str:
    """What a terminal shows, up to what matches `until`; empty where nothing does in time."""
    seen = b""
    end = time.monotonic() + seconds
    while not re.search(until.encode(), seen, re.DOTALL) and time.monotonic() < end:
        if select.select([descriptor], [], [], 0.2)[0]:
            try:
                seen += os.read(descriptor, 65536)
            except OSError:  # the other side has closed it
                break
    return seen.decode(errors="replace") if re.search(until.encode(), seen, re.DOTALL) else ""


def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(tiny_llama: Path, tmp_path: Path) -> None:
    options = ["--temperature", "1", "--seed", "3"]
    command = [sys.executable, "-m", "ridgeline.cli.main", "chat", "-m", str(tiny_llama), *options]
    environment = {**os.environ, "RIDGELINE_CACHE": str(tmp_path), "TERM": "xterm", "COLUMNS": "80"}
    terminal, inside = pty.openpty()
    # A session of its own, so that the interrupt below reaches the chat alone.
    streams = {"stdin": inside, "stdout": inside, "stderr": inside}
    child = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
    os.close(inside)
    try:
        assert read_terminal(terminal, ">>> ")
        os.write(terminal, b"/set logit_bias 1\n")
        assert read_terminal(terminal, "error: setting is 'logit_bias'.*>>> ")
        interrupts = 0
        while not interrupts or not read_terminal(terminal, ">>> ", seconds=10):
            assert interrupts < 4  # Python misses one that comes just before it waits for a key
            child.send_signal(signal.SIGINT)
            interrupts += 1
        os.write(terminal, b"hello\n")
        assert read_terminal(terminal, r"\x1b\[\?25l")  # the answer has begun: the cursor is hidden
        child.send_signal(signal.SIGINT)
        child.send_signal(signal.SIGINT)  # an impatient second one does not end the chat either
        assert read_terminal(terminal, ">>> ")
        while child.poll() is None:  # a late interrupt may empty the line once more
            os.write(terminal, b"\x04")
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=5)
        assert child.returncode == 0
    finally:
        child.kill()
        os.close(terminal)
    history = tmp_path / "chat_history"
    assert "hello" in history.read_text(encoding="utf-8")
    assert history.stat().st_mode & 0o077 == 0


# -------------------------------------------------------------------------------------- through a pipe


@pytest.fixture
def chat(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, tiny_llama: Path
) -> Iterator[object]:
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path))

    def call(script: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ridgeline", "chat", "-m", str(tiny_llama), *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(script))
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capfd.readouterr()
        return int(left.value.code or 0), out, err

    return call


def test_a_conversation_through_a_pipe(chat: object, tmp_path: Path) -> None:
    assert callable(chat)
    file = tmp_path / "talk.json"
    lines = [
        "one",
        "//two",
        f"/save {file}",
        '"""three',
        'and four"""',
        "/stats",
        "/load /nowhere",
        "/bye",
        "five",
    ]
    code, out, err = chat("\n".join(lines), "--max-tokens", "4", "--temperature", "0", "--system", "be")
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert code == 0
    assert [m["role"] for m in saved] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in saved if m["role"] == "user"] == ["one", "/two"]
    assert saved[2]["content"] + "\n" in out
    assert "prompt + 4 output tokens" in out
    assert err == "error: /nowhere: No such file or directory\n"
    assert "\x1b" not in out + err
    assert "five" not in out


def test_a_chat_whose_reader_has_left_ends(chat: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(chat)
    asked: list[str] = []

    def left(self: object, text: str) -> None:
        asked.append(text)
        raise BrokenPipeError

    monkeypatch.setattr("ridgeline.cli.chat._Chat._answer", left)
    monkeypatch.setattr("os.dup2", lambda *descriptors: None)  # the captured output stays
    assert chat("one\ntwo") == (1, "", "")
    assert asked == ["one"]


def test_a_full_context_forgets_and_goes_on(chat: object) -> None:
    assert callable(chat)
    code, out, err = chat(
        "\n".join("a question" for _ in range(6)), "--max-model-len", "128", "--max-tokens", "8"
    )
    assert code == 0
    assert out.count("\n") >= 6
    assert re.search(r"the context of 128 tokens is full: forgot the oldest (1 turn|\d turns)\n", err)
    assert "error" not in err


def test_a_question_that_can_never_fit_is_an_error_and_is_not_kept(chat: object) -> None:
    assert callable(chat)
    arguments = ("--max-model-len", "64", "--max-tokens", "2")
    code, out, err = chat(f"{'x' * 100}\n/undo\nshort", *arguments)
    assert code == 0
    assert re.match(r"error: prompt has \d+ tokens; this model's context of 64 takes at most 63\n$", err)
    assert out.startswith("nothing to take back\n")


def test_several_lines_between_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('"""one\n two\nthree"""\nnext\n"""same line"""\n'))
    assert _read_turn("") == "one\n two\nthree"
    assert _read_turn("") == "next"
    assert _read_turn("") == "same line"
    with pytest.raises(EOFError):
        _read_turn("")


# ------------------------------------------------------------------------------------------- markdown

DOCUMENT = """# Title

A paragraph
of two lines.

1. one

   more of one

2. two

- a

- b

```python
def f():

    return "# no title"
```

> a quotation

| a | b |
|---|---|
| 1 | 2 |

~~~
~ no end ```
~~~

The end.
"""


def blocks_of(text: str, sizes: list[int]) -> list[str]:
    """The text in pieces through split_blocks, as a stream arrives."""
    done, rest, start = [], "", 0
    for size in [*sizes, len(text)]:
        finished, rest = split_blocks(rest + text[start : start + size])
        start += size
        if finished:
            done.append(finished)
    return [*done, rest]


@given(st.lists(st.integers(1, 40), max_size=30))
def test_blocks_rendered_one_by_one_look_like_the_whole(sizes: list[int]) -> None:
    blocks = blocks_of(DOCUMENT, sizes)
    assert "".join(blocks) == DOCUMENT

    def rendered(text: str) -> list[str]:
        console = Console(file=io.StringIO(), width=60)
        console.print(Markdown(text))
        assert isinstance(console.file, io.StringIO)
        return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]

    assert [line for block in blocks if block.strip() for line in rendered(block)] == rendered(DOCUMENT)


def test_finished_blocks_are_let_go() -> None:
    blocks = blocks_of(DOCUMENT, [1] * len(DOCUMENT))
    assert [block.split("\n")[0] for block in blocks] == [
        "# Title", "A paragraph", "```python", "> a quotation", "| a | b |", "~~~", "The end."
    ]  # fmt: skip


def test_line_breaks_stay_outside_code() -> None:
    assert with_breaks("roses\nviolets\n\n```\na\nb\n```\n") == "roses  \nviolets  \n\n```\na\nb\n```\n"


def test_printer_shows_every_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda: Console(file=screen, force_terminal=False, width=60))
    printer = MarkdownPrinter()
    printer.start()
    for character in "first *block*\n\nsecond\nblock":
        printer.push(character)
    printer.close()
    assert [line.rstrip() for line in screen.getvalue().split("\n")] == [
        "first block",
        "",
        "second",
        "block",
        "",
    ]


# -------------------------------------------------------------------------------------------- figures


def test_the_line_of_figures() -> None:
    ceilings = Ceilings(20e9, 1e12, 0.0, 1e11, 2, "portable", "a machine", "2026-01-01T00:00:00+00:00")
    figures = Figures(12, 11, 0.25, 0.5, Work(read_bytes=5_000_000_000))
    assert figures.line(ceilings) == (
        "12 prompt + 11 output tokens · first token 0.25 s · 20.0 tokens/s · "
        "50% of the memory bandwidth (20.0 GB/s)"
    )
    assert figures.line(None).endswith("20.0 tokens/s")
    assert Figures(3, 1, 0.1, 0.0, Work()).line(ceilings) == "3 prompt + 1 output tokens · first token 0.10 s"
