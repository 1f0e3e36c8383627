"""Sizes of published models, from their configurations alone: latent memory, experts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli, command_line

from ridgeline import LLM
from ridgeline.apps.plan.model import PlannedModel, open_model
from ridgeline.apps.plan.steps import load_of
from ridgeline.model.program import Attention, ExpertLinear, Linear
from ridgeline.types import CheckpointError

PUBLISHED = json.loads((Path(__file__).parent / "data" / "published_sizes.json").read_text())["models"]
DEEPSEEK_V3 = next(row for row in PUBLISHED if row["model"] == "DeepSeek-V3")
PRODUCTS = (Linear, ExpertLinear, Attention)


@pytest.fixture
def ridgeline(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    return command_line(monkeypatch, capfd, tmp_path / "cache")


def opened(folder: Path, config: dict[str, Any]) -> PlannedModel:
    (folder / "config.json").write_text(json.dumps(config))
    return open_model(folder)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row["model"])
def test_sizes_of_published_models(row: dict[str, Any], tmp_path: Path) -> None:
    with opened(tmp_path, row["config"]) as source:
        model = source.in_format("W16A16", "cuda", "KV16")
    assert sum(model.kv_bytes_per_token) == row["kv_bytes_per_token"]
    assert source.parameters == pytest.approx(row["parameters"], rel=0.005)
    # What a token is multiplied with.
    one = load_of(model, 1, 1)
    passed = [op.work(one).bf16_flops for op in model.program.operations if isinstance(op, PRODUCTS)]
    pairs = sum(
        2 * op.heads * (op.head_dim + (op.value_dim or op.head_dim))
        for op in model.program.operations
        if isinstance(op, Attention)
    )
    assert (sum(passed) - pairs) / 2 == pytest.approx(row["activated"], rel=0.03)


def test_latent_memory_is_one_vector_a_slot(tmp_path: Path) -> None:
    with opened(tmp_path, DEEPSEEK_V3["config"]) as source:
        sixteen, eight = (source.in_format("W16A16", "cuda", kv) for kv in ("KV16", "KV8"))
    (group,) = sixteen.program.groups
    assert (group.kind, len(group.layers), group.kv_heads, group.head_dim) == ("latent", 61, 1, 576)
    assert eight.kv_bytes_per_token == (61 * (576 + 4),)  # and a float32 scale each
    short, long = (sixteen.work.at(load_of(sixteen, 1, context)) for context in (100, 1100))
    assert long.bytes - short.bytes == 1000 * 70_272
    assert long.bf16_flops - short.bf16_flops == 1000 * 61 * 2 * 128 * (192 + 128)
    whole, part = (sixteen.work.at(load_of(sixteen, 1, 100, batch)) for batch in (1024, 1))
    experts = 2 * 58 * 256 * 3 * 2048 * 7168  # bytes of all of them; one row passes through eight
    assert whole.read_bytes - part.read_bytes > 0.9 * experts * (1 - 8 / 256)


def test_nothing_else_takes_a_model_that_nothing_runs(ridgeline: Cli, tmp_path: Path) -> None:
    """With weights beside its configuration it is planned by that alone, and refused by name elsewhere."""
    config = DEEPSEEK_V3["config"]
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with opened(tmp_path, config) as source:
        assert source.bare
        assert source.quantised_config
    with pytest.raises(CheckpointError, match=r"'deepseek_v3', whose layers keep a latent vector"):
        LLM(str(tmp_path))
    outcome = ridgeline("plan", tmp_path, "--machine", "H200x8", "--weights", "W8A16-g32")
    assert outcome.code == 0, outcome.err
    assert "70,272 B" in outcome.out
    assert "671.0G parameters" in outcome.out
    refused = ridgeline("show", tmp_path)
    assert refused.code == 1
    assert refused.err.count("\n") == 1
    assert "`ridgeline plan`" in refused.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ({"qk_rope_head_dim": 63}, "rotary dimension is 63"),
        ({"v_head_dim": None}, "v_head_dim is missing"),
        ({"n_routed_experts": 10**6}, "n_routed_experts is 1000000"),
        ({"num_experts_per_tok": 257}, "num_experts_per_tok is 257"),
        ({"n_shared_experts": -1}, "n_shared_experts is -1"),
        ({"first_k_dense_replace": "3"}, "first_k_dense_replace is '3'"),
        ({"moe_layer_freq": 0}, "moe_layer_freq is 0"),
    ],
)
def test_configurations_that_cannot_be(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        opened(tmp_path, DEEPSEEK_V3["config"] | changes)


def test_without_experts_all_layers_are_dense(tmp_path: Path) -> None:
    config = {key: value for key, value in DEEPSEEK_V3["config"].items() if key != "n_routed_experts"}
    with opened(tmp_path, config) as source:
        assert not any(
            isinstance(op, ExpertLinear) for op in source.in_format("auto", "cpu", "KV16").program.operations
        )
