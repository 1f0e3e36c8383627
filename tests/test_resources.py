"""The machine's facts, its ceilings, the roofline and the memory ledger."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.config import PAGE_TOKENS, EngineConfig
from ridgeline.resources import ceilings as ceilings_module
from ridgeline.resources import machine as machine_module
from ridgeline.resources import roofline
from ridgeline.resources.ceilings import Ceilings, load_ceilings, save_ceilings
from ridgeline.resources.machine import (
    choose_isa,
    free_memory_bytes,
    last_level_cache_bytes,
    machine,
    usable_cores,
)
from ridgeline.resources.memory import STATES_PER_SEQUENCE, Demand, KVGroup, plan_memory
from ridgeline.resources.paths import cache_dir, write_atomic
from ridgeline.types import CapacityError, ConfigError, Work

CEILINGS = Ceilings(
    read_bytes_per_s=20e9,
    int8_ops_per_s=800e9,
    bf16_flops_per_s=400e9,
    fp32_flops_per_s=200e9,
    threads=2,
    isa="portable",
    machine="some machine",
    measured_at="2026-01-01T00:00:00+00:00",
)


# ---------------------------------------------------------------------------------------- the machine


class FakeSystem:
    """A machine made of the small files that the kernel shows, in place of this one's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cpus: int, threads_per_core: int = 1) -> None:
        self.files: dict[str, str] = {}
        for cpu in range(cpus):
            first = cpu - cpu % threads_per_core
            siblings = f"{first}-{first + threads_per_core - 1}"
            self.files[f"/sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list"] = siblings
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(machine_module.sys, "platform", "linux")
        monkeypatch.setattr(machine_module, "_affinity", lambda: set(range(cpus)))
        monkeypatch.setattr(machine_module, "_read", lambda path: self.files.get(str(path), ""))

    def cgroup_v2(self, group: str, **files: str) -> None:
        self.files["/proc/self/cgroup"] = f"0::{group}"
        self.files["/proc/self/mountinfo"] = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate"
        for name, content in files.items():
            self.files[f"/sys/fs/cgroup{group}/{name.replace('_', '.', 1)}"] = content


def test_one_thread_for_each_physical_core(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeSystem(monkeypatch, cpus=8, threads_per_core=2)
    assert usable_cores() == 4
    monkeypatch.setattr(machine_module, "_affinity", lambda: {0, 1, 2})
    assert usable_cores() == 2


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("300000 100000", 3), ("250000 100000", 2), ("50000 100000", 1)]
)
def test_cpu_quota_of_cgroup_v2(monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    FakeSystem(monkeypatch, cpus=8).cgroup_v2("/pod/app", cpu_max=quota)
    assert usable_cores() == cores


def test_quota_of_an_outer_group_holds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    system = FakeSystem(monkeypatch, cpus=8)
    system.cgroup_v2("/pod/app", cpu_max="600000 100000")
    system.files["/sys/fs/cgroup/pod/cpu.max"] = "200000 100000"
    assert usable_cores() == 2


def test_quota_of_cgroup_v1_seen_from_inside_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    system = FakeSystem(monkeypatch, cpus=8)
    system.files["/proc/self/cgroup"] = "4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc"
    system.files["/proc/self/mountinfo"] = "\n".join(
        [
            "40 31 0:30 /docker/abc /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct",
            "41 31 0:31 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory",
        ]
    )
    system.files["/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us"] = "400000"
    system.files["/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us"] = "100000"
    assert usable_cores() == 4
    system.files["/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us"] = "-1"
    assert usable_cores() == 8


@pytest.mark.parametrize(("asked", "cores"), [("3", 3), ("2,4", 2), ("64", 8), ("none", 8), ("0", 8)])
def test_omp_num_threads_is_an_upper_bound(monkeypatch: pytest.MonkeyPatch, asked: str, cores: int) -> None:
    FakeSystem(monkeypatch, cpus=8)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert usable_cores() == cores


def test_memory_limit_of_a_cgroup_counts_droppable_files_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    system = FakeSystem(monkeypatch, cpus=2)
    system.files["/proc/meminfo"] = "MemTotal:   2000 kB\nMemAvailable:   1000 kB"
    assert free_memory_bytes() == 1000 * 1024
    stat = "anon 50000\ninactive_file 20000\nactive_file 10000\nworkingset_refault_file 7"
    system.cgroup_v2("/app", memory_max="100000", memory_current="80000", memory_stat=stat)
    assert free_memory_bytes() == 100000 - (80000 - 30000)
    system.files["/sys/fs/cgroup/app/memory.max"] = "max"
    assert free_memory_bytes() == 1000 * 1024


def test_this_machine_is_plausible() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert 2**20 < free_memory_bytes() <= machine().memory_bytes
    assert machine().cpu
    assert last_level_cache_bytes() >= 0


def test_forced_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIDGELINE_ISA", "portable")
    assert choose_isa() == "portable"
    monkeypatch.setenv("RIDGELINE_ISA", "quantum")
    with pytest.raises(
        ConfigError, match=r"RIDGELINE_ISA is 'quantum'; accepted on this machine: .*portable"
    ):
        choose_isa()


# --------------------------------------------------------------------------------------------- paths


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("RIDGELINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir().name == "ridgeline"


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_write_atomic_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CapacityError, match="No space left on device"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ------------------------------------------------------------------------------------------ ceilings


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path))
    return tmp_path


def test_ceilings_are_kept_for_their_threads_and_isa(cache: Path) -> None:
    assert load_ceilings(2, "portable") is None
    save_ceilings(CEILINGS)
    assert load_ceilings(2, "portable") == CEILINGS
    assert load_ceilings(1, "portable") is None
    assert load_ceilings(2, "avx512_vnni") is None


@pytest.mark.parametrize("change", [{"read_bytes_per_s": "fast"}, {"read_bytes_per_s": -1.0}, {"extra": 1}])
def test_damaged_ceilings_count_as_not_measured(cache: Path, change: dict[str, object]) -> None:
    path = save_ceilings(CEILINGS)
    path.write_text(json.dumps({**CEILINGS.to_json(), **change}), encoding="utf-8")
    assert load_ceilings(2, "portable") is None
    path.write_bytes(b"\xff{")
    assert load_ceilings(2, "portable") is None


def test_another_machine_measures_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_ceilings(CEILINGS)
    other = dataclasses.replace(machine(), cpu="another processor")
    monkeypatch.setattr(ceilings_module, "machine", lambda: other)
    assert load_ceilings(2, "portable") is None


def test_probe_measures_and_is_cached(cache: Path) -> None:
    from ridgeline.resources import probe

    quick = probe.quick_ceilings(threads=1, isa="portable")
    assert quick.read_bytes_per_s > 1e8
    assert quick.fp32_flops_per_s > 1e8
    assert quick.int8_ops_per_s > 1e8
    assert quick.bf16_flops_per_s >= 0
    assert 0 < quick.barrier_s < 1
    assert quick.seconds_each == probe.QUICK_PROBE_S
    assert probe.quick_ceilings(threads=1, isa="portable") == quick


# ------------------------------------------------------------------------------------------ roofline

works = st.builds(Work, *[st.integers(0, 10**12)] * 5)


def test_shares_of_a_known_step() -> None:
    work = Work(int8_ops=80 * 10**9, bf16_flops=40 * 10**9, fp32_flops=20 * 10**9, read_bytes=4 * 10**9)
    assert roofline.memory_s(work, CEILINGS) == pytest.approx(0.2)
    assert roofline.arithmetic_s(work, CEILINGS) == pytest.approx(0.1 + 0.1 + 0.1)
    assert roofline.mbu(work, 0.4, CEILINGS) == pytest.approx(0.5)
    assert roofline.mfu(work, 0.4, CEILINGS) == pytest.approx(0.75)
    assert roofline.predicted_s(work, CEILINGS, overhead_s=0.01) == pytest.approx(0.31)


def test_format_without_instructions_is_charged_at_fp32() -> None:
    plain = dataclasses.replace(CEILINGS, bf16_flops_per_s=0.0)
    assert roofline.arithmetic_s(Work(bf16_flops=200 * 10**9), plain) == pytest.approx(1.0)


@given(works, works)
def test_times_add_up_and_nothing_is_faster_than_its_parts(a: Work, b: Work) -> None:
    for seconds in (roofline.memory_s, roofline.arithmetic_s):
        assert seconds(a + b, CEILINGS) == pytest.approx(seconds(a, CEILINGS) + seconds(b, CEILINGS))
    together = roofline.predicted_s(a + b, CEILINGS)
    assert together <= roofline.predicted_s(a, CEILINGS) + roofline.predicted_s(b, CEILINGS) + 1e-9
    assert together >= max(roofline.predicted_s(a, CEILINGS), roofline.predicted_s(b, CEILINGS)) - 1e-9


# -------------------------------------------------------------------------------------------- ledger


TOKEN_BYTES = 23_040


def demand(**changes: object) -> Demand:
    base = Demand(
        weights_bytes=100 << 20,
        activation_bytes=10 << 20,
        groups=(KVGroup(page_bytes=TOKEN_BYTES * PAGE_TOKENS),),
        max_model_len=2048,
        max_num_seqs=64,
        max_num_batched_tokens=512,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_much_memory_gives_every_sequence_its_full_length() -> None:
    ledger = plan_memory(demand(), free_bytes=1 << 40)
    assert ledger.pages == (64 * 2048 // PAGE_TOKENS,)
    assert ledger.kv_bytes == 64 * 2048 * TOKEN_BYTES
    assert ledger.bytes == ledger.kv_bytes + (110 << 20)


def test_little_memory_gives_half_of_it_to_the_pool() -> None:
    free = 1 << 30
    ledger = plan_memory(demand(), free_bytes=free)
    available = int(free * 0.9) - (110 << 20)
    assert available * 0.49 < ledger.kv_bytes <= available * 0.5


def test_one_sequence_may_take_more_than_half() -> None:
    ledger = plan_memory(demand(max_num_seqs=1), free_bytes=190 << 20)
    assert ledger.pages == (2048 // PAGE_TOKENS,)
    assert ledger.kv_bytes > (int(190 * 0.9) - 110 << 20) / 2


def test_a_sequence_that_cannot_fit_names_the_flag_and_a_length_that_does() -> None:
    free = 140 << 20
    with pytest.raises(
        CapacityError, match=r"one sequence of 2048 tokens .* --max-model-len up to \d+$"
    ) as caught:
        plan_memory(demand(), free_bytes=free)
    longest = int(str(caught.value).rsplit(" ", 1)[1])
    assert plan_memory(demand(max_model_len=longest), free_bytes=free).pages
    with pytest.raises(CapacityError):
        plan_memory(demand(max_model_len=longest + 1), free_bytes=free)


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(CapacityError, match=r"the weights need .* and 0\.29 GiB of memory are free"):
        plan_memory(demand(weights_bytes=490 << 20), free_bytes=300 << 20)


def test_states_are_counted_for_each_sequence_whatever_its_length() -> None:
    page_bytes, state_bytes = TOKEN_BYTES * PAGE_TOKENS, 3 << 20
    ledger = plan_memory(demand(state_bytes=state_bytes), free_bytes=1 << 40)
    assert ledger.states == 64 * STATES_PER_SEQUENCE
    assert ledger.kv_bytes == ledger.pages[0] * page_bytes + ledger.states * state_bytes
    free = 1 << 30
    ledger = plan_memory(demand(state_bytes=state_bytes), free_bytes=free)
    available = int(free * 0.9) - (110 << 20)
    assert available * 0.48 < ledger.kv_bytes <= available * 0.5
    assert ledger.states / STATES_PER_SEQUENCE == pytest.approx(ledger.pages[0] * PAGE_TOKENS / 2048, abs=1)
    assert ledger.pages[0] < plan_memory(demand(), free_bytes=free).pages[0]
    alone = plan_memory(demand(groups=(), state_bytes=state_bytes, max_num_seqs=5), free_bytes=free)
    assert (alone.pages, alone.states) == ((), 5 * STATES_PER_SEQUENCE)
    assert plan_memory(demand(), free_bytes=free).states == 0
    with pytest.raises(CapacityError, match=r"needs 0\.29 GiB for its recurrent state and 190\.\d MiB"):
        plan_memory(demand(state_bytes=100 << 20), free_bytes=(334 << 20))


def test_given_pool_size_is_used_whole_or_refused() -> None:
    ledger = plan_memory(demand(), free_bytes=1 << 40, kv_cache_memory_bytes=100 << 20)
    assert (100 << 20) - TOKEN_BYTES * PAGE_TOKENS < ledger.kv_bytes <= 100 << 20
    with pytest.raises(CapacityError, match="kv_cache_memory_bytes is"):
        plan_memory(demand(), free_bytes=1 << 30, kv_cache_memory_bytes=1 << 30)
    with pytest.raises(CapacityError, match="--max-model-len up to"):
        plan_memory(demand(), free_bytes=1 << 40, kv_cache_memory_bytes=20 << 20)


@given(
    window=st.integers(1, 5000),
    length=st.integers(2, 5000),
    chunk=st.integers(1, 600),
    start=st.integers(0, 5000),
    budget=st.integers(1 << 20, 1 << 34),
)
def test_window_pools_hold_a_chunk_wherever_it_starts(
    window: int, length: int, chunk: int, start: int, budget: int
) -> None:
    groups = (KVGroup(page_bytes=8192), KVGroup(page_bytes=32768, window=window))
    asked = demand(groups=groups, max_model_len=length, max_num_batched_tokens=chunk, max_num_seqs=4)
    try:
        ledger = plan_memory(asked, free_bytes=1 << 40, kv_cache_memory_bytes=budget)
    except CapacityError:
        return
    assert ledger.kv_bytes <= budget
    full, windowed = ledger.pages
    assert full >= -(-length // PAGE_TOKENS)
    start = min(start, length - 1)
    end = min(start + chunk, length)
    first = max(start - window + 1, 0)
    live = -(-end // PAGE_TOKENS) - first // PAGE_TOKENS
    assert windowed >= live


@pytest.mark.parametrize("threads", [0, -1, 4097, True])
def test_thread_counts_have_bounds(threads: int) -> None:
    with pytest.raises(ConfigError, match=rf"^threads is {threads!r}; accepted: 1 to 4096"):
        EngineConfig(threads=threads)
