"""Lower tiers of the prefix cache: what goes down comes up again, bit for bit, or is not believed."""

from __future__ import annotations

import os
import stat
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from cache_machine import CacheMachine, contents, finish
from fake_executor import FakeExecutor, make_engine
from full_disk import largest_file
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test
from tier_engines import files_of, settle, tiered_engine
from tiny_models import TinyModel

from ridgeline import LLM
from ridgeline.cache import disk as disk_module
from ridgeline.cache.disk import HEADER_BYTES, DiskTier
from ridgeline.cache.ladder import Ladder
from ridgeline.cache.memory import MemoryTier
from ridgeline.cache.names import KEY_BYTES, key_of, name_on, root_name
from ridgeline.cache.radix import Scope
from ridgeline.cache.radix import key_of as spelled
from ridgeline.config import PAGE_TOKENS
from ridgeline.model.checkpoint import files
from ridgeline.resources import probe
from ridgeline.resources.ceilings import Ceilings
from ridgeline.resources.transfers import FetchChoice
from ridgeline.types import ConfigError, HostPage, Move, Request, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
LATE = pytest.mark.parametrize("late", [False, True], ids=["at once", "one step late"])
PAGE_BYTES = FakeExecutor().host_page_bytes[0]


def text(length: int, first: int = 0) -> tuple[int, ...]:
    return tuple((first + 3 * index) % 97 for index in range(length))


def alone(request: Request, **executor: object) -> list[object]:
    return contents(finish(make_engine(FakeExecutor(**executor), max_num_batched_tokens=256), request))  # type: ignore[arg-type]


# --------------------------------------------------------------------------------- down and up again


@LATE
@pytest.mark.parametrize("windows", [(None,), (None, 20), (20, None), (33,)])
def test_the_next_engine_starts_warm(
    tmp_path: Path, late: bool, windows: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeExecutor, "asynchronous", late)
    request = Request("a", text(200), GREEDY)
    shape = {"windows": windows, "pages": (64,) * len(windows)}
    for found in (0, 192):
        engine = tiered_engine(tmp_path, FakeExecutor(**shape))
        output = finish(engine, request)
        assert output.cached_tokens == found
        assert contents(output) == alone(request, **shape)
        engine.scheduler.check_integrity()
        engine.close()
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files_of(tmp_path))
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


@LATE
@pytest.mark.parametrize("memory_bytes", [None, 4 * PAGE_BYTES, 1 << 20])
def test_evicted_pages_come_back(
    tmp_path: Path, late: bool, memory_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeExecutor, "asynchronous", late)
    engine = tiered_engine(tmp_path, FakeExecutor(pages=(14,)), memory_bytes=memory_bytes)
    for turn in range(3):
        for first in range(4):
            request = Request("a", text(150, first), GREEDY)
            output = finish(engine, request)
            assert output.cached_tokens == (144 if turn else 0)
            assert contents(output) == alone(request)
            engine.scheduler.check_integrity()
            engine.scheduler.cache.tiers.ladder.drain(10.0)
    engine.close()


def test_what_becomes_of_pages_is_counted(tmp_path: Path) -> None:
    page_file = HEADER_BYTES + PAGE_BYTES
    engine = tiered_engine(tmp_path, FakeExecutor(pages=(14,)), memory_bytes=4 * PAGE_BYTES)
    tiers = engine.scheduler.cache.tiers
    for first in range(2):
        finish(engine, Request("a", text(150, first), GREEDY))
        settle(engine)
    record = tiers.record()
    assert (record.fetched_tokens, record.misses, record.declined) == (0, 2, 0)
    assert (record.spilled_pages, record.dropped_pages, record.damaged_pages) == (18, 0, 0)
    memory, disk = record.tiers
    assert (memory.name, memory.pages, memory.bytes) == ("memory", 4, 4 * PAGE_BYTES)
    assert (disk.name, disk.pages, disk.bytes) == ("disk", 18, 18 * page_file)
    assert memory.fetched_pages == disk.fetched_pages == 0
    assert finish(engine, Request("a", text(150), GREEDY)).cached_tokens == 144
    record = tiers.record()
    fetched = sum(tier.fetched_pages for tier in record.tiers)
    assert 0 < record.fetched_tokens == fetched * PAGE_TOKENS <= 144
    assert record.tiers[1].fetch_seconds > 0
    engine.close()
    for path in files_of(tmp_path):
        flip(path, -1)
    slow = tiered_engine(tmp_path, compute_s=lambda begin, end: 1e-9)
    slow.scheduler.cache.tiers.ladder.choice.link("disk").observe(1, 1.0)
    assert finish(slow, Request("a", text(150), GREEDY)).cached_tokens == 0
    assert slow.scheduler.cache.tiers.record().declined == 1
    slow.close()
    engine = tiered_engine(tmp_path)
    finish(engine, Request("a", text(150), GREEDY))
    assert engine.scheduler.cache.tiers.record().damaged_pages == 1
    engine.close()


def test_memory_is_a_tier_of_its_own() -> None:
    engine = tiered_engine(None, FakeExecutor(pages=(14,)), memory_bytes=1 << 20)
    for found in (0, 144):
        for first in range(4):
            assert finish(engine, Request("a", text(150, first), GREEDY)).cached_tokens == found
            engine.scheduler.cache.tiers.ladder.drain(10.0)
    ladder = engine.scheduler.cache.tiers.ladder
    ladder.check_integrity()
    assert ladder.memory.used_bytes > 30 * PAGE_BYTES
    engine.close()


def test_what_others_read_does_not_wait_for_a_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiered_engine(tmp_path)
    finish(engine, Request("a", text(200), GREEDY))
    engine.close()
    held = threading.Event()
    read = DiskTier.read
    monkeypatch.setattr(DiskTier, "read", lambda *args: held.wait(10) and read(*args))
    engine = tiered_engine(tmp_path)
    engine.add(Request("fetched", text(200), GREEDY), stream=False)
    engine.add(Request("same", (*text(180), 1, 2, 3), GREEDY), stream=False)
    assert finish(engine, Request("other", text(60, first=1), GREEDY)).outputs[0].token_ids
    engine.scheduler.check_integrity()
    held.set()
    told = {}
    while engine.has_work:
        told |= {output.request_id: output for output in engine.step()}
    assert (told["fetched"].cached_tokens, told["same"].cached_tokens) == (192, 176)
    engine.close()


def test_an_aborted_fetch_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiered_engine(tmp_path)
    finish(engine, Request("a", text(200), GREEDY))
    engine.close()
    held = threading.Event()
    read = DiskTier.read
    monkeypatch.setattr(DiskTier, "read", lambda *args: held.wait(10) and read(*args))
    engine = tiered_engine(tmp_path)
    engine.add(Request("a", text(200), GREEDY), stream=False)
    assert engine.step() == []
    engine.abort("a")
    held.set()
    settle(engine)
    assert contents(finish(engine, Request("b", text(200), GREEDY))) == alone(Request("b", text(200), GREEDY))
    engine.close()


def test_a_full_queue_lets_go_of_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    write = DiskTier.write
    monkeypatch.setattr(DiskTier, "write", lambda *args: held.wait(10) and write(*args))
    engine = tiered_engine(tmp_path, FakeExecutor(pages=(14,)), queue_bytes=3 * PAGE_BYTES)
    for first in range(4):
        request = Request("a", text(150, first), GREEDY)
        assert contents(finish(engine, request)) == alone(request)
    held.set()
    assert engine.scheduler.cache.tiers.ladder.drain(10.0)
    assert len(files_of(tmp_path)) == 3
    record = engine.scheduler.cache.tiers.record()
    assert record.spilled_pages == 3
    assert record.dropped_pages > 10
    engine.close()


# ------------------------------------------------------------------------------- what is not believed


def cold(folder: Path, identity: bytes = b"model", salt: str = "") -> int:
    """What an engine finds there of the usual prompt; its answer must be right in any case."""
    engine = tiered_engine(folder, identity=identity)
    request = Request("a", text(200), GREEDY, salt)
    output = finish(engine, request)
    assert contents(output) == alone(request)
    engine.close()
    return output.cached_tokens


def keep(folder: Path) -> list[Path]:
    """The files of the usual prompt and answer, in the order of its pages."""
    engine = tiered_engine(folder)
    finish(engine, Request("a", text(200), GREEDY))
    engine.close()
    names = name_on(root_name(b"model", Scope()), spelled(text(192)))
    paths = [folder / (key_of(names[i * 32 : i * 32 + 32], 0).hex() + ".kv") for i in range(12)]
    assert sorted(paths) == files_of(folder)
    return paths


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("at", [0, 8, 8 + KEY_BYTES, HEADER_BYTES - 1, HEADER_BYTES, -1])
def test_a_damaged_page_is_removed(tmp_path: Path, at: int) -> None:
    damaged = keep(tmp_path)[5]
    whole = damaged.read_bytes()
    flip(damaged, at)
    assert cold(tmp_path) == 80
    assert damaged.read_bytes() == whole, "it was not written again"


@pytest.mark.parametrize(
    "size", [0, 7, HEADER_BYTES, HEADER_BYTES + PAGE_BYTES - 1, HEADER_BYTES + PAGE_BYTES + 1]
)
def test_a_page_of_another_length_is_removed(tmp_path: Path, size: int) -> None:
    paths = keep(tmp_path)
    os.truncate(paths[0], size)
    assert cold(tmp_path) == 0
    assert paths[0].stat().st_size == HEADER_BYTES + PAGE_BYTES


def test_a_page_under_anothers_name_is_removed(tmp_path: Path) -> None:
    paths = keep(tmp_path)
    paths[3].write_bytes(paths[4].read_bytes())
    assert cold(tmp_path) == 48


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    paths = keep(tmp_path)
    paths[2].rename(tmp_path / "elsewhere")
    paths[2].symlink_to(tmp_path / "elsewhere")
    paths[7].unlink()
    os.mkfifo(paths[7])
    assert cold(tmp_path) == 32


def test_another_model_or_salt_finds_nothing(tmp_path: Path) -> None:
    keep(tmp_path)
    assert cold(tmp_path, identity=b"another") == 0
    assert cold(tmp_path, salt="tenant") == 0
    assert cold(tmp_path) == 192


def test_half_written_files_are_cleared_away(tmp_path: Path) -> None:
    old, new, own = (tmp_path / name for name in (".partial-0", ".partial-1", "notes.txt"))
    for path in (old, new, own):
        path.write_bytes(b"RIDGEKV1")
    os.utime(old, (0, 0))
    DiskTier(tmp_path)
    assert not old.exists()
    assert new.exists(), "another process may be writing it"
    assert own.exists()


def test_names_tell_every_scope_apart() -> None:
    scopes = [
        Scope(),
        Scope(salt="a"),
        Scope(adapter="a"),
        Scope(first_position=1),
        Scope(preceding=(b"a",)),
        Scope(preceding=(b"", b"a")),
        Scope(preceding=(b"a", b"")),
        Scope(salt="a\ud800"),
    ]
    roots = {root_name(identity, scope) for scope in scopes for identity in (b"", b"a")}
    assert len(roots) == 2 * len(scopes)
    whole = name_on(b"root", spelled(text(64)))
    assert whole == name_on(b"root", spelled(text(32))) + name_on(whole[32:64], spelled(text(64)[32:]))


# --------------------------------------------------------------------------------------- the folder


def page(number: int) -> np.ndarray:
    return np.full(100, number, np.uint8)


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "big")


def test_the_bound_holds_and_the_oldest_go(tmp_path: Path) -> None:
    size = HEADER_BYTES + 100
    tier = DiskTier(tmp_path, 10 * size)
    for number in range(10):
        assert tier.write(key(number), page(number))
    assert tier.read(key(0), 100) is not None
    assert tier.write(key(10), page(10))
    assert tier.has(key(0))
    assert not tier.has(key(1))
    assert len(files_of(tmp_path)) == 10
    tier.check_integrity()
    assert not DiskTier(tmp_path, 50).write(key(1), page(1)), "larger than all that it may take"
    assert files_of(tmp_path) == []


def test_processes_share_a_folder(tmp_path: Path) -> None:
    size = HEADER_BYTES + 100
    one, two = (DiskTier(tmp_path, 64 * size) for _ in range(2))
    for number in range(0, 200, 2):
        assert one.write(key(number), page(0))
        assert two.write(key(number + 1), page(1))
        assert len(files_of(tmp_path)) <= 64 + 2 * 2
    assert DiskTier(tmp_path, 64 * size).used_bytes <= 64 * size
    (tmp_path / f"{key(198).hex()}.kv").unlink()  # by the other
    assert one.has(key(198))
    assert one.read(key(198), 100) is None
    assert not one.has(key(198))
    one.check_integrity()


def test_a_full_disk_is_told_once_and_the_tier_goes_quiet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = DiskTier(tmp_path, 1 << 20)
    assert tier.write(key(0), page(0))
    monkeypatch.setattr(disk_module, "_QUIET_S", 0.0)
    with largest_file(HEADER_BYTES + 50):
        assert not tier.write(key(1), page(1))
        assert not tier.write(key(2), page(2))
    assert len(caplog.records) == 1
    assert [path.name for path in tmp_path.iterdir()] == [f"{key(0).hex()}.kv"]
    assert tier.read(key(0), 100) is not None
    assert tier.write(key(1), page(1)), "there is room again"
    monkeypatch.setattr(disk_module, "_QUIET_S", 60.0)
    with largest_file(10):
        assert not tier.write(key(2), page(2))
    assert not tier.write(key(2), page(2)), "not so soon"
    assert len(caplog.records) == 1


def test_a_folder_must_be_ones_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "file/below", "link"):
        with pytest.raises(ConfigError):
            DiskTier(tmp_path / name)
    tmp_path.chmod(0o755)
    DiskTier(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_memory_hands_down_what_it_has_no_room_for() -> None:
    tier = MemoryTier(250)
    assert tier.write(b"a", page(1)) == tier.write(b"b", page(2)) == []
    assert tier.read(b"a") is not None
    ((name, content),) = tier.write(b"c", page(3))
    assert (name, content[0]) == (b"b", 2)
    ((name, _),) = tier.write(b"d", np.zeros(300, np.uint8))
    assert name == b"d"
    assert tier.has(b"a")
    tier.check_integrity()


def test_the_thread_outlives_what_goes_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ladder = Ladder((100,), None, DiskTier(tmp_path))
    bad, good = HostPage(), HostPage()
    bad.put(lambda: 1 // 0)
    good.put(lambda: page(1))
    names = [bytes(32) + b"\0", b"\1" * 32 + b"\0"]
    ladder.put(names[0], bad)
    ladder.put(names[1], good)
    assert ladder.drain(10.0)
    assert [ladder.link(name) for name in names] == [None, "disk"]
    monkeypatch.setattr(DiskTier, "read", lambda *args: 1 // 0)
    fetch = ladder.fetch(names[1:])
    ladder.wait([fetch], 10.0)
    assert fetch.done
    assert fetch.pages == []
    ladder.check_integrity()
    ladder.close()
    ladder.close()
    ladder.put(names[0], good)  # too late, and let go of
    assert ladder.link(names[0]) is None


# --------------------------------------------------------------------------------------- the choice


def test_fetching_pays_where_it_is_faster() -> None:
    choice = FetchChoice()
    assert choice.pays({"disk": 100}, 0.05), "nothing was measured yet"
    choice.link("disk").observe(1000, 1.0)
    assert not choice.pays({"disk": 100}, 0.05), "0.1 s of reading for 0.05 s of computing"
    assert choice.pays({"disk": 100}, 0.15)
    assert choice.pays({"disk": 100}, None), "what computing takes is not known"
    assert choice.pays({"memory": 100}, 0.05), "never measured"
    assert choice.pays({}, 0.05)
    assert sum(choice.pays({"disk": 100}, 0.05) for _ in range(64)) in (3, 4), "tried again now and then"
    for _ in range(9):
        choice.link("disk").observe(1e6, 1.0)
    choice.link("disk").observe(10, 1.0)  # once, the machine was busy elsewhere
    assert choice.pays({"disk": 100}, 0.05)
    choice.link("disk").observe(0, 1.0)
    choice.link("disk").observe(1, 0.0)
    assert choice.link("disk").per_s == 1e6


def test_what_is_fetched_goes_to_the_device_in_the_end() -> None:
    choice = FetchChoice(device_bytes_per_s=1000.0)
    for link in ("disk", "memory"):
        choice.link(link).observe(1e9, 1.0)
    assert choice.pays({"disk": 100, "memory": 100}, 0.25)
    assert not choice.pays({"disk": 100, "memory": 100}, 0.15), "0.2 s on the way to the device"


def test_what_does_not_pay_is_computed(tmp_path: Path) -> None:
    keep(tmp_path)
    asked: list[tuple[int, int]] = []

    def compute_s(begin: int, end: int) -> float:
        asked.append((begin, end))
        return 1.0

    for disk_s, found in ((1e6, 0), (1e-6, 192)):
        engine = tiered_engine(tmp_path, compute_s=compute_s)
        engine.scheduler.cache.tiers.ladder.choice.link("disk").observe(1, disk_s)
        assert finish(engine, Request("a", text(200), GREEDY)).cached_tokens == found
        engine.close()
    assert asked[0] == asked[-1] == (0, 192)


def test_a_known_machine_predicts_what_computing_takes(
    tiny: Callable[[str], TinyModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ceilings = Ceilings(20e9, 500e9, 300e9, 200e9, 1, "portable", "made up", "2026-01-01T00:00:00+00:00")
    monkeypatch.setattr(files, "_SETTLED_S", -60.0)
    monkeypatch.setattr(probe, "known_ceilings", lambda *args, **more: ceilings)
    prompt = [(7 * index) % 50 for index in range(100)]
    options = {"max_model_len": 256, "cache_dir": str(tmp_path), "measured_budget": False}
    for disk_s, found in ((1.0, 0), (1.0, 0), (1e-12, 96)):
        with LLM(str(tiny("llama").folder), max_num_batched_tokens=64, **options) as llm:
            tiers = llm.loaded.engine.scheduler.cache.tiers
            tiers.ladder.choice.link("disk").observe(1, disk_s)
            (output,) = llm.generate([prompt], GREEDY)
            expected_s = tiers._compute_s(0, 96)
            assert 0 < tiers._compute_s(80, 96) < expected_s < 1
        assert output.cached_tokens == found


# --------------------------------------------------------------------------------- a model's engine


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_starts_warm_and_says_the_same(
    tiny: Callable[[str], TinyModel], tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_SETTLED_S", -60.0)
    folder = tiny(family).folder
    prompt = [(7 * index) % 50 for index in range(100)]
    answers = []
    for found in (0, 96, 0, 0):
        options = {"cache_dir": str(tmp_path)}
        if len(answers) == 2:
            options["kv_format"] = "KV8"
        if len(answers) == 3:
            options = {}
        with LLM(str(folder), max_model_len=256, weights="W8A8-g32", **options) as llm:
            (output,) = llm.generate([prompt], GREEDY)
        assert output.cached_tokens == found
        answers.append(output.outputs[0].token_ids)
    assert answers[0] == answers[1] == answers[3]


def test_a_model_that_changed_a_moment_ago_is_not_kept(
    tiny: Callable[[str], TinyModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_SETTLED_S", 1e9)
    with LLM(str(tiny("llama").folder), max_model_len=128, cache_dir=str(tmp_path)) as llm:
        llm.generate([list(range(3, 53))], GREEDY)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------- anything, in any order

OPERATIONS = settings(
    max_examples=110,
    stateful_step_count=130,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
GROUPS = {
    "full": ((None,), (11,), 0),
    "windows": ((None, 24), (11, 8), 0),
    "window alone": ((20,), (7,), 0),
    "states": ((None, 24), (11, 8), 9),
    "states alone": ((), (), 9),
}
"""Windows, pages and slots of state."""


HARMS = ["none", "none", "none", "flip", "cut", "swap", "gone"]


class TierMachine(CacheMachine):
    """A CacheMachine whose engine ends and begins again on one folder, in which files come to harm."""

    known: dict[str, list[Any]]
    patch: pytest.MonkeyPatch

    def __init__(self) -> None:
        super().__init__()
        self._folder = TemporaryDirectory()
        self.folder = Path(self._folder.name)

    @initialize(
        kind=st.sampled_from(sorted(GROUPS)),
        memory=st.sampled_from([None, 0, 5, 100]),
        disk=st.sampled_from([12, 40, 1000]),
        late=st.booleans(),
    )
    def begin(self, kind: str, memory: int | None, disk: int, late: bool) -> None:
        self.patch.setattr(FakeExecutor, "asynchronous", late)
        self.kind = kind
        self.memory_bytes = None if memory is None else memory * PAGE_BYTES
        self.disk_bytes = disk * (PAGE_BYTES + HEADER_BYTES)
        self.alone = self._alone
        self._start()

    def _start(self) -> None:
        self.engine = tiered_engine(
            self.folder,
            self._executor(),
            memory_bytes=self.memory_bytes,
            disk_bytes=self.disk_bytes,
            queue_bytes=8 * PAGE_BYTES,
            in_turns=True,
            max_num_seqs=6,
            max_num_batched_tokens=40,
        )

    def _executor(self, pages: int | None = None) -> FakeExecutor:
        windows, tight, states = GROUPS[self.kind]
        return FakeExecutor(windows, tight if pages is None else (pages,) * len(windows), states=states)

    def _alone(self, request: Request) -> list[Any]:
        name = repr((self.kind, request.prompt_token_ids, request.params))
        if name not in self.known:
            engine = make_engine(self._executor(pages=60), prefix_caching=False)
            self.known[name] = contents(finish(engine, request))
        return self.known[name]

    @precondition(lambda self: self.asked)
    @rule(
        which=st.integers(0, 1000),
        count=st.integers(1, 4),
        harm=st.sampled_from(HARMS),
        at=st.integers(0, 400),
    )
    def restart(self, which: int, count: int, harm: str, at: int) -> None:
        self.done["preemptions"] += self.engine.scheduler.preemptions
        self._end()
        self.open.clear()
        self._harm(which, at, harm)
        self._start()
        for number in range(count):
            self.ask_again(which + number)

    @precondition(lambda self: self.asked)
    @rule(which=st.integers(0, 1000))
    def ask_again(self, which: int) -> None:
        asked = list(self.asked.values())[which % len(self.asked)]
        self._add(asked.prompt_token_ids, asked.params, asked.cache_salt)

    @rule(turns=st.integers(1, 20))
    def carry(self, turns: int) -> None:
        """What the tiers' thread does meanwhile."""
        for _ in range(turns):
            self.engine.scheduler.cache.tiers.ladder.turn()

    @rule()
    def rest(self) -> None:
        """A moment without work, or one in which an interrupt made it look so."""
        self.engine.idle()

    def _harm(self, which: int, at: int, how: str) -> None:
        paths = files_of(self.folder)
        if not paths or how == "none":
            return
        path, other = paths[which % len(paths)], paths[at % len(paths)]
        if how == "flip":
            flip(path, at % path.stat().st_size)
        elif how == "cut":
            os.truncate(path, at)
        elif how == "swap":
            path.write_bytes(other.read_bytes())
        else:
            path.unlink()
        self.done["harms"] += 1

    def _end(self) -> None:
        tiers = self.engine.scheduler.cache.tiers
        self.engine.close()
        self.done["saved"] += len(files_of(self.folder))
        for tier in (tiers.ladder.disk, tiers.ladder.memory):
            if tier is not None:
                tier.check_integrity()

    def teardown(self) -> None:
        super().teardown()
        tiers = self.engine.scheduler.cache.tiers
        assert not tiers._fetching
        tiers.ladder.check_integrity()
        self._end()
        self._folder.cleanup()


def test_ten_thousand_operations_with_tiers_restarts_and_harm_change_no_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Everything at once: chunks, pools of a tenth of what is asked for, preemptions, classes, aborts, tiny
    tiers of both kinds, and engines that end and begin again on what the last one left."""
    TierMachine.patch = monkeypatch
    TierMachine.done, TierMachine.known = Counter(), {}
    filled: Counter[str] = Counter()
    transfer = FakeExecutor.transfer

    def counted(executor: FakeExecutor, moves: Sequence[Move]) -> None:
        filled.update(type(move).__name__ for move in moves)
        transfer(executor, moves)

    monkeypatch.setattr(FakeExecutor, "transfer", counted)
    run_state_machine_as_test(TierMachine, settings=OPERATIONS)
    done = TierMachine.done
    assert done["operations"] >= 10_000, done
    assert done["finished"] > 500, done
    assert done["preemptions"] > 50, done
    assert done["aborts"] > 200, done
    assert done["harms"] > 100, done
    assert filled["PageFill"] > 150, filled
    assert filled["PageSpill"] > 800, filled
