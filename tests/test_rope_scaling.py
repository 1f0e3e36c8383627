"""YaRN and LongRoPE: frequencies and the length of queries and keys, against transformers' own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import Changed
from tiny_gated import LONGROPE, YARN, make_gated
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.model.families.fields import Fields
from ridgeline.model.families.partial_rope import partial_rope_from_config
from ridgeline.model.families.rope import rope, rope_from_config, rope_from_gguf
from ridgeline.model.spec import RopeSpec
from ridgeline.types import CheckpointError

CONTEXT = 512


def theirs(parameters: Mapping[str, Any], dim: int, seq_len: int | None = None) -> tuple[np.ndarray, float]:
    """transformers' frequencies and scale, for heads of `dim` values."""
    config = transformers.LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        rope_parameters=dict(parameters),
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len)
    return frequencies.numpy(), scale


def ours(parameters: Mapping[str, Any], dim: int, context: int = CONTEXT) -> RopeSpec:
    config = Fields({"rope_parameters": dict(parameters), "max_position_embeddings": context})
    return rope_from_config(config, dim, theta=10000.0)


def assert_equal(seen: RopeSpec, expected: tuple[np.ndarray, float]) -> None:
    np.testing.assert_allclose(seen.frequencies, expected[0], rtol=3e-6)
    assert seen.scale == pytest.approx(expected[1], rel=1e-6)


# ------------------------------------------------------------------------------------------- YaRN


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"factor": None},  # the ratio of the contexts
        {"attention_factor": 1.25},
        {"mscale": 1.0, "mscale_all_dim": 0.707},
        {"mscale": 1.0},  # of no effect alone
        {"beta_fast": 16, "beta_slow": 2.0},
        {"truncate": False, "rope_theta": 150000.0},
        {"factor": 0.5},
    ],
    ids=str,
)
def test_yarn_is_that_of_transformers(changes: dict[str, Any]) -> None:
    parameters = YARN | changes
    assert_equal(ours(parameters, 64), theirs(parameters, 64))


@settings(max_examples=60, deadline=None)
@given(
    dim=st.integers(4, 64).map(lambda half: 2 * half),
    theta=st.floats(100, 1e7),
    factor=st.floats(1, 128),
    original=st.integers(16, 1 << 18),
    truncate=st.booleans(),
)
def test_yarn_of_any_model(dim: int, theta: float, factor: float, original: int, truncate: bool) -> None:
    parameters = YARN | {
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        "truncate": truncate,
    }
    seen, expected = ours(parameters, dim), theirs(parameters, dim)
    # Their ramp is in float32: where it leaves 1 by a last place, a frequency that is 1/factor changes.
    np.testing.assert_allclose(seen.frequencies, expected[0], rtol=1e-6 * factor + 3e-6)
    assert seen.scale == pytest.approx(expected[1])


def test_yarn_stretches_slow_pairs_only() -> None:
    plain, scaled = (np.array(r.frequencies) for r in (rope(10000.0, 64), ours(YARN, 64)))
    ratio = plain / scaled
    assert ratio[0] == pytest.approx(1)
    assert ratio[-1] == pytest.approx(4)
    assert np.all(np.diff(ratio) >= -1e-6)
    assert 1.5 < ratio[len(ratio) // 4] < 3.9


# --------------------------------------------------------------------------------------- LongRoPE


@pytest.mark.parametrize(
    "changes", [{}, {"attention_factor": 1.5}, {"factor": 7.0}, {"factor": 0.5}], ids=str
)
@pytest.mark.parametrize("context", [32, CONTEXT])
def test_longrope_is_that_of_transformers(changes: dict[str, Any], context: int) -> None:
    """Long factors for a model whose context is beyond the original, whatever the prompt's length."""
    parameters = {key: value for key, value in LONGROPE.items() if key != "partial_rotary_factor"} | changes
    expected = theirs(parameters, 24, seq_len=context)
    if context == 32 and not changes:
        expected = (expected[0], 1.0)  # they take the ratio to a context that this model does not have
    assert_equal(ours(parameters, 24, context), expected)


def test_partial_longrope_with_the_original_outside_of_its_section() -> None:
    parameters = {key: value for key, value in LONGROPE.items() if key != "original_max_position_embeddings"}
    values = {"rope_scaling": parameters | {"type": "su"}, "original_max_position_embeddings": 32}
    del values["rope_scaling"]["rope_type"]  # type: ignore[attr-defined]
    config = Fields(values | {"max_position_embeddings": CONTEXT})
    assert_equal(partial_rope_from_config(config, 32, 10000.0, 1.0), theirs(LONGROPE, 32, CONTEXT))


# ------------------------------------------------------------------------------------------- GGUF


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("ropes")
    return {name: make_gated(name, directory).gguf for name in ("qwen2", "phi3")}


def of_gguf(path: Path, dim: int, **changes: Any) -> RopeSpec:
    with open_checkpoint(path) as checkpoint:
        prefix = f"{path.stem}."
        values = {**checkpoint.metadata, **{f"{prefix}{key}": value for key, value in changes.items()}}
        changed: Any = Changed(checkpoint, values)
        return rope_from_gguf(changed, Fields(values, prefix), dim, 10000.0)


def test_yarn_of_gguf_files(files: dict[str, Path]) -> None:
    expected = theirs(YARN, 16)
    assert_equal(of_gguf(files["qwen2"], 16), expected)
    usual = 0.1 * math.log(4) + 1
    for stated in (1.0, usual):  # files repeat the usual scale, or hold the 1 that stands for it
        seen = of_gguf(files["qwen2"], 16, **{"rope.scaling.yarn_attn_factor": stated})
        assert_equal(seen, expected)
    seen = of_gguf(files["qwen2"], 16, **{"rope.scaling.attn_factor": 0.5})
    assert seen.scale == pytest.approx(0.5 * usual)
    betas = {"rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0}
    seen = of_gguf(files["qwen2"], 16, **betas)
    assert_equal(seen, theirs(YARN | {"beta_fast": 8.0, "beta_slow": 2.0}, 16))
    assert seen.frequencies != of_gguf(files["qwen2"], 16).frequencies


def test_gguf_files_without_scaling_ignore_a_factor(files: dict[str, Path]) -> None:
    def seen(rule: str) -> RopeSpec:
        return of_gguf(files["qwen2"], 16, **{"rope.scaling.type": rule, "rope.scaling.factor": 4.0})

    assert seen("none") == rope(10000.0, 16)
    assert seen("linear") == rope(10000.0, 16, 4.0)


@pytest.mark.parametrize("context", [32, CONTEXT])
def test_longrope_of_gguf_files(files: dict[str, Path], context: int) -> None:
    for kind in ("longrope", None):  # older files have the tables only
        seen = of_gguf(files["phi3"], 24, context_length=context, **{"rope.scaling.type": kind})
        assert_equal(seen, theirs(LONGROPE | {"partial_rotary_factor": 0.75}, 32, context))


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_type": "dynamic"}, "rope_type is 'dynamic'; accepted: default, linear, llama3, yarn"),
        ({"rope_type": "proportional"}, "rope_type is 'proportional'"),
        ({"rope_type": ["yarn"]}, "rope_type is"),
        ({"original_max_position_embeddings": None}, "original_max_position_embeddings is missing"),
        ({"factor": "4"}, "factor is '4'"),
        ({"beta_fast": -1.0}, "beta_fast is -1.0"),
        ({"truncate": 1}, "truncate is 1; accepted: true or false"),
        ({"attention_factor": 1e6}, "rope scales queries and keys by 1e\\+06; accepted: 0.001 to 1000"),
        ({"mscale": 1e9, "mscale_all_dim": 1.0}, "rope scales queries and keys by"),
        ({"rope_theta": 1.0}, "rope base is 1; accepted with yarn: a number above 1"),
        ({**LONGROPE, "partial_rotary_factor": None}, "short_factor is .* accepted: 8 numbers"),
        ({**LONGROPE, "partial_rotary_factor": 0.75}, "partial_rotary_factor is 0.75"),
        ({"rope_type": "longrope", "short_factor": [0.0] * 8}, "short_factor is 0.0"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 8}, "long_factor is missing"),
        ({"rope_type": "longrope", "original_max_position_embeddings": 1}, "is 1; accepted: from 2"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        ours(YARN | changes, 16)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("type", "dynamic"),
        ("yarn_ext_factor", 0.5),
        ("yarn_log_multiplier", 0.1),
        ("yarn_attn_factor", 1.5),
        ("factor", 0.0),
    ],
)
def test_settings_of_gguf_files_are_refused(files: dict[str, Path], key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"qwen2.rope.scaling.{key} is"):
        of_gguf(files["qwen2"], 16, **{f"rope.scaling.{key}": value})


def test_longrope_tables_of_gguf_files_are_checked(files: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"phi3\.rope\.scaling\.factor is 4.0"):
        of_gguf(files["phi3"], 24, **{"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0})
    with pytest.raises(CheckpointError, match="original_context_length is missing"):
        of_gguf(files["phi3"], 24, **{"rope.scaling.original_context_length": None})
