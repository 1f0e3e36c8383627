"""Families with layer norms and parallel blocks: GPT-NeoX, Falcon, StableLM, StarCoder2, Command-R,
Cohere2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_parallel
from running import assert_executors_agree, load, load_program, relative_error
from test_families import refusal, rounded, spec_of, variants
from tiny_models import VOCABULARY, TinyModel

from ridgeline.execution.cpu.lower import lower as lower_for_cpu
from ridgeline.execution.cuda.lower import lower as lower_for_cuda
from ridgeline.execution.lowering import Launch
from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.model.families.family import Source
from ridgeline.model.program import Program
from ridgeline.model.spec import RopeSpec
from ridgeline.native import isa_levels
from ridgeline.precision.formats import DEVICE_FORMATS, FORMATS
from ridgeline.precision.quantise import quantise_weight
from ridgeline.precision.storage import Tensor

Tiny = Callable[[str], TinyModel]
TOKENS = np.random.default_rng(7).integers(0, VOCABULARY, 40).tolist()
EXECUTORS = ("reference", *isa_levels())
MODELS = tuple(tiny_parallel.MODELS)
FAMILIES = (
    "gptneox",
    "falcon",
    "stablelm",
    "stablelm-heads",
    "starcoder2",
    "command-r",
    "command-r-plus",
    "cohere2",
)
LOWERINGS: dict[str, Callable[[Program], Sequence[Launch]]] = {"cpu": lower_for_cpu, "cuda": lower_for_cuda}
FILES = [
    (name, kind) for name in MODELS for kind in ("safetensors", "gguf")
    if kind == "safetensors" or name not in tiny_parallel.WITHOUT_GGUF
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    directory = tmp_path_factory.mktemp("parallel")
    return cache(lambda name: tiny_parallel.make(name, directory))


def file_of(model: TinyModel, kind: str) -> Path:
    return model.gguf if kind == "gguf" else model.folder


# ----------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize(("name", "kind"), FILES)
def test_float32_logits_equal_transformers(tiny: Tiny, name: str, kind: str) -> None:
    model = tiny(name)
    expected = model.logits(TOKENS)
    assert expected.std(axis=1).min() > 0.1  # far from uniform
    for executor in EXECUTORS:
        loaded = load(file_of(model, kind), executor, "W32A32", "KV32")
        assert relative_error(loaded.run(TOKENS), expected) < 1e-4, executor
        loaded.executor.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_quantised_logits_equal_the_reference(tiny: Tiny, name: str) -> None:
    assert_executors_agree(tiny(name).folder, "W8A8-g32", TOKENS)


@pytest.mark.parametrize("isa", isa_levels())
def test_bits_do_not_depend_on_company(tiny: Tiny, isa: str) -> None:
    """A parallel block with two norms: prompts alone on one thread, and in one step, cut in two, on two."""
    folder = tiny("gptneox").folder
    alone, other = (load(folder, isa, "W4A8-g32", threads=threads) for threads in (1, 2))
    prompts = [TOKENS[:17], TOKENS[5:38], TOKENS[30:31]]
    pages = [[9, 2], [4, 30, 1], [0]]
    expected = [alone.run(prompt) for prompt in prompts]
    other.logits(*[other.rows(p[:11], 0, where) for p, where in zip(prompts, pages, strict=True)])
    rest = [(prompt, where) for prompt, where in zip(prompts, pages, strict=True) if len(prompt) > 11]
    seen = other.logits(*[other.rows(prompt[11:], 11, where) for prompt, where in rest])
    np.testing.assert_array_equal(seen, np.concatenate([expected[0][11:], expected[1][11:]]))
    alone.executor.close()
    other.executor.close()


@pytest.mark.parametrize("name", MODELS)
def test_every_operation_is_covered_once(tiny: Tiny, name: str) -> None:
    for device, lower in LOWERINGS.items():
        for weights in DEVICE_FORMATS[device]:
            program, store = load_program(tiny(name).folder, weights)
            store.close()
            covered = sorted(op.out.name for launch in lower(program) for op in launch.covers)
            assert covered == sorted(op.out.name for op in program.operations)


@pytest.mark.parametrize(("name", "launches"), [("gptneox", 9), ("command-r", 7)])
def test_launches_of_a_parallel_layer(tiny: Tiny, name: str, launches: int) -> None:
    """Behind one norm, the projections of both halves are one launch; heads of 16 are rounded alone."""
    program, store = load_program(tiny(name).folder, "W8A8-g32")
    store.close()
    assert len(lower_for_cpu(program)) == 2 * launches + 4  # and embedding, final norm, head, sample


# ------------------------------------------------------------------------------------------ specs


@pytest.mark.parametrize("name", [name for name, kind in FILES if kind == "gguf"])
def test_both_file_kinds_say_the_same(tiny: Tiny, name: str) -> None:
    from_gguf, from_config = (rounded(spec_of(file_of(tiny(name), kind))) for kind in ("gguf", "safetensors"))
    assert from_gguf[0].logit_scale == np.float32(from_config[0].logit_scale)
    assert replace(from_gguf[0], logit_scale=from_config[0].logit_scale) == from_config[0]
    np.testing.assert_allclose(from_gguf[1], from_config[1], rtol=1e-6)


BLOCKS = {
    "gptneox": (True, False),
    "gptneox-sequential": (False, False),
    "falcon": (True, True),
    "falcon-new": (True, False),
    "falcon-new-one-norm": (True, True),
    "falcon-sequential": (False, False),
    "stablelm": (False, False),
    "stablelm-parallel": (True, True),
    "starcoder2": (False, False),
    "command-r": (True, True),
    "cohere2": (True, True),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(tiny: Tiny, name: str) -> None:
    layer = spec_of(tiny(name).folder).layers[0]
    assert (layer.parallel, layer.one_norm) == BLOCKS[name]


def rotary_dim(path: Path, **changes: Any) -> int:
    rope: RopeSpec | None = spec_of(path, **changes).layers[0].attention.rope
    assert rope is not None
    return rope.dim


@pytest.mark.parametrize(
    ("name", "older"), [("gptneox", "rotary_pct"), ("stablelm", "partial_rotary_factor")]
)
def test_partial_rotary_in_both_styles(tiny: Tiny, name: str, older: str) -> None:
    folder = tiny(name).folder
    assert rotary_dim(folder) == 4
    assert rotary_dim(folder, rope_parameters=None) == 4
    assert rotary_dim(folder, rope_parameters=None, **{older: 0.5}) == 8
    assert rotary_dim(folder, rope_parameters={"partial_rotary_factor": 1.0}) == 16


def test_older_rotary_base_of_gptneox(tiny: Tiny) -> None:
    rope = spec_of(tiny("gptneox").folder, rope_parameters=None, rotary_emb_base=100).layers[0].attention.rope
    assert rope is not None
    np.testing.assert_allclose(rope.frequencies, [1.0, 0.1])


def test_layers_of_cohere2(tiny: Tiny) -> None:
    """Without a window there are no positions, but a window that covers the context is none."""

    def layers(kind: str, **changes: Any) -> list[tuple[int | None, bool]]:
        of = [layer.attention for layer in spec_of(file_of(tiny("cohere2"), kind), **changes).layers]
        return [(each.window, each.rope is not None) for each in of]

    near, far = (tiny_parallel.WINDOW, True), (None, False)
    assert layers("gguf") == layers("safetensors") == [near, near, near, far, near]
    assert layers("safetensors", layer_types=None) == [near, near, near, far, near]
    assert layers("safetensors", layer_types=None, sliding_window_pattern=2) == [near, far, near, far, near]
    kinds = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    assert layers("safetensors", layer_types=kinds) == [far, near, far, near, far]
    assert layers("gguf", **{"cohere2.attention.sliding_window": 512})[2:4] == [(None, True), far]


def test_norms_of_heads(tiny: Tiny) -> None:
    for name in ("stablelm-heads", "command-r-plus"):
        attention = spec_of(tiny(name).folder).layers[1].attention
        assert (attention.qk_norm, attention.qk_norm_kind, attention.qk_norm_by_head) == (True, "layer", True)


def test_context_of_command_r(tiny: Tiny) -> None:
    assert spec_of(tiny("command-r").folder).context == 512
    assert spec_of(tiny("command-r").folder, model_max_length=131072).context == 131072


def test_rows_of_every_group_of_a_blocked_tensor() -> None:
    """Picked undecoded, and of a vector once it is decoded."""
    values = np.random.default_rng(3).normal(size=(12, 64)).astype(np.float32)
    held = quantise_weight(values, FORMATS["W4A8-g32"])
    picked = Source("fused", rows=(1, 3), fused_rows=12, row_groups=3).apply([held])
    assert picked.storage is held.storage
    np.testing.assert_array_equal(picked.dequantise(), held.dequantise()[[1, 2, 5, 6, 9, 10]])
    bias = Tensor(held.storage, (64,), held.data[:1])
    picked = Source("fused", rows=(8, 16), fused_rows=64, row_groups=4, factor=0.5).apply([bias])
    np.testing.assert_array_equal(picked.dequantise(), bias.dequantise().reshape(4, 16)[:, 8:].ravel() / 2)


# ------------------------------------------------------------------------------- what is refused

REFUSED = [
    ("falcon", "alibi", True, "alibi is True; accepted: False"),
    ("falcon", "activation", "relu", "activation is 'relu'"),
    ("falcon", "num_ln_in_parallel_attn", 2, "num_ln_in_parallel_attn is 2; accepted: 1"),
    ("falcon-new", "num_ln_in_parallel_attn", 3, "num_ln_in_parallel_attn is 3"),
    ("falcon-new", "parallel_attn", False, "parallel_attn is False; accepted: True"),
    ("stablelm", "qk_layernorm", True, "k_layernorm.norms.0.weight' is missing (and 15 more)"),
    ("stablelm", "rope_parameters", {"partial_rotary_factor": 2.0}, "partial_rotary_factor is 2; accepted"),
    ("stablelm", "rope_parameters", {"partial_rotary_factor": 0.1}, "partial_rotary_factor is 0.1; accepted"),
    ("gptneox", "rope_parameters", {"partial_rotary_factor": 0.2}, "rotary dimension is 3"),
    ("gptneox", "hidden_act", "relu", "hidden_act is 'relu'"),
    ("gptneox", "num_attention_heads", 5, "query_key_value.weight' has shape"),
    ("starcoder2", "sliding_window", -1, "sliding_window is -1"),
    ("starcoder2", "use_bias", "yes", "use_bias is 'yes'"),
    (
        "command-r",
        "use_qk_norm",
        True,
        "k_norm.weight' is missing (and 3 more)",
    ),
    ("command-r-plus", "use_qk_norm", False, "'model.layers.0.self_attn.k_norm.weight' is not known"),
    ("command-r-plus", "num_key_value_heads", 3, "k_proj.weight' has shape (32, 96)"),
    ("cohere2", "use_qk_norm", True, "use_qk_norm is True; accepted: False"),
    ("cohere2", "sliding_window", 0, "sliding_window is 0"),
    (
        "cohere2",
        "layer_types",
        ["full_attention"],
        "sliding_attention for each of 5 layers",
    ),
    ("command-r", "logit_scale", 0, "logit_scale is 0"),
]
REFUSED_GGUF = [
    ("falcon", "falcon.tensor_data_layout", "other", "tensor_data_layout is 'other'; accepted: 'jploski'"),
    ("gptneox", "gptneox.rope.dimension_count", 18, "rope.dimension_count is 18"),
    ("gptneox", "gptneox.attention.head_count_kv", 2, "attn_qkv.weight' has shape"),
    ("stablelm", "stablelm.rope.dimension_count", 5, "rotary dimension is 5"),
    ("cohere2", "cohere2.attention.sliding_window_pattern", "all", "sliding_window_pattern is 'all'"),
    ("command-r", "command-r.logit_scale", None, "logit_scale is missing"),
    ("command-r", "command-r.rope.scaling.type", "magic", "rope.scaling.type is 'magic'"),
]


@pytest.mark.parametrize(("name", "key", "value", "reason"), REFUSED + REFUSED_GGUF)
def test_settings_that_we_do_not_have_are_refused(
    tiny: Tiny, name: str, key: str, value: Any, reason: str
) -> None:
    with open_checkpoint(file_of(tiny(name), "gguf" if "." in key else "config")) as checkpoint:
        message = refusal(checkpoint, key, value)
    assert reason in message
    assert message.isprintable()


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
@pytest.mark.parametrize("name", FAMILIES)
def test_any_value_in_any_field_is_taken_or_refused_in_one_line(tiny: Tiny, name: str, kind: str) -> None:
    refused = 0
    with open_checkpoint(file_of(tiny(name), kind)) as checkpoint:
        for key, held in checkpoint.metadata.items():
            for value in variants(held):
                message = refusal(checkpoint, key, value)
                assert message.isprintable()
                assert len(message) < 500
                refused += bool(message)
    assert refused > 100
