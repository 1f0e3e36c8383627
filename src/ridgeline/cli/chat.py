"""`ridgeline chat`: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ridgeline.cli import options
from ridgeline.cli.errors import user_message
from ridgeline.cli.options import given

if TYPE_CHECKING:
    from ridgeline.llm import LLM

_GREETING = "{model} · /help lists commands · Ctrl-C stops an answer · Ctrl-D leaves"
_PARAGRAPH = '"""'


def chat(
    model: options.Model = None,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    weights: options.WeightFormat = None,
    kv_format: options.KVFormat = None,
    max_model_len: options.MaxModelLen = None,
    threads: options.Threads = None,
    device: options.Device = None,
    no_packed_cache: options.NoPackedCache = False,
    speculation: options.Speculation = None,
) -> None:
    """Talk with a model, in several turns. Has slash commands, and renders markdown as it streams."""
    sampling = given(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed
    )
    engine = given(
        model=model,
        weights=weights,
        kv_format=kv_format,
        max_model_len=max_model_len,
        threads=threads,
        device=device,
        packed_cache=options.packed_cache(no_packed_cache),
        speculation=speculation,
    )
    from ridgeline.types import RequestError, SamplingParams

    SamplingParams(**sampling)
    from ridgeline.cli.conversation import Conversation
    from ridgeline.cli.progress import fetch
    from ridgeline.llm import LLM

    fetch(model)
    with LLM(**engine) as llm:
        if llm.loaded.chat_template is None:
            raise RequestError("model has no chat template; accepted: a chat model, or `ridgeline run`")
        _Chat(llm, Conversation(system, sampling)).talk()


class _Chat:
    """The loop: read a line, obey a command or answer. Mistakes are one line and the chat goes on."""

    def __init__(self, llm: LLM, conversation: Any) -> None:
        from ridgeline.cli.chat_commands import ChatCommands
        from ridgeline.cli.figures import known_ceilings

        self.llm = llm
        self.conversation = conversation
        self.commands = ChatCommands(conversation)
        self.interactive = sys.stdin.isatty()
        self.rendered = sys.stdout.isatty()
        self.ceilings = known_ceilings(llm.config.threads, self.rendered, llm.config.device)

    def talk(self) -> None:
        from ridgeline.cli.output import note

        if self.interactive:
            note(_GREETING.format(model=self.llm.config.model))
        with _line_editing(self.interactive):
            while not self.commands.left:
                try:
                    self._take(_read_turn(">>> " if self.interactive else ""))
                except EOFError:
                    if self.interactive:
                        print()
                    break
                except KeyboardInterrupt:
                    if not self.interactive:
                        raise
                    print()

    def _take(self, text: str) -> None:
        from ridgeline.types import RidgelineError

        try:
            if text.startswith("/") and not text.startswith("//"):
                print(self.commands.run(text), end="", flush=True)
            elif text.strip():
                self._answer(text[1:] if text.startswith("//") else text)
        except BrokenPipeError:
            raise  # nobody reads the answers any more
        except (RidgelineError, OSError) as error:
            print(f"error: {user_message(error)}", file=sys.stderr, flush=True)

    def _answer(self, text: str) -> None:
        """Ask the model; what it said so far is kept when it is stopped, and nothing when it fails."""
        from ridgeline.cli.figures import Figures
        from ridgeline.cli.output import note

        self.conversation.say("user", text)
        before = self.llm.stats.decode.work
        try:
            output = self._stream()
        except BaseException:
            self.conversation.take_back()
            raise
        if output is None:
            self.conversation.take_back()
            return
        self.conversation.say("assistant", output.outputs[0].text)
        if output.finished:
            figures = Figures.of(output, before, self.llm.stats.decode.work)
            self.commands.last_line = figures.line(self.ceilings)
            if self.rendered:
                note(self.commands.last_line)

    def _stream(self) -> Any:
        """Stream the answer to the conversation; its last state, None if it was stopped before any."""
        from ridgeline.cli.markdown import answer_printer
        from ridgeline.cli.run import check_answer, sampling_params

        params = sampling_params(self.llm, self.conversation.sampling)
        self._make_room(params.max_tokens)
        shown, last = 0, None
        outputs = self.llm.stream_chat(self.conversation.messages(), params)
        with closing(outputs), _stop_on_interrupt() as stopped, answer_printer(self.rendered) as printer:
            for last in outputs:
                grown = last.outputs[0].text
                printer.push(grown[shown:])
                shown = len(grown)
                if stopped():
                    break
        if last is not None:
            check_answer(last)
        return last

    def _make_room(self, wanted_tokens: int | None) -> None:
        """Forget the oldest turns until the conversation leaves room for an answer.

        A quarter of the context is kept for it, or what --max-tokens asks for if that is less.
        """
        from ridgeline.cli.output import note

        context = self.llm.config.max_model_len
        assert context is not None
        room = max(min(wanted_tokens or context, context // 4), 1)
        forgotten = 0
        while len(self.llm.loaded.chat_tokens(self.conversation.messages())) + room > context:
            if not self.conversation.forget_oldest():
                break  # one question alone: the engine says whether it fits
            forgotten += 1
        if forgotten:
            turns = f"{forgotten} turn{'s' if forgotten > 1 else ''}"
            note(f"the context of {context} tokens is full: forgot the oldest {turns}")


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Within the block Ctrl-C only sets what the yielded function tells; a second one interrupts.

    The engine is never interrupted inside a step, which would leave it in between two states.
    """
    pressed = 0

    def note_it(number: int, frame: object) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, note_it)
    try:
        yield lambda: pressed > 0
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _line_editing(interactive: bool) -> Iterator[None]:
    """Editing keys and a history that is kept between chats, where Python has readline."""
    try:
        import readline
    except ImportError:
        interactive = False
    if not interactive:
        yield
        return
    from ridgeline.resources.paths import cache_dir

    history = cache_dir() / "chat_history"
    readline.set_history_length(1000)
    with suppress(OSError):  # there is none before the first chat
        readline.read_history_file(history)
    try:
        yield
    finally:
        with suppress(OSError):  # a chat that cannot be remembered has still been had
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)
            history.chmod(0o600)


def _read_turn(prompt: str) -> str:
    '''One line, or several between """ and """. Raises EOFError at the end of input.'''
    text = input(prompt)
    if not text.startswith(_PARAGRAPH):
        return text
    text = text.removeprefix(_PARAGRAPH)
    while not text.rstrip().endswith(_PARAGRAPH):
        text += "\n" + input("... " if prompt else "")
    return text.rstrip().removesuffix(_PARAGRAPH)
