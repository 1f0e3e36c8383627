"""Families of Llama's kind: logits as transformers', from both kinds of file, on every executor."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import assert_executors_agree, load, relative_error
from test_families import EXTREMES, KINDS, file_of, refusal, rounded, spec_of
from tiny_gated import CONFIG_ONLY, GATED, LONGROPE, WINDOW, make_gated
from tiny_models import VOCABULARY, TinyModel
from typer.testing import CliRunner

from ridgeline.cli.app import app
from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.model.families import FAMILIES
from ridgeline.native import isa_levels
from ridgeline.types import CheckpointError

TOKENS = np.random.default_rng(7).integers(0, VOCABULARY, 48).tolist()
EXECUTORS = ("reference", *isa_levels())
Gated = Callable[[str], TinyModel]


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Gated:
    directory = tmp_path_factory.mktemp("gated")

    @cache
    def make(name: str) -> TinyModel:
        return make_gated(name, directory)

    return make


# ----------------------------------------------------------------------------------------- logits


def assert_logits_equal(model: TinyModel, path: Path, kind: str, tokens: list[int]) -> None:
    expected = model.logits(tokens)
    assert expected.std(axis=-1).mean() > 0.2  # far from uniform
    seen = load(path, kind, "W32A32", "KV32").run(tokens)
    assert relative_error(seen, expected) < 1e-4


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("file", KINDS)
@pytest.mark.parametrize("family", GATED)
def test_float32_logits_equal_transformers(gated: Gated, family: str, file: str, kind: str) -> None:
    model = gated(family)
    assert_logits_equal(model, file_of(model, file), kind, TOKENS)


@pytest.mark.parametrize("name", CONFIG_ONLY)
def test_what_only_configs_say(gated: Gated, name: str) -> None:
    assert_logits_equal(gated(name), gated(name).folder, isa_levels()[-1], TOKENS)


@pytest.mark.parametrize("family", GATED)
def test_quantised_logits_equal_the_reference(gated: Gated, family: str) -> None:
    assert_executors_agree(gated(family).folder, "W8A8-g32", TOKENS[:24])


# ------------------------------------------------------------------------------------------ specs


@pytest.mark.parametrize("family", GATED)
def test_both_file_kinds_say_the_same(gated: Gated, family: str) -> None:
    """But for the name that Mistral's GGUF files give themselves and the last place of numbers."""
    from_gguf, from_config = (spec_of(file_of(gated(family), kind)) for kind in KINDS)
    assert from_gguf.family == {"mistral": "llama", "phi4-mini": "phi3"}.get(family, family)
    for ours, theirs in zip(from_gguf.layers, from_config.layers, strict=True):
        for field in ("window", "softcap", "heads", "kv_heads", "head_dim", "qk_norm", "qkv_bias"):
            assert getattr(ours.attention, field) == getattr(theirs.attention, field)
        assert (ours.feed_forward, ours.post_norms) == (theirs.feed_forward, theirs.post_norms)
    np.testing.assert_allclose(rounded(from_gguf)[1], rounded(from_config)[1], rtol=1e-6)


def windows(path: Path, **changes: Any) -> list[int | None]:
    return [layer.attention.window for layer in spec_of(path, **changes).layers]


def test_windows(gated: Gated) -> None:
    mistral = gated("mistral")
    assert windows(mistral.folder) == windows(mistral.gguf) == [WINDOW] * 3
    assert windows(mistral.folder, sliding_window=None) == [None] * 3
    assert windows(mistral.folder, sliding_window=512) == [None] * 3  # covers the context
    qwen = gated("qwen2-window").folder
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(qwen, layer_types=None) == [None, WINDOW, WINDOW]
    assert windows(qwen, layer_types=kinds) == [WINDOW, None, WINDOW]
    assert windows(qwen, use_sliding_window=False) == [None] * 3
    gemma = gated("gemma2")
    assert windows(gemma.folder, layer_types=None) == windows(gemma.gguf) == [WINDOW, None, WINDOW]
    assert windows(gemma.folder, layer_types=kinds[::-1]) == [WINDOW, None, WINDOW]
    smollm = gated("smollm3-window").folder
    assert windows(smollm, layer_types=None) == [None, WINDOW, None, None, WINDOW]
    phi = gated("phi3")
    assert windows(phi.folder, sliding_window=262144) == [None] * 3
    assert windows(phi.gguf, **{"phi3.attention.sliding_window": 0}) == [None] * 3


def test_layers_without_positions(gated: Gated) -> None:
    def turning(path: Path, **changes: Any) -> list[bool]:
        return [layer.attention.rope is not None for layer in spec_of(path, **changes).layers]

    model = gated("smollm3")
    assert turning(model.folder) == turning(model.gguf) == [True, True, True, False, True]
    every = {"no_rope_layers": None, "no_rope_layer_interval": 2}
    assert turning(model.folder, **every) == [True, False, True, False, True]


def test_phi4_mini_in_the_older_style(gated: Gated) -> None:
    folder = gated("phi4-mini").folder
    spec = spec_of(folder)
    rope = spec.layers[0].attention.rope
    assert spec.tied_head
    assert rope is not None
    assert rope.dim == 24  # of 32
    factors = {key: LONGROPE[key] for key in ("short_factor", "long_factor")}
    older = {
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope"} | factors,
    }
    assert spec_of(folder, rope_parameters=None, **older) == spec


def test_gemma2_without_caps_and_of_27b(gated: Gated) -> None:
    spec = spec_of(gated("gemma2").folder, attn_logit_softcapping=None, final_logit_softcapping=None)
    assert spec.logit_softcap is spec.layers[0].attention.softcap is None
    spec = spec_of(gated("gemma2").gguf, **{"gemma2.block_count": 46})
    assert spec.layers[0].attention.scale == (96 / 4) ** -0.5


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("family", "kind", "key", "value", "reason"),
    [
        ("qwen3", "gguf", "qwen3.expert_count", 8, "qwen3.expert_count is 8; accepted: 0"),
        ("mistral", "safetensors", "layer_types", ["full_attention"], "layer_types is"),
        ("mistral", "safetensors", "sliding_window", -1, "sliding_window is -1"),
        ("qwen2", "safetensors", "layer_types", ["sliding_attention"], ""),
        ("qwen2-window", "safetensors", "layer_types", ["chunked"] * 3, "full_attention or sliding"),
        ("qwen2", "gguf", "qwen2.attention.sliding_window", 16, "sliding_window is 16; accepted: 0"),
        ("qwen2", "gguf", "qwen2.rope.scaling.yarn_attn_factor", 2.0, "yarn_attn_factor is 2"),
        ("qwen3", "safetensors", "head_dim", 31, "rotary dimension is 31"),
        ("gemma2", "safetensors", "hidden_activation", "relu", "accepted: gelu_pytorch_tanh"),
        ("gemma2", "gguf", "gemma2.attention.sliding_window_pattern", 3, "accepted: 2"),
        ("phi3", "safetensors", "partial_rotary_factor", 0.5, ""),
        ("phi3", "gguf", "phi3.rope.dimension_count", 16, "'rope_factors_long.weight' has shape (12,)"),
        ("phi3", "gguf", "phi3.feed_forward_length", 80, "ffn_up.weight' has shape"),
        ("granite", "safetensors", "residual_multiplier", 1e-20, "residual_multiplier is 1e-20; accepted"),
        ("granite", "gguf", "granite.rope.scaling.finetuned", False, "finetuned is False; accepted: True"),
        ("smollm3", "safetensors", "no_rope_layers", [1, 1], "accepted: 1 or 0 for each of 5 layers"),
        ("olmo2", "gguf", "olmo2.attention.sliding_window", 16, "sliding_window is 16"),
    ],
)  # fmt: skip
def test_bad_metadata_is_refused_in_one_line(
    gated: Gated, family: str, kind: str, key: str, value: Any, reason: str
) -> None:
    with open_checkpoint(file_of(gated(family), kind)) as checkpoint:
        message = refusal(checkpoint, key, value)
    assert message.isprintable()
    assert reason in message
    assert bool(reason) == bool(message)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", GATED)
def test_any_value_in_any_field_is_taken_or_refused(gated: Gated, family: str, kind: str) -> None:
    refused = 0
    with open_checkpoint(file_of(gated(family), kind)) as checkpoint:
        for key, held in checkpoint.metadata.items():
            nested = list(held) if isinstance(held, dict) else [None]
            for value in EXTREMES:
                for inner in nested:
                    message = refusal(checkpoint, key, value if inner is None else {**held, inner: value})
                    assert message.isprintable()
                    assert len(message) < 400
                    refused += bool(message)
    assert refused > 100


def test_unknown_families_name_the_nearest(gated: Gated) -> None:
    with pytest.raises(
        CheckpointError, match="model_type is 'ministral'; the nearest that is known is 'mistral'"
    ):
        spec_of(gated("mistral").folder, model_type="ministral")
    with pytest.raises(CheckpointError, match="the nearest that is known is 'qwen3'; accepted: those of"):
        spec_of(gated("qwen3").gguf, **{"general.architecture": "qwen35"})


def test_families_are_listed() -> None:
    shown = CliRunner().invoke(app, ["list", "--families"])
    assert shown.exit_code == 0
    assert all(family.name in shown.output for family in FAMILIES)
    rows = json.loads(CliRunner().invoke(app, ["list", "--families", "--json"]).output)
    assert {"name": "phi3", "architectures": ["phi3"], "model_types": ["phi3"]} in rows
