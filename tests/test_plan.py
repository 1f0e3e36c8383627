"""Plans: bytes and work against what executors do, bounds against published speeds, and what is advised."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli, command_line
from hypothesis import given
from hypothesis import strategies as st
from running import load
from test_catalog import FakeHub
from tiny_models import TinyModel

from ridgeline.apps.plan import check as check_module
from ridgeline.apps.plan import timing
from ridgeline.apps.plan.answer import BATCHES, Question, answer
from ridgeline.apps.plan.host import Host, host_here, host_of_fleet
from ridgeline.apps.plan.ledger import ledger_of, sequences
from ridgeline.apps.plan.model import FormattedModel, PlannedModel, open_model
from ridgeline.apps.plan.serving import Workload, forecast
from ridgeline.apps.plan.steps import load_of, ridge_batch, step_time
from ridgeline.apps.step_meter import Cell
from ridgeline.config import EngineConfig
from ridgeline.execution.lowering import WorkModel
from ridgeline.model.program import StepLoad
from ridgeline.resources.ceilings import Ceilings
from ridgeline.resources.fleet import parse_fleet
from ridgeline.resources.memory import (
    RESERVE_SHARE,
    Demand,
    KVGroup,
    bytes_of_sequences,
    plan_memory,
    sequences_that_fit,
)
from ridgeline.resources.presets import presets
from ridgeline.resources.roofline import arithmetic_s, memory_s
from ridgeline.resources.step_costs import costs_of
from ridgeline.types import Segment, SequenceRows, Step

Tiny = Callable[[str], TinyModel]
PUBLISHED = json.loads((Path(__file__).parent / "data" / "published_decode.json").read_text())

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
LLAMA_2_7B = _LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
LLAMA_2_70B = LLAMA_2_7B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
LLAMA_3_405B = _LLAMA | {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
MISTRAL = LLAMA_2_7B | {
    "model_type": "mistral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
TWO_CORES = Ceilings(
    read_bytes_per_s=39e9,
    int8_ops_per_s=884e9,
    bf16_flops_per_s=459e9,
    fp32_flops_per_s=231e9,
    threads=2,
    isa="avx512_bf16",
    machine="two cores",
    measured_at="2026-11-01T00:00:00+00:00",
)


@pytest.fixture
def ridgeline(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    return command_line(monkeypatch, capfd, tmp_path / "cache")


def configured(folder: Path, config: dict[str, Any]) -> PlannedModel:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return open_model(path)


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> PlannedModel:
    return configured(tmp_path_factory.mktemp("llama2"), LLAMA_2_7B)


@pytest.fixture(scope="module")
def llama405(tmp_path_factory: pytest.TempPathFactory) -> PlannedModel:
    return configured(tmp_path_factory.mktemp("llama405"), LLAMA_3_405B)


def preset(name: str) -> Host:
    return host_of_fleet(parse_fleet(name))


def half(source: PlannedModel) -> FormattedModel:
    return source.in_format("W16A16", "cuda", "KV16")


# --------------------------------------------------------------------------------------------- bytes


def test_kv_bytes_per_token_of_known_models(llama2: PlannedModel, llama405: PlannedModel) -> None:
    assert sum(half(llama405).kv_bytes_per_token) == 516_096
    assert sum(half(llama2).kv_bytes_per_token) == 524_288
    assert sum(llama2.in_format("W32A32", "cuda", "KV32").kv_bytes_per_token) == 2 * 524_288
    scales = 2 * 32 * 32 * 4
    assert sum(llama2.in_format("W16A16", "cuda", "KV8").kv_bytes_per_token) == 524_288 // 2 + scales


def test_parameters_and_weights_of_known_models(llama2: PlannedModel, llama405: PlannedModel) -> None:
    assert llama2.parameters == 6_738_415_616
    assert llama405.parameters == 405_853_388_800
    norms = 65 * 4096
    assert half(llama2).weights_bytes == {"W16A16": 2 * (6_738_415_616 - norms), "F32": 4 * norms}
    eight = llama2.in_format("W8A16-g32", "cuda", "KV16").weights_bytes["W8A16-g32"]
    assert eight == (6_738_415_616 - norms) * 34 // 32  # a float16 scale for each group of 32


@pytest.mark.parametrize("family", ["llama", "llama3", "gpt2", "gemma3"])
@pytest.mark.parametrize("weights", ["auto", "W4A8-g32", "W32A32"])
def test_a_configuration_plans_as_its_checkpoint(
    tiny: Tiny, family: str, weights: str, tmp_path: Path
) -> None:
    folder = tiny(family).folder
    config = json.loads((folder / "config.json").read_text())
    with open_model(folder) as whole, configured(tmp_path, config) as bare:
        one, other = (source.in_format(weights, "cpu", "KV16") for source in (whole, bare))
        assert whole.parameters == bare.parameters
        assert sum(one.weights_bytes.values()) == other.nbytes
        load_ = load_of(model=one, rows=7, context=70, batch=3)
        assert one.work.parts(load_) == other.work.parts(load_)
        assert (bare.bare, whole.bare) == (True, False)


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_work_is_the_executors(tiny: Tiny, family: str) -> None:
    """Arithmetic and KV cache exactly; packed weights are padded to whole tiles, which tiny ones feel."""
    loaded = load(tiny(family).folder, "portable", "W8A8-g32")
    with open_model(tiny(family).folder) as source:
        model = source.in_format("W8A8-g32", "cpu", "KV16")
    step = Step((loaded.rows(range(2, 40)),))
    done = loaded.executor.run(loaded.handle, step).result().work.total
    planned = model.work.at(StepLoad.of(step, model.program.groups))
    loaded.executor.close()
    kinds = ("int8_ops", "bf16_flops", "fp32_flops", "written_bytes")
    assert [getattr(planned, kind) for kind in kinds] == [getattr(done, kind) for kind in kinds]
    assert done.read_bytes * 0.8 < planned.read_bytes <= done.read_bytes


@pytest.mark.parametrize(("rows", "batch", "within"), [(1, 1, 0.001), (1, 32, 0.02), (512, 1, 0.2)])
def test_the_cpus_lowering_stands_for_a_gpus(
    llama2: PlannedModel, rows: int, batch: int, within: float
) -> None:
    """They differ in which activations cross launches: a GPU's move more, which prompts feel."""
    from ridgeline.execution.cuda.lower import lower

    model = half(llama2)
    launches = lower(model.program)
    work = WorkModel.of(model.program, launches, model.footprint)
    load = load_of(model, rows, 512, batch)
    assert work.at(load).ops == model.work.at(load).ops
    assert work.at(load).bytes == pytest.approx(model.work.at(load).bytes, rel=within)
    assert len(launches) == pytest.approx(model.work.parts(load).launches, rel=0.15)


def test_bytes_of_a_step_by_kind(llama2: PlannedModel) -> None:
    model, host = half(llama2), preset("a100")
    step = step_time(model, load_of(model, 1, 1000, batch=4), host)
    table = 2 * 32000 * 4096  # rows of it are looked up
    assert step.work.weight_bytes == model.nbytes - table
    assert step.work.kv_bytes == 4 * 1001 * 524_288  # a thousand are read, the last of them was written
    activations = step.work.total.bytes - step.work.weight_bytes - step.work.kv_bytes
    assert 0 < activations < 0.01 * step.work.total.bytes


def test_of_experts_a_step_reads_those_that_are_chosen(tmp_path: Path) -> None:
    """Mixtral 8x7B: two of eight for a row, all of them for many."""
    config = MISTRAL | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    with configured(tmp_path, config | {"sliding_window": None}) as source:
        assert source.parameters == 46_702_792_704
        model = half(source)
    experts, table = 2 * 32 * 8 * 3 * 4096 * 14336, 2 * 32000 * 4096
    host = preset("h100")
    one, many = (
        step_time(model, load_of(model, 1, 100, batch), host).work.weight_bytes for batch in (1, 512)
    )
    assert one == model.nbytes - table - experts * 6 // 8
    assert many == model.nbytes - table


def test_a_window_bounds_what_is_kept_and_read(tmp_path: Path) -> None:
    with configured(tmp_path, MISTRAL) as source:
        model = half(source)
    host = preset("h100")
    short, long = (step_time(model, load_of(model, 1, n), host).work.kv_bytes for n in (4096, 30_000))
    assert short == long
    kept = ledger_of(model, host, 30_000, 1)
    assert [(group.window, group.layers) for group in kept.kv] == [(4096, 32)]
    assert kept.sequence_bytes < 1.01 * 4096 * kept.kv_bytes_per_token
    assert kept.shared_bytes == 512 * kept.kv_bytes_per_token


def test_loads_add_up(llama2: PlannedModel) -> None:
    model = half(llama2)
    segment = Segment(((),), 70)
    rows = [SequenceRows(range(7), 63, (segment,), (6,))] * 3
    assert load_of(model, 7, 70, batch=3) == StepLoad.of(Step(tuple(rows)), model.program.groups)
    both = load_of(model, 7, 70, batch=2) + load_of(model, 7, 70)
    assert both == load_of(model, 7, 70, batch=3)


groups = st.lists(
    st.builds(KVGroup, st.integers(1, 1 << 20), st.none() | st.integers(1, 3000)), min_size=1, max_size=3
)


@given(groups, st.integers(1, 5000), st.integers(1, 1 << 34), st.sampled_from([0.5, 1.0]))
def test_as_many_sequences_fit_as_the_engine_makes_room_for(
    kept: list[KVGroup], tokens: int, free_bytes: int, share: float
) -> None:
    demand = Demand(1 << 20, 1 << 16, tuple(kept), tokens, 1 << 40, 512)
    fitting = sequences_that_fit(demand, free_bytes, share)
    each, shared = bytes_of_sequences(demand)
    available = int(free_bytes * (1 - RESERVE_SHARE)) - (1 << 20) - (1 << 16)
    if not fitting:
        assert available < each + shared
        return
    ledger = plan_memory(demand, free_bytes, pool_share=share)
    assert fitting * each + shared <= ledger.kv_bytes + each
    assert ledger.kv_bytes < (fitting + 1) * each + shared
    assert fitting == 1 or fitting * each + shared <= available * share


# --------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize(
    "row", PUBLISHED["measured"], ids=lambda row: f"{row['model']}-{row['weights']}-{row['devices']}"
)
def test_published_speeds_are_below_the_bound(row: dict[str, Any], tmp_path: Path) -> None:
    """And near the expectation with 16 bits, for which the shares are, on one device: links do not count."""
    config = {"Llama-2-7B": LLAMA_2_7B, "Llama-2-70B": LLAMA_2_70B}[row["model"]]
    with configured(tmp_path, config) as source:
        model = source.in_format(row["weights"], "cuda", "KV16")
    workload = Workload(PUBLISHED["prompt"], PUBLISHED["output"])
    seen = forecast(model, preset(f"{PUBLISHED['machine']}x{row['devices']}"), workload)
    assert seen.throughput.most_per_s > row["tokens_per_s"]
    assert seen.decode_step.bound == "weights"
    if row["weights"] == "W16A16" and row["devices"] == 1:
        assert seen.throughput.expected_per_s == pytest.approx(row["tokens_per_s"], rel=0.25)


def test_the_expectation_is_near_what_was_measured(default_model_path: Path) -> None:
    """Of a model that the shares were not fitted to; docs/performance.md has the measurements."""
    with open_model(default_model_path) as source:
        model = source.in_format("auto", "cpu", "KV16")
    host = host_here(TWO_CORES, 20 << 30)
    for batch, rows, context, tokens_per_s in ((1, 1, 128, 232), (1, 512, 512, 1840), (32, 1, 128, 1294)):
        expected = step_time(model, load_of(model, rows, context, batch), host).expected_s
        assert batch * rows / expected == pytest.approx(tokens_per_s, rel=0.15)


def test_growing_batches(llama2: PlannedModel) -> None:
    model, host, workload = half(llama2), preset("h100"), Workload(512, 64)
    seen = [forecast(model, host, workload, batch) for batch in BATCHES]
    for few, many in itertools.pairwise(seen):
        assert many.throughput.expected_per_s > few.throughput.expected_per_s
        assert many.itl.expected_s > few.itl.expected_s
        assert many.ttft.expected_s > few.ttft.expected_s
    for one in seen:
        assert one.itl.least_s <= one.itl.expected_s <= one.itl_prefill.expected_s
        assert one.throughput.most_per_s > one.throughput.expected_per_s
    assert seen[0].decode_step.bound == "weights"
    assert seen[0].prefill_step.bound == "arithmetic"
    assert forecast(model, host, Workload(3000, 64), 64).decode_step.bound == "KV cache"


def test_a_long_prompt_is_read_in_steps(llama2: PlannedModel) -> None:
    model, host = half(llama2), preset("h100")
    whole = forecast(model, host, Workload(1024, 8)).ttft
    loads = [replace(load_of(model, 512, 512), outputs=0), load_of(model, 512, 1024)]
    steps = [step_time(model, load, host) for load in loads]
    assert whole.least_s == pytest.approx(sum(step.bound_s for step in steps))
    assert whole.expected_s == pytest.approx(sum(step.expected_s for step in steps))


def test_launches_cost_where_they_were_measured(llama2: PlannedModel) -> None:
    gpu = replace(TWO_CORES, device="cuda", launch_s=9e-6, graph_launch_s=1e-6)
    model, free = half(llama2), host_here(replace(gpu, graph_launch_s=0.0), 80 << 30)
    load = load_of(model, 1, 100)
    costly = step_time(model, load, host_here(gpu, 80 << 30))
    assert costly.overhead_s == pytest.approx(costly.work.launches * 1e-6)
    assert costly.bound_s == pytest.approx(step_time(model, load, free).bound_s + costly.overhead_s)
    slow = host_here(replace(gpu, graph_launch_s=1.0), 80 << 30)
    assert step_time(model, load, slow).bound == "overhead"


def test_ridge_batch(llama2: PlannedModel, llama405: PlannedModel) -> None:
    """Without KV cache it is ridge × bytes per weight / 2, and a little more for activations."""
    host = preset("h200")
    model = half(llama405)
    ridge = presets()["H200"].bf16_flops_per_s / presets()["H200"].read_bytes_per_s
    found = ridge_batch(model, host)
    assert found is not None
    assert ridge <= found <= 1.05 * ridge
    for batch, computes in ((found, True), (found - 1, False)):
        load = replace(load_of(model, 1, 1, batch), pairs=(0,), slots=(0,))
        work = model.work.at(load)
        assert (arithmetic_s(work, host.rates) >= memory_s(work, host.rates)) is computes
    assert ridge_batch(half(llama2), host, 4096) is None  # attention alone has too few operations per byte


def test_several_devices_are_one_of_their_size(llama405: PlannedModel) -> None:
    model = half(llama405)
    one, eight = preset("h200"), preset("h200x8")
    load = load_of(model, 1, 1000)
    assert step_time(model, load, one).bound_s == pytest.approx(8 * step_time(model, load, eight).bound_s)
    assert eight.memory_bytes == 8 * one.memory_bytes
    assert sequences(model, one, 4096, 1) == 0 < sequences(model, eight, 4096, 1)


def test_energy_and_money_of_a_token(llama2: PlannedModel) -> None:
    host = host_of_fleet(parse_fleet("h100x2"), power_w=500, usd_per_hour=3.6)
    seen = forecast(half(llama2), host, Workload(100, 50, 4))
    seconds = 1 / seen.throughput.expected_per_s
    assert seen.joules_per_token == pytest.approx(2 * 500 * seconds)
    assert seen.usd_per_million_tokens == pytest.approx(2 * 3.6 / 3600 * seconds * 1e6)
    assert forecast(half(llama2), host_here(TWO_CORES, 1 << 40), Workload()).joules_per_token is None


# -------------------------------------------------------------------------------------------- advice


def asked(name: str, workload: Workload, weights: str = "auto") -> Question:
    fleet = parse_fleet(name)
    return Question(
        workload,
        host_of_fleet(fleet),
        weights,
        more_hosts=lambda count: host_of_fleet(replace(fleet, count=count)),
    )


@pytest.mark.parametrize(
    ("machine", "weights", "flag", "value"),
    [
        ("h200x8", "auto", None, None),
        ("h200x4", "auto", "--weights", "W8A16-g32"),  # 431 GB in 604
        ("h200", "auto", "--machine", "H200x8"),  # 4 bits are 254 GB
        ("h200x4", "W16A16", "--machine", "H200x8"),
    ],
)
def test_what_to_change_where_weights_do_not_fit(
    llama405: PlannedModel, machine: str, weights: str, flag: str | None, value: str | None
) -> None:
    plan = answer(llama405, asked(machine, Workload(), weights))
    assert plan.fits is plan.ledger.has_room_for_weights is (flag is None)
    if flag is None:
        assert plan.change is None
    else:
        assert plan.change is not None
        assert (plan.change.flag, plan.change.value) == (flag, value)


def test_what_to_change_where_users_do_not_fit(llama2: PlannedModel) -> None:
    """2.1 GB of KV cache each: on one machine that cannot be more, only fewer users are left."""
    workload = Workload(3000, 1000, users=64)
    plan = answer(llama2, replace(asked("a100", workload, "W16A16"), more_hosts=None))
    assert not plan.fits
    assert plan.ledger.has_room_for_weights
    assert plan.change is not None
    assert plan.change.flag == "--users"
    room = plan.ledger.sequences
    assert plan.change.value == str(room)
    assert 0 < room < 64
    assert sequences(plan.model, plan.question.host, 4000, room) >= room
    assert answer(llama2, asked("a100x4", workload, "W16A16")).fits


def test_fewer_bits_of_keys_come_first_where_they_are_the_matter(llama2: PlannedModel) -> None:
    """69 GB of KV cache in 16 bits beside 13.5 GB of weights, of 77 GB that may be taken."""
    crowded = replace(asked("a100", Workload(2700, 300, users=44)), narrower_kv="KV8")
    plan = answer(llama2, crowded)
    assert not plan.fits
    assert plan.change is not None
    assert (plan.change.flag, plan.change.value) == ("--kv-format", "KV8")
    large = answer(llama2, replace(asked("l4", Workload(64, 64)), narrower_kv="KV8"))
    assert large.fits
    small = answer(llama2, replace(asked("l4", Workload(64, 64, itl_s=0.04)), narrower_kv="KV8"))
    assert small.change is not None
    assert small.change.flag == "--weights"


def test_the_best_choice_meets_the_targets(llama2: PlannedModel) -> None:
    workload = Workload(512, 128, itl_s=0.0125)
    plan = answer(llama2, asked("a100", workload))
    assert plan.meets
    assert plan.best is not None
    assert plan.best.forecast.meets(workload)
    wider = llama2.in_format(plan.best.weights, "cuda", "KV16")
    following = BATCHES[BATCHES.index(plan.best.forecast.users) + 1 :]
    assert not any(forecast(wider, plan.question.host, workload, n).meets(workload) for n in following)
    slow = answer(llama2, asked("a100", replace(workload, itl_s=0.005)))
    assert not slow.meets
    assert slow.change is not None
    assert slow.change.flag == "--weights"
    never = answer(llama2, asked("a100", replace(workload, itl_s=1e-6)))
    assert (never.best, never.change, never.fits, never.meets) == (None, None, True, False)


def test_a_quantised_file_is_offered_nothing_that_gains_nothing(default_model_path: Path) -> None:
    with open_model(default_model_path) as source:
        plan = answer(source, Question(Workload(), host_here(TWO_CORES, 20 << 30)))
    assert plan.best is not None
    assert plan.best.weights == "auto"


# --------------------------------------------------------------------------------------- the command


def test_json(ridgeline: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_405B))
    outcome = ridgeline(
        "plan", tmp_path, "--machine", "H200x8", "--users", 4, "--itl", 30, "--sweep", "--json"
    )
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["memory"]["kv_bytes_per_token"] == 516_096
    assert (found["fits"], found["meets_targets"], found["change"]) == (True, True, None)
    assert [row["users"] for row in found["sweep"]] == list(BATCHES)
    assert found["workload"]["itl_s"] == 0.03
    for cell in found["cells"]:
        assert set(cell) == {"name", "predicted", "unit"}
        assert cell["predicted"] > 0
    assert any("communication" in line for line in found["notes"])


def test_what_people_read(ridgeline: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_405B | {"quantization_config": {}}))
    outcome = ridgeline("plan", tmp_path, "--machine", "h200", "--sweep")
    assert outcome.code == 0, outcome.err
    for words in (
        "516,096 B",
        "126 layers that keep all tokens",
        "the weights do not fit; --machine H200x8 changes that: ",
        "between tokens",
        "bound by",
        "ridge batch",
        "counted as floats",
        "USD per M tokens",
    ):
        assert words in outcome.out, words


def test_this_machine(ridgeline: Cli, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ridgeline.resources.probe.quick_ceilings", lambda threads, device: TWO_CORES)
    outcome = ridgeline("plan", tiny_llama, "--device", "cpu", "-p", 64, "-n", 32)
    assert outcome.code == 0, outcome.err
    assert "two cores" in outcome.out
    assert "--power gives it" in outcome.out
    assert "it fits" in outcome.out


def test_of_a_hub_model_the_configuration_is_fetched(
    ridgeline: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, where there is nothing else that is read."""
    files = {"config.json": json.dumps(LLAMA_2_7B).encode(), "model.bin": b"never fetched"}
    hub = FakeHub(monkeypatch, tmp_path / "hub", files)
    outcome = ridgeline("plan", "hf.co/some/model", "--machine", "a100", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["model"]["parameters"] == 6_738_415_616
    assert [path.name for path in hub.cache.rglob("snapshots/*/*")] == ["config.json"]
    hub.files = {"model.Q4_0.gguf": b"GGUF"}
    refused = ridgeline("plan", "hf.co/other/model", "--machine", "a100")
    assert refused.code == 1
    assert "damaged" in refused.err or "ends inside" in refused.err
    assert hub.ranges == [("model.Q4_0.gguf", 0, 4)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--machine", "h300"), "the nearest is"),
        (("--machine", "h100", "--device", "cpu"), "accepted: one of them"),
        (("--machine", "h100", "--threads", 4), "accepted: one of them"),
        (("--machine", "epyc9654", "--weights", "W4A16-g32"), "accepted on cpu"),
        (("--machine", "h100", "--prompt", 4000), "accepted: up to 4096"),
        (("--machine", "h100", "--prompt", 0), "prompt is 0"),
        (("--machine", "h100", "--users", 10**6), "users is 1000000"),
        (("--machine", "h100", "--ttft", 0), "ttft is 0 ms"),
        (("--machine", "h100", "--itl", "nan"), "itl is nan ms"),
        (("--machine", "h100", "--price", -1), "price is -1"),
        (("--device", "reference"), "accepted: auto, cpu, cuda"),
    ],
)
def test_mistakes_are_one_line(
    ridgeline: Cli, tmp_path: Path, arguments: tuple[object, ...], words: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    more = () if "--prompt" in arguments else ("--prompt", 3000, "--output", 1000)
    outcome = ridgeline("plan", tmp_path / "config.json", *more, *arguments)
    assert outcome.code == 1
    assert words in outcome.err
    assert outcome.err.count("\n") == 1
    assert not outcome.out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[]", "accepted: an object"),
        (b"{", "not valid JSON"),
        (b'{"model_type": "mamba9"}', "model_type is 'mamba9'"),
        (b'{"model_type": "deepseek_v3"}', "kv_lora_rank"),
        (b'{"model_type": "llama"}', "hidden_size"),
    ],
)
def test_configurations_that_are_none(ridgeline: Cli, tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    outcome = ridgeline("plan", tmp_path, "--machine", "h100")
    assert outcome.code == 1
    assert words in outcome.err
    assert outcome.err.count("\n") == 1


def test_paths_that_hold_nothing(ridgeline: Cli, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json", "smollm2"):
        outcome = ridgeline("plan", path, "--machine", "h100")
        assert outcome.code == 1
        assert outcome.err.count("\n") == 1


# --------------------------------------------------------------------------------------------- check


def test_check_runs_what_it_predicts(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "fitted_costs", lambda *_: costs_of("cpu"))
    monkeypatch.setattr(timing, "measure", lambda *_, **__: TWO_CORES)
    cells = (Cell(1, 64), Cell(3, 200), Cell(0, 100), Cell(1, 4096))
    config = EngineConfig(device="cpu", threads=1, kv_cache_memory_bytes=64 << 20)
    found = check_module.check(tiny("llama3").gguf, config, 1, cells)
    names = [cell.name for cell in cells[:3]]  # the last is longer than the context
    assert [one.name for one in found] == [*names, "weights", "KV cache", "weights, KV cache and activations"]
    assert {one.unit for one in found[:3]} == {"s"}
    assert all(one.predicted > 0 and one.measured > 0 for one in found[:3])
    prompt = check_module.check(tiny("llama3").gguf, config, 1, cells[2:3])
    assert [one.name for one in prompt] == [cells[2].name, "weights"]


def test_some_of_the_cells_can_be_checked(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert check_module.cells_named("") == list(check_module.CELLS)
    assert {cell.batch for cell in check_module.cells_named("prefill")} == {0}
    assert [cell.context for cell in check_module.cells_named("batch 8")] == [128, 2048]
    run = command_line(monkeypatch, capfd, tmp_path)
    for arguments, words in {
        ("--check", "--cells", "batch 9"): "cells is 'batch 9'; accepted: part of decode, batch 1, context",
        ("--cells", "prefill"): "accepted: with --check",
    }.items():
        done = run("plan", "smollm2", *arguments)
        assert done.code != 0
        assert done.err.count("\n") == 1
        assert words in done.err


def test_check_is_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    done = command_line(monkeypatch, capfd, tmp_path)("plan", "smollm2", "--check", "--machine", "H100")
    assert done.code != 0
    assert done.err.count("\n") == 1
    assert "without --machine" in done.err
