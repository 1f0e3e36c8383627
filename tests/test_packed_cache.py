"""Packed weights on disk: the same bits, never stale, never damaged, in bounded room."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from block_storages import FLOAT16_AT
from command_line import Cli, command_line
from full_disk import largest_file
from running import MAX_ROWS, PAGES, Loaded, load_program
from test_packed_models import TOKENS, write_model

from ridgeline.config import EngineConfig
from ridgeline.execution.base import Limits
from ridgeline.execution.cpu import load as loader
from ridgeline.execution.cpu import packed_cache
from ridgeline.execution.cpu.executor import CpuExecutor
from ridgeline.execution.cpu.load import load_matrices
from ridgeline.execution.cpu.packed_cache import PackedCache, key_of
from ridgeline.execution.cpu.packing import Layout, pack_all
from ridgeline.loading import make_executor
from ridgeline.model.checkpoint import files
from ridgeline.native import BLOCK_BYTES, Team, allocate, block_sums, isa_levels
from ridgeline.resources.paths import SHARE_BYTES
from ridgeline.types import ByteArray, ConfigError

TEAM = Team(2)


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is used for tiny models, and for files that were written just now."""
    monkeypatch.setattr(packed_cache, "_PAYS_S", 0.0)
    monkeypatch.setattr(files, "_SETTLED_S", -60.0)


@pytest.fixture
def cache(tmp_path: Path) -> PackedCache:
    return PackedCache(tmp_path / "packed", 1 << 30)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Matrices of eight storages."""
    write_model(tmp_path / "model.gguf", [*FLOAT16_AT])
    return tmp_path / "model.gguf"


def key_and_layout(path: Path, fmt: str = "auto") -> tuple[bytes, Layout]:
    _, weights = load_program(path, fmt)
    layout = Layout.of(weights)
    key = key_of(weights, layout)
    assert key is not None
    return key, layout


def region_of(size_bytes: int, seed: int = 0) -> ByteArray:
    region = allocate(size_bytes)
    region[:] = np.random.default_rng(seed).integers(0, 256, size_bytes, np.uint8)
    return region


def files_of(cache: PackedCache) -> list[Path]:
    return sorted(path for path in cache.folder.iterdir() if path.name != ".lock")


# ------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("fmt", ["auto", "W8A8-g32", "W16A16", "W32A32"])
def test_the_same_bits_come_back(model: Path, cache: PackedCache, fmt: str) -> None:
    key, layout = key_and_layout(model, fmt)
    region, back = layout.allocate(), layout.allocate()
    pack_all(layout, region, 2)
    assert not cache.load(key, back, TEAM)
    assert cache.store(key, region, TEAM)
    for team in (Team(1), TEAM):
        back[:] = 0xAA
        assert cache.load(key, back, team)
        np.testing.assert_array_equal(back, region)


@pytest.mark.parametrize("isa", isa_levels())
def test_the_same_logits_with_and_without_it(
    model: Path, cache: PackedCache, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = 0

    def counted(*arguments: Any) -> None:
        nonlocal packed
        packed += 1
        pack_all(*arguments)

    monkeypatch.setattr(loader, "pack_all", counted)
    logits = []
    for used in (None, cache, cache):
        program, weights = load_program(model, "auto")
        executor = CpuExecutor(Limits(MAX_ROWS, (PAGES,), "KV16"), 2, isa, used)
        executor.load(weights)
        weights.close()
        logits.append(Loaded(executor, executor.compile(program), program).run(TOKENS))
        executor.close()
    assert packed == 2
    np.testing.assert_array_equal(logits[1], logits[0])
    np.testing.assert_array_equal(logits[2], logits[0])


def test_another_process_reads_it(model: Path, cache: PackedCache) -> None:
    key, layout = key_and_layout(model)
    region = layout.allocate()
    pack_all(layout, region, 2)
    assert cache.store(key, region, TEAM)
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    child = context.Process(target=_read_elsewhere, args=(cache.folder, key, region.nbytes, answers))
    child.start()
    sums = answers.get(timeout=120)
    child.join()
    assert sums == block_sums(region, TEAM).tolist()


def _read_elsewhere(folder: Path, key: bytes, size_bytes: int, answers: Any) -> None:
    region, team = allocate(size_bytes), Team(1)
    found = PackedCache(folder, 1 << 30).load(key, region, team)
    answers.put(block_sums(region, team).tolist() if found else None)


# ----------------------------------------------------------------------------------------------- damage


def test_damage_of_any_byte_is_seen(cache: PackedCache) -> None:
    region, key = region_of(BLOCK_BYTES + 4160), bytes(range(32))
    assert cache.store(key, region, TEAM)
    (path,) = files_of(cache)
    whole, back = path.read_bytes(), allocate(region.nbytes)
    start = len(whole) - region.nbytes
    rng = np.random.default_rng(0)
    for at in [*range(128), *range(128, start, 61), *rng.integers(start, len(whole), 200), len(whole) - 1]:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([whole[at] ^ 1 << int(at) % 8]))
        assert not cache.load(key, back, TEAM), at
        with path.open("r+b") as file:
            file.seek(at)
            file.write(whole[at : at + 1])
    assert cache.load(key, back, TEAM)


def test_words_that_change_places_are_seen() -> None:
    region = region_of(4096)
    (before,) = block_sums(region, TEAM)
    words = region.view(np.uint64)
    for a, b in ((0, 1), (0, 8), (3, 11), (100, 511)):
        words[[a, b]] = words[[b, a]]
        assert block_sums(region, TEAM)[0] != before
        words[[a, b]] = words[[b, a]]
    assert block_sums(region, TEAM)[0] == before
    assert block_sums(np.zeros(64, np.uint8), TEAM)[0] != block_sums(np.zeros(65, np.uint8), TEAM)[0]


@pytest.mark.parametrize("left", [0, 7, 63, 4095, 4096, 5000, -1])
def test_a_file_that_was_cut_is_written_again(model: Path, cache: PackedCache, left: int) -> None:
    _, weights = load_program(model, "auto")
    load_matrices(weights, TEAM, cache)
    (path,) = files_of(cache)
    whole = path.read_bytes()
    os.truncate(path, left if left >= 0 else len(whole) - 1)
    load_matrices(weights, TEAM, cache)
    assert path.read_bytes() == whole
    with path.open("ab") as file:
        file.write(b"more")
    load_matrices(weights, TEAM, cache)
    assert path.read_bytes() == whole


# --------------------------------------------------------------------------------------------- processes


def _write_elsewhere(folder: Path, ready: Any) -> None:
    cache, region, team = PackedCache(folder, 1 << 30), region_of(8 << 20), Team(1)
    ready.wait()
    for _ in range(5):
        cache.store(b"k" * 32, region, team)


def test_two_processes_at_once(cache: PackedCache) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(2)
    children = [context.Process(target=_write_elsewhere, args=(cache.folder, ready)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    region = region_of(8 << 20)
    back = allocate(region.nbytes)
    assert cache.load(b"k" * 32, back, TEAM)
    np.testing.assert_array_equal(back, region)
    assert len(files_of(cache)) == 1


def test_what_a_killed_process_left_is_removed(cache: PackedCache) -> None:
    cache.folder.mkdir()
    (cache.folder / ".partial-killed").write_bytes(b"half")
    assert cache.store(b"k" * 32, region_of(4096), TEAM)
    assert [path.suffix for path in files_of(cache)] == [".packed"]


# -------------------------------------------------------------------------------------------------- room


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    region, back = region_of(1 << 20), allocate(1 << 20)
    cache = PackedCache(tmp_path, 7 << 19)  # three of them with their headers
    keys = [bytes([n]) * 32 for n in range(4)]
    for n, key in enumerate(keys[:3]):
        assert cache.store(key, region, TEAM)
        os.utime(cache.folder / f"{key.hex()}.packed", (1000 + n, 1000 + n))
    assert cache.load(keys[0], back, TEAM)  # now the latest
    assert cache.store(keys[3], region, TEAM)
    assert [cache.load(key, back, TEAM) for key in keys] == [True, False, True, True]
    usage = cache.usage()
    assert (usage.files, usage.bound_bytes) == (3, 7 << 19)
    assert 3 << 20 < usage.used_bytes <= usage.bound_bytes


def test_what_is_larger_than_the_room_is_not_kept(tmp_path: Path) -> None:
    cache = PackedCache(tmp_path, 1 << 20)
    assert cache.store(b"a" * 32, region_of(1 << 16), TEAM)
    assert not cache.store(b"b" * 32, region_of(1 << 20), TEAM)
    assert len(files_of(cache)) == 1


def test_room_is_a_share_of_the_disk(tmp_path: Path) -> None:
    bound = PackedCache(tmp_path / "not" / "there").bound_bytes
    assert 0 < bound <= SHARE_BYTES


def test_a_full_disk_costs_only_time(model: Path, cache: PackedCache) -> None:
    _, weights = load_program(model, "auto")
    with largest_file(20_000):
        matrices = load_matrices(weights, TEAM, cache)
    assert matrices
    assert files_of(cache) == []


def test_a_folder_that_cannot_be_made_costs_only_time(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    _, weights = load_program(model, "auto")
    assert load_matrices(weights, TEAM, PackedCache(tmp_path / "file" / "packed", 1 << 30))


# --------------------------------------------------------------------------------------------------- key


@pytest.fixture
def key(model: Path) -> Iterator[bytes]:
    found, _ = key_and_layout(model)
    yield found
    assert key_and_layout(model)[0] == found


def test_the_key_has_the_format_in_it(model: Path, key: bytes) -> None:
    keys = {key_and_layout(model, fmt)[0] for fmt in ("auto", "W8A8-g32", "W4A8-g32", "W16A16")}
    assert len(keys) == 4
    assert key in keys


def test_the_key_changes_with_the_file(model: Path, tmp_path: Path) -> None:
    before, _ = key_and_layout(model)
    content = model.read_bytes()
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(content)
    assert key_and_layout(copy)[0] != before
    status = model.stat()
    model.write_bytes(content)  # in place, and with the time of writing set back
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert model.stat().st_ino == status.st_ino
    assert key_and_layout(model)[0] != before


def test_the_key_changes_with_how_weights_are_packed(
    model: Path, key: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_rows = packed_cache.pack_rows

    def other_layout(data: ByteArray, storage: str, cols: int, team: Team, out: ByteArray) -> bool:
        pack_rows(data, storage, cols, team, out)
        if storage == "Q4_K":
            out[:2] = out[1::-1].copy()
        return True

    with monkeypatch.context() as patch:
        patch.setattr(packed_cache, "pack_rows", other_layout)
        assert key_and_layout(model)[0] != key
    with monkeypatch.context() as patch:
        patch.setattr(packed_cache, "_quantised_sample", lambda fmt: b"another rule")
        assert key_and_layout(model)[0] == key  # nothing is quantised
        other = key_and_layout(model, "W8A8-g32")[0]
    assert key_and_layout(model, "W8A8-g32")[0] != other


def test_a_file_of_just_now_has_no_key(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_SETTLED_S", 60.0)
    _, weights = load_program(model, "auto")
    assert key_of(weights, Layout.of(weights)) is None


def test_it_is_used_only_where_it_pays(
    model: Path, cache: PackedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_cache, "_PAYS_S", 0.25)
    _, weights = load_program(model, "auto")
    layout = Layout.of(weights)
    assert not cache.pays(layout)
    load_matrices(weights, TEAM, cache)
    assert not cache.folder.exists()
    monkeypatch.setattr(packed_cache, "_PAYS_S", layout.nbytes * 2e-9)
    assert not cache.pays(layout)
    assert cache.pays(Layout.of(load_program(model, "W8A8-g32")[1]))


# ---------------------------------------------------------------------------------------------- switches


def test_the_engine_can_go_without() -> None:
    limits = Limits(16, (8,), "KV16")
    for wanted in (True, False):
        config = EngineConfig(device="cpu", threads=1, packed_cache=wanted)
        executor = make_executor(config, limits)
        assert isinstance(executor, CpuExecutor)
        assert (executor._cache is not None) == wanted
        executor.close()
    with pytest.raises(ConfigError, match="packed_cache is 'no'; accepted: True or False"):
        EngineConfig(packed_cache="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("verb", ["run", "chat", "bench", "perplexity", "serve"])
@pytest.mark.parametrize("how", ["flag", "environment", "default"])
def test_the_flag_of_every_verb(
    verb: str,
    how: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    class SeenError(Exception):
        pass

    asked: list[Any] = []

    def spy(self: EngineConfig) -> None:
        if self.model == "asked":
            asked.append(self.packed_cache)

    ridgeline: Cli = command_line(monkeypatch, capfd, tmp_path)
    monkeypatch.setattr(EngineConfig, "__post_init__", spy)
    for module in ("progress", verb):  # a verb that was imported before has it by its own name
        monkeypatch.setattr(f"ridgeline.cli.{module}.fetch", lambda *a: None, raising=False)
    if how == "environment":
        monkeypatch.setenv("RIDGELINE_NO_PACKED_CACHE", "1")
    (tmp_path / "text").write_text("a text")
    more = {
        "run": ["hello", "--model", "asked"],
        "serve": ["asked"],
        "perplexity": ["-f", tmp_path / "text", "--model", "asked"],
    }
    arguments = [
        verb,
        *more.get(verb, ["--model", "asked"]),
        *(["--no-packed-cache"] if how == "flag" else []),
    ]
    monkeypatch.setattr("ridgeline.model.catalog.resolve", _refuse)
    monkeypatch.setattr("ridgeline.server.app.run", _refuse, raising=False)
    ridgeline(*arguments)
    assert asked[0] is (how == "default")


def _refuse(*arguments: Any, **more: Any) -> Any:
    raise ConfigError("far enough")


def test_the_doctor_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ridgeline = command_line(monkeypatch, capfd, tmp_path)
    monkeypatch.setattr("ridgeline.execution.cpu.packed_cache.DISK_SHARE", 0.0)  # on a full disk, too
    cache = PackedCache()
    assert cache.folder == tmp_path / "packed"
    assert cache.store(b"k" * 32, region_of(3 << 20), TEAM) or cache.bound_bytes < 4 << 20
    told = next(line for line in ridgeline("doctor").out.splitlines() if line.startswith("packed weights"))
    assert str(cache.folder) in told.replace("\n", "")
    assert " 1, " in told
    assert "of at most" in told
