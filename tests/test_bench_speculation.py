"""Another system's speculation beside ours: turns and ratios with a pretended peer; llama.cpp's driver."""

from __future__ import annotations

import itertools
import math
import random
import sys
import types
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fake_peer
import pytest

sys.path.insert(0, str(fake_peer.ROOT))

from bench import speculation, speculation_peer
from bench.peers import figures
from bench.peers.llama_lookup import LookupDriver
from bench.peers.protocol import Options
from bench.peers.system import AbsentError, FailedError
from bench.speculation import Answered, Bench, Cell, Measured
from bench.speculation_peer import Against, Peer

PROMPT = tuple(range(20, 50))
TOKENS = 8
COPY = Cell.parse("copy:0:1")


class Pretended(Bench):
    """Our side without an engine: fixed answers, and a log of the turns that it had."""

    def __init__(self, log: Path, peers: Sequence[Peer]) -> None:
        self._log, self._tokens, self._peers = log, TOKENS, peers

    def read(self, cell: Cell) -> None:
        pass

    def prompt(self, kind: str, index: int) -> tuple[int, ...]:
        return PROMPT

    def _answer(self, cell: Cell, seed: int, speculated: bool) -> Answered:
        with self._log.open("a") as log:
            log.write(f"ours {speculated}\n")
        return Answered([(1, *[7] * 5, 8, 7)], 1e-7 if speculated else 3e-7, 10, 5)


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Callable[..., list[Peer]]]:
    """Pretended peers, started, each with its options."""
    started: list[Peer] = []

    def begin(*arguments: str) -> list[Peer]:
        started.extend(Peer(launch, 100) for launch in launches(fake_peer.write(tmp_path), *arguments))
        speculation_peer.start_all(started, 100)
        return started

    yield begin
    for peer in started:
        peer.close()


def launches(python: str, *arguments: str) -> list[speculation_peer.Launch]:
    parser = ArgumentParser()
    speculation_peer.add_flags(parser)
    given = [argument.replace("PYTHON", python) for argument in arguments]
    return speculation_peer.launches(parser.parse_args(given), "/models/ours.gguf", 2)


def test_peers_take_turns_with_ours_in_the_cells_that_they_can_answer(
    peers: Callable[..., list[Peer]], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    options = (f"llama:log={log}", "llama:as=llama", "llama:seconds=1.4e-6")
    bench = Pretended(log, peers("--peer", "llama=PYTHON", "--peer-option", *options))
    results = speculation.measure(bench, [COPY, Cell.parse("chat:0:1"), Cell.parse("copy:0.8:1")], 2)
    turn, theirs = ["ours True", "ours False"], [f"llama 1x{len(PROMPT)}+{TOKENS - 1}"]
    other = turn[::-1]
    compared = [*theirs, *other, *turn, *theirs, *theirs, *other]
    assert log.read_text().splitlines() == compared + 2 * [*other, *turn, *other]
    told = results["copy:0:1"]
    assert told["ratio"] == pytest.approx(3.0)
    assert (told["drafted"], told["accepted"]) == (20, 10)
    peer = told["peers"]["llama"]
    assert peer["ratio"] == pytest.approx(2.0)  # 1.4e-6 s for seven tokens, and 1e-7 s for one of ours
    assert peer["tokens_per_s"] == pytest.approx(5e6)
    assert (peer["alike_tokens"], peer["tokens"]) == (5, 7)
    assert "peers" not in results["chat:0:1"]
    assert "over llama     2.00×" in speculation.report(COPY, told)
    assert "5 of 7 as ours" in speculation.report(COPY, told)


@pytest.mark.parametrize(
    ("behaviour", "why"), [("short", "has 6 tokens; accepted: 7"), ("dying", "out of luck")]
)
def test_a_peer_that_fails_ends_the_measurement(
    peers: Callable[..., list[Peer]], tmp_path: Path, behaviour: str, why: str
) -> None:
    started = peers("--peer", "llama=PYTHON", "--peer-option", f"llama:be={behaviour}")
    with pytest.raises(SystemExit, match=f"a peer failed at copy:0:1: .*{why}"):
        speculation.measure(Pretended(tmp_path / "log", started), [COPY], 1)


def test_a_peer_with_another_vocabulary_is_no_peer(tmp_path: Path) -> None:
    (launch,) = launches(fake_peer.write(tmp_path), "--peer", "llama=PYTHON")
    peer = Peer(launch, 100)
    try:
        with pytest.raises(AbsentError, match=r"^llama is absent: its vocabulary has 100 tokens"):
            speculation_peer.start_all([peer], 99)
    finally:
        peer.close()


def test_our_answer_must_have_as_many_tokens() -> None:
    with pytest.raises(FailedError, match="it decoded 3 tokens, and we 2"):
        Against().add({"seconds": 1.0, "outputs": [[1, 2, 3]]}, (1, 2))


def test_peers_have_their_own_models_and_options() -> None:
    first, second = launches(
        *("/there/python", "--peer", "llama=PYTHON", "llama-2=python"),
        *("--peer-model", "llama-2=/models/other.gguf"),
        *("--peer-option", "llama-2:num_pred_tokens=2", "llama-2:flash_attn=true"),
    )
    assert (first.kind, first.python, first.model) == ("llama_lookup", "/there/python", "/models/ours.gguf")
    assert (second.python, second.model) == ("python", "/models/other.gguf")
    assert (first.options, second.options) == ((), ("num_pred_tokens=2", "flash_attn=true"))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--peer", "vllm=python"], "peer is 'vllm'; accepted: llama"),
        (["--peer", "llama"], "--peer has 'llama'; accepted: NAME=VALUE"),
        (["--peer-model", "llama=file"], "'llama' is none of the systems"),
        (["--peer", "llama=python", "--peer-option", "llama"], "accepted: NAME:KEY=VALUE"),
        (["--peer", "llama=python", "--cells", "chat:0:1"], "accepted: one of copy:0:1, quote:0:1"),
        (["--tokens", "1"], "--tokens is 1; accepted: at least 2"),
        (["--rounds", "0"], "--rounds is 0; accepted: at least 1"),
        (["--seconds", "0"], "--seconds is 0; accepted: more than 0"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_model_is_loaded(
    arguments: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    monkeypatch.setattr(sys, "argv", ["speculation", "--model", str(model), *arguments])
    with pytest.raises(SystemExit, match=why):
        speculation.main()


def test_an_interval_is_what_the_signed_rank_test_does_not_reject() -> None:
    rng = random.Random(1)
    ratios = [math.exp(rng.gauss(0.1, 0.2)) for _ in range(10)]
    sums = [sum(each) for each in itertools.product(*((0, rank) for rank in range(1, 11)))]

    def probability(centre: float) -> float:
        """Of sums of signed ranks as far off as these ratios', were that their centre."""
        away = sorted((math.log(each / centre) for each in ratios), key=abs)
        less = min(sum(rank for rank, each in enumerate(away, 1) if sign * each > 0) for sign in (1, -1))
        return 2 * sum(each <= less for each in sums) / len(sums)

    low, high = figures.interval(ratios)
    assert probability(low * 1.001) >= 0.05 > probability(low / 1.001)
    assert probability(high / 1.001) >= 0.05 > probability(high * 1.001)
    assert figures.interval([8.0, 1.0, 2.0, 4.0, 16.0, 32.0]) == pytest.approx((1, 32))
    assert math.isnan(figures.interval([2.0] * 5)[0])
    assert figures.of_rounds([3.0] * 6)["low_95"] == pytest.approx(3.0)
    assert figures.interval([*ratios, 100.0])[0] > 0.95 * low  # one bad round is one round
    assert Measured([1.0, 1.0], [2.0, 4.0]).told()["ratio"] == 3.0


# ------------------------------------------------------------------------- llama-cpp-python's driver


class FakeLlama:
    """The class's part that the driver uses: one call of the drafter before each run but the first."""

    def __init__(
        self,
        model_path: str,
        *,
        n_ctx: int = 512,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        flash_attn: bool = False,
        draft_model: Any = None,
        verbose: bool = True,
        **kwargs: Any,
    ) -> None:
        assert not kwargs
        self.given = (model_path, n_ctx, n_threads, n_threads_batch, flash_attn, verbose)
        self.draft_model = draft_model

    def n_vocab(self) -> int:
        return 100

    def generate(self, tokens: Sequence[int], temp: float = 0.8) -> Iterator[int]:
        assert temp == 0.0
        yield tokens[-1]
        for run in itertools.count():
            guesses = self.draft_model(list(tokens))
            yield from [run] * (1 + len(guesses))


class FakeLookup:
    def __init__(self, max_ngram_size: int = 2, num_pred_tokens: int = 10) -> None:
        self.guesses = num_pred_tokens

    def __call__(self, input_ids: Any, /, **kwargs: Any) -> list[int]:
        return [0] * self.guesses


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LookupDriver]:
    library = types.ModuleType("llama_cpp")
    speculative = types.ModuleType("llama_cpp.llama_speculative")
    vars(library).update(Llama=FakeLlama, __version__="0.3")
    vars(speculative).update(LlamaPromptLookupDecoding=FakeLookup)
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_speculative", speculative)
    return lambda **options: LookupDriver(Options("file", 3, 40, 1, options))


def test_the_driver_gives_what_follows_the_first_token(driver: Callable[..., LookupDriver]) -> None:
    ready = driver()
    assert ready._llama.given == ("file", 40, 3, 3, False, False)
    assert (ready.version, ready.vocabulary) == ("0.3", 100)
    answer = ready.decode([[5, 6]], 25)
    assert answer.outputs == [[0] * 11 + [1] * 11 + [2] * 3]
    assert answer.more == {"passes": 3}
    assert ready.decode([[5, 6]], 25).more == {"passes": 3}
    assert ready.prefill([[5, 6]]).outputs == [[6]]


def test_options_go_to_the_drafter_or_to_the_class(driver: Callable[..., LookupDriver]) -> None:
    ready = driver(num_pred_tokens=1, flash_attn=True)
    assert ready._llama.given[4] is True
    assert ready.decode([[5]], 4).outputs == [[0, 0, 1, 1]]
    with pytest.raises(ValueError, match="option is 'num_tokens'; accepted: max_ngram_size, num_pred_tokens"):
        driver(num_tokens=1)


def test_the_driver_runs_one_sequence_within_its_context(driver: Callable[..., LookupDriver]) -> None:
    with pytest.raises(ValueError, match="prompts are 2; accepted: 1"):
        driver().decode([[1], [2]], 4)
    with pytest.raises(ValueError, match=r"30 \+ 11 tokens; accepted: 40 together"):
        driver().decode([[1] * 30], 10)


def test_cells_have_as_many_rounds_as_there_is_time_for() -> None:
    rounds = speculation.rounds_within
    assert rounds(math.inf, 9.0, 7) == 7
    assert rounds(25.0, 0.5, 48) == 48
    assert rounds(25.0, 1.0, 48) == 24  # even, so that turns are
    assert rounds(25.0, 60.0, 48) == speculation.LEAST_ROUNDS
    assert rounds(25.0, 60.0, 4) == 4
