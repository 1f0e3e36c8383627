"""The GPU benchmark's parts, on a tiny model in Triton's interpreter, with a timer that only runs things."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import gpu as script  # noqa: E402
import gpu_timing  # noqa: E402
from gpu_check_steps import check_attention, check_draw, check_model  # noqa: E402
from gpu_checks import Check, Checker, code_error, worst  # noqa: E402
from gpu_engine import EngineBench, EngineLine, Workload  # noqa: E402
from gpu_kernels import Bench, KernelBench, KernelLine, bound_of  # noqa: E402
from gpu_models import FORMATS, Model, Rows, make_ready, make_step, model_specs, random_matrix, with_layers  # noqa: E402
from gpu_report import Report  # noqa: E402
from gpu_stages import Cases, WarmUnit, warm_units, warm_up  # noqa: E402
from gpu_timing import DeviceDeadError, GpuTimer, Session, turns_for  # noqa: E402

from ridgeline.execution.base import Limits  # noqa: E402
from ridgeline.execution.cuda.arrays import A8  # noqa: E402
from ridgeline.execution.cuda.device import Emulated, Gpu  # noqa: E402
from ridgeline.execution.cuda.kernels import weight_only  # noqa: E402
from ridgeline.execution.cuda.pack import dequantise  # noqa: E402
from ridgeline.model.program import StepLoad  # noqa: E402
from ridgeline.model.spec import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec, NormSpec  # noqa: E402
from ridgeline.model.spec import RopeSpec as Rotary  # noqa: E402
from ridgeline.resources.ceilings import Ceilings  # noqa: E402
from ridgeline.resources.cuda import GPU  # noqa: E402
from ridgeline.types import CapacityError, Work  # noqa: E402

DEVICE = Gpu() if torch.cuda.is_available() else Emulated()
_LAYER = LayerSpec(
    AttentionSpec(2, 1, 32, 32**-0.5, Rotary(tuple(0.5**i for i in range(16))), qk_norm=True),
    FeedForwardSpec(96, "silu", gated=True),
)
SPEC = ModelSpec("tiny", 64, 96, 4096, NormSpec("rms", 1e-5), (_LAYER, _LAYER), tied_head=True)
CEILINGS = Ceilings(
    1e12, 4e14, 2e14, 1e13, 2, "sm_90", "a GPU", "now", device="cuda", launch_s=4e-6, graph_launch_s=1e-6
)
CASES = Cases(
    check_rows=(2,),
    row_kernel_rows=5,
    check_contexts=(20,),
    check_chunk=6,
    draw_rows=1,
    decode_rows=(2,),
    prefill_rows=(5,),
    short_context=20,
    long_context=40,
)
WORKLOAD = Workload(
    batches=(2, 1),
    prompt_tokens=4,
    decode_steps=2,
    warm_steps=1,
    prefills=(5,),
    repeats=1,
    sampled_batch=1,
    identity_batch=2,
    identity_alone=1,
    identity_tokens=2,
)


class FakeTimer:
    """Runs every launch once; each takes a microsecond."""

    def __init__(self, working_set_bytes: int = 0) -> None:
        self.working_set_bytes = working_set_bytes
        self.launches = 0
        self.dead = False

    def seconds(self, launches: Sequence[Callable[[], object]]) -> float:
        for launch in launches:
            launch()
        self.launches += len(launches)
        return 1e-6

    def check_alive(self) -> None:
        if self.dead:
            raise RuntimeError("an illegal memory access was encountered")


def bench(timer: FakeTimer | None = None, free_bytes: int = 1 << 30) -> Bench:
    return Bench(DEVICE, timer or FakeTimer(), CEILINGS, lambda: free_bytes)


def tiny(format_name: str = "W4A16-g32") -> Model:
    return Model.of("tiny", SPEC, format_name)


# ------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_random_matrices_have_the_spread_that_was_asked_for(bits: int) -> None:
    random = torch.Generator(DEVICE.where).manual_seed(0)
    values = dequantise(random_matrix(200, 320, bits, 0.125, random)).cpu().numpy()
    assert values.shape == (200, 320)
    assert values.std() == pytest.approx(0.125, rel=0.05)
    assert abs(values.mean()) < 0.005
    assert len(np.unique(values[0])) > 100


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_random_model_gives_finite_logits_that_differ(format_name: str) -> None:
    model = tiny(format_name)
    ready = make_ready(model, DEVICE, Limits(16, (4,), "KV16", 4), graphs=False)
    step = make_step([Rows(3, 0)], SPEC, 4, draw=None)
    logits = ready.executor.run(ready.handle, step).result().logits
    assert np.isfinite(logits).all()
    assert 1 < logits.std() < 9


def test_the_real_shapes_have_as_many_weights_as_their_names_say() -> None:
    counts = {
        name: sum(int(np.prod(w.shape)) for w in Model.of(name, spec, "W16A16").program.weights())
        for name, spec in model_specs().items()
    }
    assert counts == {"llama-3.1-8b": 8_030_261_248, "qwen3-0.6b": 596_049_920}


def test_steps_give_each_sequence_pages_of_its_own() -> None:
    step = make_step([Rows(1, 31, 3), Rows(20, 0)], SPEC, 16)
    tables = [s.segments[0].tables[0] for s in step.sequences]
    assert [len(table) for table in tables] == [2, 2, 2, 2]
    assert len({page for table in tables for page in table}) == 8
    assert (step.rows, step.outputs, len(step.draws)) == (23, 4, 4)


# ------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize("format_name", FORMATS)
def test_products_and_row_kernels_pass_their_checks(format_name: str) -> None:
    checker = Checker(tiny(format_name), DEVICE)
    found = [*checker.linears((1, 3)), *checker.row_kernels(5)]
    assert {check.name: check.error for check in found if not check.passed} == {}
    assert len(found) == 5 * 2 + 7


def test_a_wrong_kernel_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(x: torch.Tensor, matrix: object, out: torch.Tensor, bias: object = None) -> None:
        right(x, matrix, out, bias)
        out[-1, -1] *= 1.01

    right = weight_only.weight_only
    candidates = "ridgeline.execution.cuda.kernels.linear._CANDIDATES"
    from ridgeline.execution.cuda.kernels.linear import _CANDIDATES

    monkeypatch.setattr(candidates, tuple(replace(c, run=forgetful) for c in _CANDIDATES))
    assert not any(check.passed for check in Checker(tiny(), DEVICE).linears((2,)))


def test_what_was_not_written_is_beyond_every_limit() -> None:
    values = torch.ones(3, 4)
    assert worst(values, values) == 0
    assert not Check("", worst(torch.where(values.cumsum(1) == 2, torch.nan, values), values), 1e9).passed
    codes = A8(torch.zeros(2, 32, dtype=torch.int8), torch.ones(2, 1))
    near = A8(codes.codes.clone(), codes.scales)
    near.codes[0, 0] = 1
    assert code_error(near, codes) == 1 / 64
    near.codes[0, 0] = 2
    assert code_error(near, codes) == float("inf")
    assert code_error(A8(codes.codes, codes.scales * torch.nan), codes) == float("inf")


@pytest.mark.parametrize("format_name", ["W4A16-g32", "W8A8-g32"])
def test_attention_passes_its_checks(format_name: str) -> None:
    found = list(check_attention(tiny(format_name), DEVICE, (530,), 6))
    assert [check.passed for check in found] == [True, True], found
    assert all(check.error > 0 for check in found)


def test_drawing_passes_its_checks() -> None:
    found = list(check_draw(96, DEVICE, 2))
    assert [check.error for check in found] == [0] * 5


@pytest.mark.parametrize(("format_name", "layers"), [("W4A16-g32", 2), ("W8A8-g32", 1)])
def test_layers_agree_with_the_reference(format_name: str, layers: int) -> None:
    found = list(check_model(tiny(format_name), DEVICE, layers))
    assert [check.passed for check in found] == [True, True], found


# ------------------------------------------------------------------------------------------ kernels


def test_kernels_are_measured_in_turns_and_counted_like_the_whole_step() -> None:
    timer = FakeTimer(working_set_bytes=2 * 64 * 64 // 2)
    kernels = KernelBench(bench(timer))
    ready = kernels.rows_ready(tiny(), 5, 3)
    assert len(ready.model.spec.layers) == 2  # the smallest product fills half of what caches hold
    lines = [*kernels.row_lines(ready, 3, decode=True)]
    names = [line.kernel for line in lines]
    assert names == [
        "embed", "norm", "q+k+v", "rope, store", "o", "residual norm", "up+gate", "activate",
        "down", "add", "norm, picked", "head", "draw, greedy", "draw, top_p",
    ]  # fmt: skip
    by_name = {line.kernel: line for line in lines}
    product = by_name["up+gate"]
    assert product.work.bf16_flops == 2 * 3 * 192 * 64
    assert product.work.read_bytes == 192 * (32 + 2 * 4) + 3 * 64 * 2
    assert product.work.written_bytes == 3 * 192 * 4
    assert product.torch_s == 1e-6
    assert product.bandwidth_share == pytest.approx(product.work.bytes / 1e12 / 1e-6)
    assert by_name["embed"].torch_s is None


def test_measured_work_adds_up_to_the_executors_own_account() -> None:
    kernels = KernelBench(bench())
    ready = kernels.rows_ready(tiny(), 5, 3)
    rows = {line.kernel: line for line in kernels.row_lines(ready, 5, decode=False)}
    attention, fitting = kernels.attention_ready(tiny(), [Rows(5, 0)])
    line = kernels.attention_line(attention, fitting[0])
    counted = Work.total([line.work, *(one.work for name, one in rows.items() if name != "draw, top_p")])
    step = make_step([Rows(5, 0)], SPEC, ready.limits.pages[0])
    load = StepLoad.of(step, ready.model.program.groups)
    assert len(ready.model.spec.layers) == 1
    assert counted == ready.handle.work.at(load)


def test_contexts_that_do_not_fit_are_left_out() -> None:
    kernels = KernelBench(bench(free_bytes=3 * 8 * 4096))
    _, fitting = kernels.attention_ready(tiny(), [Rows(1, 19), Rows(1, 19, 9)])
    assert fitting == [Rows(1, 19)]


def test_bounds_name_what_takes_longest() -> None:
    assert bound_of(Work(read_bytes=1 << 30), CEILINGS) == "memory"
    assert bound_of(Work(bf16_flops=1 << 40, read_bytes=1 << 20), CEILINGS) == "arithmetic"
    assert bound_of(Work(read_bytes=4096), CEILINGS) == "launch"


def test_working_sets_take_as_many_turns_as_caches_ask_for() -> None:
    assert turns_for(FakeTimer(100), 30, 10) == 4
    assert turns_for(FakeTimer(100), 3, 10) == 10
    assert turns_for(FakeTimer(0), 3, 10) == 1


# ------------------------------------------------------------------------------------------- engine


def test_batches_that_do_not_fit_are_left_out() -> None:
    page = 16 * 2 * 32 * 2 * 2
    sequence = Rows(1, WORKLOAD.most_tokens).pages * page
    model = tiny()
    weights = sum(int(np.prod(w.shape)) for w in model.program.weights()) // 2
    some = bench(free_bytes=int(1.25 * weights + 1.5 * sequence / 0.6))
    assert EngineBench(model, some, WORKLOAD).batches == (1,)
    with pytest.raises(CapacityError, match="pages of KV cache fit"):
        EngineBench(model, bench(free_bytes=int(1.25 * weights + sequence)), WORKLOAD)


# ------------------------------------------------------------------------------- time, and failures


class FakeCuda:
    """A device on which every launch takes ten microseconds, and starting one from Python another ten."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.recording: list[int] | None = None
        self.replays: list[int] = []

    def launch(self) -> None:
        if self.recording is not None:
            self.recording[0] += 1
        else:
            self.now_ms += 0.02

    def synchronize(self) -> None: ...

    def Event(self, enable_timing: bool) -> SimpleNamespace:  # noqa: N802 - as PyTorch names it
        event = SimpleNamespace(at_ms=0.0, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at_ms", self.now_ms)
        event.elapsed_time = lambda end: end.at_ms - event.at_ms
        return event

    def CUDAGraph(self) -> SimpleNamespace:  # noqa: N802
        recorded = [0]

        def replay() -> None:
            self.replays.append(recorded[0])
            self.now_ms += 0.01 * recorded[0]

        return SimpleNamespace(recorded=recorded, replay=replay)

    @contextmanager
    def graph(self, graph: SimpleNamespace) -> Iterator[None]:
        self.recording = graph.recorded
        yield
        self.recording = None


def test_launches_are_timed_by_replays_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(gpu_timing.torch, "cuda", cuda)
    gpu = GPU("a GPU", (9, 0), 132, 1 << 37, 50 << 20)
    assert GpuTimer(gpu).working_set_bytes == 100 << 20
    assert GpuTimer(gpu).seconds([cuda.launch] * 3) == pytest.approx(1e-5)
    # Three launches take 60 microseconds from Python: 34 turns make 2 ms, and half of that in a graph.
    assert cuda.replays == [3 * 34] * (1 + 1 + 2 * gpu_timing.SAMPLES)


def test_what_there_is_no_time_for_is_skipped_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]

    def slow() -> str:
        now[0] += 4
        return "done"

    session = Session(FakeTimer(), 10, clock=lambda: now[0])
    assert [session.run("slow", f"case {i}", slow) for i in range(3)] == ["done", "done", None]
    assert session.run("short", "another", lambda: 1) == 1  # something shorter still has its time
    assert session.run("long", "the last", lambda: 1, least_s=3.0) is None
    assert session.skipped == ["case 2", "the last"]
    assert "skipped for lack of time: case 2" in capsys.readouterr().out


def test_failures_are_told_and_the_rest_goes_on_unless_the_device_is_gone() -> None:
    timer = FakeTimer()
    session = Session(timer, 10)

    def broken() -> None:
        raise ValueError("no such kernel")

    assert session.run("kernels", "first", broken) is None
    assert session.run("kernels", "second", lambda: 2) == 2
    assert session.failed == ["first: ValueError: no such kernel"]
    timer.dead = True
    with pytest.raises(DeviceDeadError, match="after third"):
        session.run("engine", "outer", partial(session.run, "kernels", "third", broken))


def test_warm_units_cover_every_model_and_format() -> None:
    units = warm_units(("a", "b"), ("W16A16", "W8A8-g32"), Cases())
    assert len(units) == len(set(units)) == 2 * 2 * 5
    assert units[0] == WarmUnit("a", "W16A16", 1, True)
    warm_up(WarmUnit("tiny", "W4A16-g32", 3, True), SPEC, DEVICE, CASES)
    warm_up(WarmUnit("tiny", "W4A16-g32", 5, False), SPEC, DEVICE, CASES)


# ------------------------------------------------------------------------------- all of it, reported


@dataclass(frozen=True)
class Told:
    """What a call of the script said and wrote."""

    code: int
    said: str
    found: dict[str, Any]
    plot: Path


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """The whole command on a model of one layer, without matplotlib."""
    folder = tmp_path_factory.mktemp("told")
    json_path, plot = folder / "deep" / "gpu.json", folder / "gpu.png"
    options = ["--formats=W16A16", "--minutes=60", f"--json={json_path}", f"--plot={plot}"]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setitem(sys.modules, "matplotlib", None)
        patch.setattr(sys, "argv", ["gpu.py", *options])
        for name, value in {
            "gpu.cuda_unavailable": lambda: None,
            "gpu.cuda_device": lambda: GPU("a GPU", (9, 0), 2, 1 << 30, 0),
            "gpu.cuda_free_memory_bytes": lambda: 1 << 30,
            "gpu.Warmers": lambda count, options: SimpleNamespace(wait=lambda until_s: count),
            "gpu_timing.GpuTimer": lambda gpu: FakeTimer(),
            "gpu_models.model_specs": lambda: {"tiny": with_layers(SPEC, 1)},
            "gpu_stages.Cases": lambda: CASES,
            "gpu_stages.ATTENTION_FORMATS": ("W16A16",),
            "gpu_engine.Workload": lambda: WORKLOAD,
            "ridgeline.execution.cuda.device.Gpu": lambda: DEVICE,
            "ridgeline.resources.cuda_probe.measure_gpu": lambda: CEILINGS,
        }.items():
            patch.setattr(name, value)
        code = script.main()
    return Told(code, said.getvalue(), json.loads(json_path.read_text()), plot)


def test_nothing_fails_and_everything_is_told(told: Told) -> None:
    assert told.code == 0
    assert (told.found["failed"], told.found["skipped"]) == ([], [])
    assert all(check["passed"] for check in told.found["checks"])
    assert told.found["machine"]["torch"] == torch.__version__
    assert told.found["ceilings"]["read_bytes_per_s"] == 1e12
    count = len(told.found["checks"])
    for wanted in (
        f"torch           {torch.__version__}",
        "ceilings, measured",
        "kernels, tiny W16A16",
        "engine, tiny W16A16",
        "up+gate",
        f"{count} of {count} checks within their limits",
        "no picture: ",
    ):
        assert wanted in told.said
    assert not told.plot.exists()


def test_every_kernel_is_measured_at_every_size(told: Told) -> None:
    lines = told.found["kernels"]
    products = [(line["rows"], line["work"]["bf16_flops"]) for line in lines if line["kernel"] == "down"]
    assert products == [(2, 2 * 2 * 96 * 64), (5, 2 * 5 * 96 * 64)]
    attention = [(line["rows"], line["context"]) for line in lines if line["kernel"] == "attention"]
    assert attention == [(2, 20), (5, 5), (5, 40)]
    assert {line["bound"] for line in lines} == {"launch"}


def test_the_engine_is_measured_at_every_load(told: Told) -> None:
    lines = told.found["engine"]
    assert [(line["load"], line["batch"], line["graphs"]) for line in lines] == [
        ("prefill 5", 1, True),
        ("mixed", 2, False),
        *(("decode, context 4", batch, graphs) for batch in (2, 1) for graphs in (True, False)),
        ("decode, top_p, context 4", 1, True),
    ]
    for line in lines:
        assert line["tokens_per_s"] == pytest.approx(line["rows_per_step"] / line["wall_s"])
        # 14 launches, one more kernel that merges, and one for the rotary angles.
        launch_s = CEILINGS.graph_launch_s if line["graphs"] else CEILINGS.launch_s
        assert 16 * launch_s < line["predicted_s"] < 17 * launch_s
    assert lines[0]["rows_per_step"] == 5
    assert lines[-2]["rows_per_step"] == 1
    identity = told.found["identity"]
    assert [(i["drawing"], i["batch"], i["requests"]) for i in identity] == [
        ("greedy", 2, 1),
        ("top_p", 2, 1),
    ]


def test_errors_beyond_their_limit_are_kept_in_what_is_written(tmp_path: Path) -> None:
    report = Report()
    report.check("subject", Check("nothing was written", float("nan"), 1.0))
    report.check("subject", Check("fine", 0.5, 1.0))
    assert report.beyond == ["subject: nothing was written"]
    report.write_json(tmp_path / "gpu.json", skipped=["a case"])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [(check["error"], check["passed"]) for check in found["checks"]] == [("nan", False), (0.5, True)]
    assert found["skipped"] == ["a case"]


def test_the_roofline_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    work = Work(bf16_flops=1 << 30, read_bytes=1 << 20)
    report = Report(ceilings=CEILINGS)
    report.kernel(KernelLine("tiny", "W16A16", "down", 1, 1, 1e-3, work, 0.1, 0.1, "memory", False))
    report.engine_line(
        EngineLine("tiny", "W16A16", "decode", 1, True, 1, 1, 1e-3, 1e-3, 1e-3, 0.1, 0.1, work)
    )
    report.write_plot(tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


# -------------------------------------------------------------------------------------- the command


def test_without_a_gpu_the_command_says_so_in_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, str(BENCH / "gpu.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: no GPU to measure: ")
    assert len(done.stderr.splitlines()) == 1


def test_names_on_the_command_line_are_checked() -> None:
    assert script.names_of("checks, engine", script.STAGES, "--only") == ["checks", "engine"]
    with pytest.raises(SystemExit, match="--only is 'chess'; accepted: machine, checks, kernels, engine"):
        script.names_of("chess", script.STAGES, "--only")


def test_processes_that_compile_are_waited_for_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/sh")
    monkeypatch.setattr(script, "__file__", "-c")
    monkeypatch.setattr(script.Path, "resolve", lambda self: self)
    late = script.Warmers(2, ["sleep 60"])
    assert late.wait(0.0) == 2
    assert script.Warmers(2, ["true"]).wait(script.time.monotonic() + 20) == 0
    assert script.warmer_count(0) == 0


def test_it_needs_nothing_that_has_to_be_built_or_that_only_the_command_line_uses() -> None:
    modules = [path.stem for path in BENCH.glob("gpu*.py")]
    absent = ["typer", "tokenizers", "rich", "jinja2", "psutil", "filelock", "huggingface_hub", "safetensors"]
    code = f"""
import sys
for name in {[*absent, "platformdirs", "ridgeline.native._native", "matplotlib"]!r}:
    sys.modules[name] = None
sys.path.insert(0, {str(BENCH)!r})
for module in {modules!r}:
    __import__(module)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
