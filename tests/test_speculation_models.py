"""Speculation changes no token of real models: on each executor, with trees of any shape that are accepted
in part at every depth, and with the drafters that engines have; and what is drawn behind guesses has the
probabilities of the target.

The fake executor's tests have the engine's corners; here kernels, memory and sampling are the real ones.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_executor import FakeExecutor, make_engine
from forced_drafts import ForcedDrafting
from running import PAGES, Loaded, load
from test_engine import run
from test_scheduler_classes import pace_of
from test_speculation import truth_of
from tiny_gated import make_gated
from tiny_models import TinyModel, write_tokenizer
from worded_models import make_worded

from ridgeline.cache.kv import KVCache
from ridgeline.engine import Engine, ModelFacts
from ridgeline.model.tokenizer import Tokenizer
from ridgeline.native import isa_levels
from ridgeline.sampling.constraints import Constraints
from ridgeline.sampling.drafting.speculator import Speculator
from ridgeline.scheduling.drafting import Drafting
from ridgeline.scheduling.plan import Drafted
from ridgeline.scheduling.scheduler import Scheduler
from ridgeline.types import (
    Float32Array,
    Request,
    RequestOutput,
    SamplingParams,
    SpeculationParams,
    StructuredOutputsParams,
)

Tiny = Callable[[str], TinyModel]
Answers = dict[str, RequestOutput]
MAX_LEN = 160


class Model:
    """A tiny model on an executor, for one engine after the other."""

    def __init__(self, folder: Path, kind: str, weights: str, kv_format: str, threads: int) -> None:
        self.loaded: Loaded = load(folder, kind, weights, kv_format, threads)
        self.tokenizer = Tokenizer.from_file(folder)
        self.windows = tuple(group.window for group in self.loaded.program.groups)
        self.size = self.loaded.program.output.width
        self.ends = frozenset(self.tokenizer.eos_ids)
        self._constraints = Constraints(self.tokenizer, self.size, self.ends)

    def engine(self, seats: int = 8, budget: int = 64, pages: int = PAGES) -> Engine:
        """One of its own, on executor and forms that are shared: it is not to be closed."""
        cache = KVCache(self.windows, (pages,) * len(self.windows))
        facts = ModelFacts(self.size, MAX_LEN, self.ends)
        loaded, detokenizer = self.loaded, self.tokenizer.detokenizer
        scheduler = Scheduler(cache, seats, budget)
        return Engine(
            loaded.executor, loaded.handle, scheduler, facts, detokenizer, constraints=self._constraints
        )

    def alone(self, requests: Sequence[Request]) -> Answers:
        """What each gets by itself, without guesses."""
        answers: Answers = {}
        for request in requests:
            answers |= run(self.engine(), [request])
        return answers

    def close(self) -> None:
        self._constraints.close()
        self.loaded.executor.close()


class Noting(ForcedDrafting):
    """Forced drafting that notes, of trees that were accepted in part, to which depth."""

    partly: Counter[int]

    def verified(self, drafted: Drafted, nodes: Sequence[int]) -> None:
        super().verified(drafted, nodes)
        if len(nodes) < max(drafted.tree.depths()):
            self.partly[len(nodes)] += 1


def forced(engine: Engine, seed: int, answers: Answers, right: float, partly: Counter[int]) -> Noting:
    drafting = Noting(seed, engine.model.vocabulary_size, truth_of(engine, answers), right)
    drafting.partly = partly
    engine.scheduler.drafting = drafting  # type: ignore[assignment]
    return drafting


# ------------------------------------------------------------------------------------------ requests

FORMS = [
    StructuredOutputsParams(regex=r"[ab]{3,9}-[0-9]{2,5}é"),
    StructuredOutputsParams(choice=("yes, of course", "yes, but", "no")),
    StructuredOutputsParams(
        json={
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": False,
        }
    ),
]
EXTRAS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.9, "n": 2},
    {"structured_outputs": FORMS[0], "logprobs": 1},
    {"repetition_penalty": 1.3, "logprobs": 2},
    {"top_k": 20, "min_p": 0.01},
    {"structured_outputs": FORMS[1], "n": 2},
    {"presence_penalty": 0.8, "frequency_penalty": 0.6, "n": 3, "logprobs": 0},
    {"typical_p": 0.9, "min_tokens": 3},
    {"structured_outputs": FORMS[2], "repetition_penalty": 1.1, "top_p": 0.95},
    {"dry_multiplier": 0.8, "logit_bias": {40: 1.5, 41: -3.0}},
    {"mirostat": 2, "stop_token_ids": (77, 99)},
    {"xtc_probability": 0.5, "n": 2, "logprobs": 3},
    {"structured_outputs": FORMS[2], "n": 2, "logprobs": 2},
    {"prompt_logprobs": 1, "top_n_sigma": 1.5},
    {"stop": ("e", "qu"), "ignore_eos": True},
]
TEMPERATURES = (0.0, 0.3, 0.8, 1.2)


def requests_of(model: Model, count: int, seed: int, longest: int = 60, most: int = 24) -> list[Request]:
    """Random prompts; each temperature meets all that there is beside it, as the seed goes on."""
    rng = random.Random(seed)
    requests = []
    for place in range(seed * count, (seed + 1) * count):
        prompt = tuple(rng.randrange(3, model.tokenizer.vocab_size) for _ in range(rng.randint(1, longest)))
        extras, temperature = EXTRAS[place % len(EXTRAS)], TEMPERATURES[place % len(TEMPERATURES)]
        params = SamplingParams(
            temperature=temperature,
            seed=rng.randrange(2**64),
            max_tokens=rng.randint(most // 3, most),
            **extras,
            speculation=True,
        )
        requests.append(Request(str(place), prompt, params))
    return requests


def contents(output: RequestOutput) -> list[tuple[Any, ...]]:
    each = [(o.token_ids, o.text, o.finish_reason, o.stop_reason, o.logprobs) for o in output.outputs]
    return [*each, (output.prompt_logprobs,)]


def assert_same(seen: RequestOutput, expected: RequestOutput) -> None:
    assert contents(seen) == contents(expected)


def assert_same_tokens(seen: RequestOutput, expected: RequestOutput) -> None:
    """Where products may differ in the last place by how many rows there are, log-probabilities do too."""
    assert [part[:4] for part in contents(seen)] == [part[:4] for part in contents(expected)]
    for one, other in zip(seen.outputs, expected.outputs, strict=True):
        assert (one.logprobs is None) == (other.logprobs is None)
        for mine, theirs in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)


def in_batches(
    model: Model, requests: Sequence[Request], answers: Answers, partly: Counter[int], seed: int
) -> Answers:
    """All of them in one engine, of random size, where they come at random."""
    rng = random.Random(seed)
    budget = rng.choice([24, 50, 128])
    pages = rng.choice([PAGES, 24])
    engine = model.engine(seats=rng.choice([3, 8, 16]), budget=budget, pages=pages)
    drafting = forced(engine, seed, answers, rng.choice([0.7, 0.9]), partly)
    results: Answers = {}
    coming = rng.sample(requests, len(requests))
    while coming or engine.has_work:
        for _ in range(rng.choice([0, 0, 1, 4]) if engine.has_work else 1):
            if coming:
                engine.add(coming.pop(), stream=False)
        results |= {output.request_id: output for output in engine.step()}
    engine.scheduler.check_integrity()
    assert all(pool.used_pages == 0 for pool in engine.scheduler.cache.pools)
    assert drafting.accepted
    assert drafting.moved, "no side branch was ever accepted"
    return results


# ----------------------------------------------------------------------------------- forced on each executor

SETTINGS = [
    ("worded", "W8A8-g32", "KV16"),
    ("gemma3", "W4A8-g32", "KV8"),
    ("llama3", "W16A16", "KV16"),
    ("gpt2", "W8A8-g32", "KV8"),
]
REQUESTS = 50
"""For each setting: 200 at each ISA level."""


SHORT = 6


def shallow(model: Any) -> Any:
    """Two layers of a model, the second with a window that a few tokens leave."""
    config = model.config
    config.num_hidden_layers, config.sliding_window = 2, SHORT
    config.layer_types = config.layer_types[:2]
    model.model.layers = model.model.layers[:2]
    return model


@pytest.fixture(scope="module")
def folder_of(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def folder(name: str) -> Path:
        if name == "worded":
            return make_worded(tmp_path_factory.mktemp(name))
        if name == "shallow":
            made = make_gated("qwen2-window", tmp_path_factory.mktemp(name), shallow).folder
            write_tokenizer(made)
            return made
        return tiny(name).folder

    return folder


@pytest.fixture(scope="module")
def make(folder_of: Callable[[str], Path]) -> Iterator[Callable[..., Model]]:
    made: dict[tuple[Any, ...], Model] = {}

    def make_one(family: str, *rest: Any) -> Model:
        if (family, *rest) not in made:
            made[family, *rest] = Model(folder_of(family), *rest)
        return made[family, *rest]

    yield make_one
    for model in made.values():
        model.close()


@pytest.mark.parametrize("isa", isa_levels())
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_forced_trees_change_nothing_on_the_cpu(
    make: Callable[..., Model], setting: tuple[str, str, str], isa: str
) -> None:
    """To the bit: by themselves, and in random batches on two threads."""
    family, weights, kv_format = setting
    model = make(family, isa, weights, kv_format, 2)
    seed = SETTINGS.index(setting) + len(SETTINGS) * isa_levels().index(isa)
    requests = requests_of(model, REQUESTS, seed)
    answers = model.alone(requests)
    partly: Counter[int] = Counter()
    for request in requests:
        engine = model.engine()
        forced(engine, seed, answers, 0.8, partly)
        assert_same(run(engine, [request])[request.id], answers[request.id])
    for each in range(2):
        results = in_batches(model, requests, answers, partly, 2 * seed + each)
        for request in requests:
            assert_same(results[request.id], answers[request.id])
    assert set(range(5)) <= set(partly), "trees were not accepted in part at every depth"
    told = Counter(choice.finish_reason for answer in answers.values() for choice in answer.outputs)
    assert set(told) == {"length", "stop"}


@pytest.mark.parametrize("family", ["worded", "gemma3"])
def test_forced_trees_change_no_token_on_the_reference(make: Callable[..., Model], family: str) -> None:
    """Its matrix products may differ in the last place with their number of rows, so that only tokens are
    the same, of logits that are apart by more than that."""
    model = make(family, "reference", "W32A32", "KV32", 1)
    requests = requests_of(model, 10, 40, longest=30, most=12)
    answers = model.alone(requests)
    results = in_batches(model, requests, answers, Counter(), 7)
    for request in requests:
        assert_same_tokens(results[request.id], answers[request.id])


def test_forced_trees_change_no_token_on_cuda(make: Callable[..., Model]) -> None:
    """Beside one that asks for no guesses and is launched ahead, and beyond a window. Without a GPU a step
    takes long: those without guesses are a batch too."""
    model = make("shallow", "cuda", "W32A32", "KV32", 1)
    assert model.loaded.executor.asynchronous
    assert model.windows == (None, SHORT)
    requests = requests_of(model, 5, 24, longest=5, most=9)
    last = requests.pop()
    requests.append(Request("plain", last.prompt_token_ids, replace(last.params, speculation=False)))
    answers = run(model.engine(), requests)
    results = in_batches(model, requests, answers, Counter(), 3)
    for request in requests:
        assert_same_tokens(results[request.id], answers[request.id])


# ------------------------------------------------------------------------------------- drafters of engines


class Watched(Drafting):
    """Drafting in earnest, by steps that take as long whatever they hold; notes how many guesses of each
    drafter were right, and of how many in answers of a form."""

    def __init__(self, windows: tuple[int | None, ...]) -> None:
        super().__init__(Speculator.of_lookups, pace_of(1.0, 1e-6, windows=windows), None)
        self.right: Counter[str] = Counter()
        self.right_formed: Counter[str] = Counter()

    def verified(self, drafted: Drafted, nodes: Sequence[int]) -> None:
        super().verified(drafted, nodes)
        self.right[drafted.tree.drafter] += len(nodes)
        if drafted.sequence.chooser.constraint is not None:
            self.right_formed[drafted.tree.drafter] += len(nodes)


LONG_KEYS = StructuredOutputsParams(
    json={
        "type": "object",
        "properties": {
            "first_property_of_the_answer": {"enum": ["red", "green", "blue"]},
            "second_property_of_the_answer": {"type": "boolean"},
            "third_property_of_the_answer": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": [f"{each}_property_of_the_answer" for each in ("first", "second", "third")],
        "additionalProperties": False,
    }
)
REPEATING = StructuredOutputsParams(regex=r"((the sky|blue air) ){12,40}")
DRAFTERS = ("auto", "ngram", "suffix", "grammar")


def repetitive(model: Model, count: int, seed: int) -> list[Request]:
    """Prompts of a few tokens over and over, and answers that like to repeat what there is."""
    rng = random.Random(seed)
    requests = []
    for place in range(count):
        words = [rng.randrange(3, model.tokenizer.vocab_size) for _ in range(rng.randint(2, 6))]
        params = SamplingParams(
            temperature=TEMPERATURES[place % 4],
            seed=place,
            max_tokens=rng.randint(16, 60),
            frequency_penalty=rng.choice([-2.0, -1.0]),
            structured_outputs=(None, LONG_KEYS, REPEATING)[place % 3],
            n=rng.choice([1, 1, 2]),
            logprobs=rng.choice([None, 1]),
            speculation=SpeculationParams(DRAFTERS[place // 3 % 4], rng.choice([None, 5, 30])),
        )
        requests.append(Request(str(place), tuple(words * rng.randint(2, 8)), params))
    return requests


@pytest.mark.parametrize("family", ["worded", "gemma3"])
def test_drafters_change_nothing(make: Callable[..., Model], family: str) -> None:
    """All of them guess and are right, in free answers and in such as have a form; what was said once is
    guessed the next time."""
    model = make(family, isa_levels()[0], "W8A8-g32", "KV8", 2)
    requests = repetitive(model, 24, 3)
    answers = model.alone(requests)
    engine = model.engine(budget=100)
    drafting = engine.scheduler.drafting = Watched(model.windows)
    for _ in range(2):
        results = run(engine, requests)
        for request in requests:
            assert_same(results[request.id], answers[request.id])
    totals = drafting.totals
    assert {name: each.accepted for name, each in totals.items()} == drafting.right
    for name in ("ngram", "suffix"):
        assert 30 < drafting.right_formed[name] < drafting.right[name] - 30
        assert totals[name].accepted < totals[name].drafted, "none was ever wrong"
    assert drafting.right["grammar"] == drafting.right_formed["grammar"] == totals["grammar"].drafted > 30


# ----------------------------------------------------------------------------- probabilities behind guesses

SIX = np.array([0.35, 0.25, 0.18, 0.12, 0.07, 0.03])


def cooled(temperature: float, kept: int) -> np.ndarray:
    """The exact probabilities of the most probable tokens alone."""
    weights = np.where(np.arange(6) < kept, SIX ** (1 / temperature), 0.0)
    return weights / weights.sum()


CHI_SQUARE = {3: 16.27, 5: 20.52, 9: 27.88, 15: 37.70, 25: 52.62, 35: 66.62}
"""Exceeded in a thousandth of all cases, by degrees of freedom: from tables of the distribution."""


@pytest.mark.parametrize(
    ("late", "temperature", "extras", "kept"),
    [(False, 1.0, {}, 6), (True, 1.0, {}, 6), (False, 1.5, {"logprobs": 0}, 6), (True, 0.8, {"top_k": 4}, 4)],
)
def test_tokens_behind_guesses_have_the_exact_probabilities(
    monkeypatch: pytest.MonkeyPatch, late: bool, temperature: float, extras: dict[str, Any], kept: int
) -> None:
    """Of a vocabulary so small that guesses at random are often right; each token by itself, and with the
    one before it, as they are drawn independently."""
    monkeypatch.setattr(FakeExecutor, "asynchronous", late)

    def same(logits: Float32Array, seen: list[int]) -> None:
        logits[:] = np.log(SIX)

    engine = make_engine(FakeExecutor(vocabulary=6, edit=same), max_num_batched_tokens=256)
    drafting = ForcedDrafting(2, 6)
    engine.scheduler.drafting = drafting  # type: ignore[assignment]
    many = [
        Request(
            str(seed),
            (seed % 6,),
            SamplingParams(temperature=temperature, seed=seed, max_tokens=41, **extras),
        )
        for seed in range(100)
    ]
    texts = np.array([output.outputs[0].token_ids for output in run(engine, many).values()])
    assert drafting.accepted > 500
    expected = cooled(temperature, kept)
    once, pairs = np.zeros(6), np.zeros((6, 6))
    np.add.at(once, texts, 1)
    np.add.at(pairs, (texts[:, :-1], texts[:, 1:]), 1)
    for counts, shares in ((once, expected), (pairs, np.outer(expected, expected))):
        likely = shares > 0
        assert not counts[~likely].any()
        wanted = counts.sum() * shares[likely]
        statistic = ((counts[likely] - wanted) ** 2 / wanted).sum()
        assert statistic < CHI_SQUARE[likely.sum() - 1]
