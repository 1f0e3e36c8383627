"""Metadata to specs: every family and file kind, both styles of rope settings, and hostile values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import transformers
from checkpoint_files import SOUND_DATA, SOUND_HEADER, Gguf, safetensors_bytes, write_folder
from conftest import FAMILIES
from tiny_models import LLAMA3_ROPE, TinyModel

from ridgeline.model.build import decoder
from ridgeline.model.checkpoint import Checkpoint, open_checkpoint
from ridgeline.model.families import read_spec
from ridgeline.model.families.family import Source
from ridgeline.model.families.fields import Fields
from ridgeline.model.families.rope import rope_from_config
from ridgeline.model.spec import ModelSpec
from ridgeline.model.weights import Weights
from ridgeline.precision.formats import FORMATS
from ridgeline.precision.quantise import quantise_weight
from ridgeline.precision.storage import Tensor
from ridgeline.types import CheckpointError

Tiny = Callable[[str], TinyModel]
KINDS = ("gguf", "safetensors")


@dataclass
class Changed:
    """A checkpoint that says something else about itself."""

    checkpoint: Checkpoint
    metadata: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.checkpoint, name)


def spec_of(path: Path, **changes: Any) -> ModelSpec:
    """The spec of a checkpoint; `changes` overwrite its metadata (None takes a key away)."""
    with open_checkpoint(path) as checkpoint:
        return read_spec(Changed(checkpoint, {**checkpoint.metadata, **changes}))  # type: ignore[arg-type]


def file_of(model: TinyModel, kind: str) -> Path:
    return model.gguf if kind == "gguf" else model.folder


# ------------------------------------------------------------------------------------------ specs


def rounded(spec: ModelSpec) -> tuple[ModelSpec, np.ndarray]:
    """The spec with its epsilon in float32 and without ropes, and the frequencies of its layers."""
    ropes = [layer.attention.rope for layer in spec.layers]
    layers = tuple(replace(each, attention=replace(each.attention, rope=None)) for each in spec.layers)
    norm = replace(spec.norm, eps=float(np.float32(spec.norm.eps)))
    return replace(spec, layers=layers, norm=norm), np.array([r.frequencies for r in ropes if r])


@pytest.mark.parametrize("family", FAMILIES)
def test_both_file_kinds_say_the_same(tiny: Tiny, family: str) -> None:
    """But for the last place of frequencies, which llama3's GGUF gives by a float32 table of factors."""
    from_gguf, from_config = (rounded(spec_of(file_of(tiny(family), kind))) for kind in KINDS)
    assert from_gguf[0] == from_config[0]
    np.testing.assert_allclose(from_gguf[1], from_config[1], rtol=1e-6)
    assert bool(len(from_gguf[1])) == (family != "gpt2")


def test_gemma3_layers(tiny: Tiny) -> None:
    folder = tiny("gemma3").folder
    spec = spec_of(folder)
    assert [layer.attention.window for layer in spec.layers] == [20] * 5 + [None, 20]
    kinds = ["full_attention", "sliding_attention"] * 3 + ["full_attention"]
    mixed = spec_of(folder, layer_types=kinds)
    assert [layer.attention.window for layer in mixed.layers] == [None, 20] * 3 + [None]
    older = spec_of(folder, layer_types=None, sliding_window_pattern=2)
    assert [layer.attention.window for layer in older.layers] == [20, None] * 3 + [20]
    gguf = {"gemma3.attention.sliding_window_pattern": 3, "gemma3.final_logit_softcapping": 30.0}
    spec = spec_of(tiny("gemma3").gguf, **gguf)
    assert [layer.attention.window is None for layer in spec.layers] == [False, False, True] * 2 + [False]
    assert spec.logit_softcap == 30.0


def test_gemma3_scale_follows_the_file_or_the_model(tiny: Tiny) -> None:
    spec = spec_of(tiny("gemma3").folder, query_pre_attn_scalar=64)
    assert {layer.attention.scale for layer in spec.layers} == {0.125}
    spec = spec_of(tiny("gemma3").gguf, **{"gemma3.block_count": 62})
    assert {layer.attention.scale for layer in spec.layers} == {(96 / 4) ** -0.5}


# ------------------------------------------------------------------------------------------- rope

LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}


def frequencies(config: Mapping[str, Any], dim: int = 32) -> list[float]:
    return list(rope_from_config(Fields(config), dim, theta=10000.0).frequencies)


def llama_frequencies(rope_parameters: dict[str, Any]) -> list[float]:
    """transformers' own, for heads of 32 values."""
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 512}
    config = transformers.LlamaConfig(**sizes, rope_parameters=rope_parameters)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    return rotary.inv_freq.tolist()


@pytest.mark.parametrize(
    "parameters",
    [{"rope_type": "default", "rope_theta": 500000.0}, LINEAR, LLAMA3_ROPE],
    ids=["default", "linear", "llama3"],
)
def test_frequencies_are_those_of_transformers_in_both_styles(parameters: dict[str, Any]) -> None:
    expected = llama_frequencies(parameters)
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    renamed = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
    theta = parameters["rope_theta"]
    for config in (
        {"rope_parameters": parameters},
        {"rope_theta": theta, "rope_scaling": scaling},
        {"rope_theta": theta, "rope_scaling": renamed},
        {"rope_theta": theta, "rope_parameters": scaling},
    ):
        np.testing.assert_allclose(frequencies(config), expected, rtol=2e-6)


def test_gemma3_ropes_in_both_styles(tiny: Tiny) -> None:
    folder = tiny("gemma3").folder
    whole = {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6}
    local = {"rope_type": "default", "rope_theta": 3e4}
    styles: list[dict[str, Any]] = [
        {"rope_parameters": {"full_attention": whole, "sliding_attention": local}},
        {
            "rope_parameters": None,
            "rope_theta": 2e6,
            "rope_local_base_freq": 3e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ]
    expected = [np.arange(0, 32, 2) / 32]
    for style in styles:
        layers = spec_of(folder, **style).layers
        seen = [layers[i].attention.rope.frequencies for i in (0, 5)]  # type: ignore[union-attr]
        np.testing.assert_allclose(seen[0], 3e4 ** -expected[0], rtol=1e-6)
        np.testing.assert_allclose(seen[1], 2e6 ** -expected[0] / 8, rtol=1e-6)
    only = spec_of(folder, rope_parameters={"full_attention": whole}).layers[5].attention.rope
    assert only is not None
    np.testing.assert_allclose(only.frequencies, seen[1])


def test_linear_scaling_of_gguf_files(tiny: Tiny) -> None:
    path = tiny("llama").gguf
    plain = spec_of(path).layers[0].attention.rope
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    scaled = spec_of(path, **keys).layers[0].attention.rope
    assert plain is not None
    assert scaled is not None
    np.testing.assert_allclose(np.array(scaled.frequencies) * 4, plain.frequencies, rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "original_max_position.* is missing"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type is 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "low_freq_factor is 4"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_theta": math.inf}, "rope_theta is inf"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'"),
        ({"rope_theta": 1e-30}, "rope base is 1e-30"),
        ({"rope_parameters": LINEAR | {"factor": 1e-30}}, "factors from 1e-30"),
    ],
)
def test_rope_settings_that_we_do_not_have_are_refused(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        frequencies(config)


# ------------------------------------------------------------------------------ tensors of a file


def weights_of(folder: Path) -> Weights:
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    return Weights(spec, decoder(spec), checkpoint)


def read_all(store: Weights) -> list[Any]:
    return [store.matrix(name) if name in store.formats else store.vector(name) for name in store]


@pytest.fixture
def edited(tiny: Tiny, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny model whose tensors went through `change`."""

    def edit(family: str, change: Callable[[dict[str, np.ndarray]], object], **config: Any) -> Path:
        folder = tiny(family).folder
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        change(tensors)
        settings = json.loads((folder / "config.json").read_text()) | config
        (tmp_path / "config.json").write_text(json.dumps(settings))
        safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return edit


MISSHAPEN = {
    "llama": ("model.layers.1.mlp.up_proj.weight", (160, 95)),
    "gpt2": ("transformer.h.1.attn.c_attn.weight", (80, 320)),  # room for q, k, v and one more
    "gemma3": ("model.layers.2.self_attn.q_norm.weight", ()),
}


@pytest.mark.parametrize("family", MISSHAPEN)
def test_wrong_tensors_are_named(edited: Callable[..., Path], family: str) -> None:
    name, shape = MISSHAPEN[family]
    folder = edited(family, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"tensor '{name}' is missing"):
        weights_of(folder)
    folder = edited(family, lambda tensors: tensors.update({"model.layers.0.extra": np.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"'model.layers.0.extra' is not known"):
        weights_of(folder)
    folder = edited(family, lambda tensors: tensors.update({name: np.zeros(shape, np.float32)}))
    with pytest.raises(CheckpointError, match=f"tensor '{name}' has shape"):
        weights_of(folder)
    folder = edited(family, lambda tensors: tensors[name].reshape(-1).__setitem__(5, np.nan))
    store = weights_of(folder)
    with pytest.raises(CheckpointError, match=f"tensor '{name}' .* not a number"):
        read_all(store)
    store.close()


def test_what_carries_no_information_is_ignored(edited: Callable[..., Path]) -> None:
    folder = edited(
        "gpt2", lambda tensors: tensors.update({"transformer.h.0.attn.bias": np.ones((1, 1, 4, 4), bool)})
    )
    weights_of(folder).close()
    twice = edited("llama", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    weights_of(twice).close()


def test_gpt2_of_the_bare_model(edited: Callable[..., Path]) -> None:
    def strip(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    store = weights_of(edited("gpt2", strip))
    assert store.vector("layers.0.k.bias").shape == (80,)
    store.close()


def test_blocked_vectors_are_decoded_before_they_are_split() -> None:
    """A fused bias that a file stores as Q8_0: its thirds do not start at whole blocks."""
    values = np.linspace(-1, 1, 96, dtype=np.float32)
    stored = quantise_weight(values[None], FORMATS["W8A8-g32"])
    bias = Tensor(stored.storage, (96,), stored.data)
    part = Source("bias", rows=(40, 80), fused_rows=96).apply([bias])
    np.testing.assert_array_equal(part.dequantise(), bias.dequantise()[40:80])


# ------------------------------------------------------------------------------- hostile metadata


def test_unknown_families_are_named(tmp_path: Path, tiny: Tiny) -> None:
    folder = write_folder(tmp_path / "folder", safetensors_bytes(SOUND_HEADER, SOUND_DATA), b"{}")
    with open_checkpoint(folder) as checkpoint, pytest.raises(CheckpointError, match="model_type is 'None'"):
        read_spec(checkpoint)
    with pytest.raises(CheckpointError, match="model_type is 'mamba'; accepted: those of"):
        spec_of(tiny("llama").folder, model_type="mamba")
    with pytest.raises(CheckpointError, match=r"general.architecture is 'qwen9'; the nearest .* is 'qwen"):
        spec_of(tiny("llama").gguf, **{"general.architecture": "qwen9"})
    vocabulary = Gguf(entries=(), data=b"").write(tmp_path)
    with pytest.raises(CheckpointError, match="holds no model"):
        spec_of(vocabulary)


EXTREMES: tuple[Any, ...] = (
    0, -1, 1, 3, 2**20, 2**31, 2**64 - 1, 10**400, 0.0, 1.5, 1e-300, 1e300, math.inf, math.nan,
    "", "64", "\n\x1b[31m", "x" * 10_000, True, None, [], [[1]], {}, {"a": 1},
)  # fmt: skip
ABSENT = (
    "head_dim", "rope_scaling", "layer_types", "attention_bias", "final_logit_softcapping",
    "llama.rope.dimension_count", "llama.attention.value_length", "gemma3.rope.scaling.factor", "gpt2.x",
)  # fmt: skip


def variants(value: Any) -> Iterator[Any]:
    """`value` with an extreme in its place, or in the place of one entry of it."""
    yield from EXTREMES
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from ({**value, key: other} for other in variants(entry))


def refusal(checkpoint: Checkpoint, key: str, value: Any) -> str:
    """The message with which a changed setting is refused; empty where it is taken."""
    changed: Any = Changed(checkpoint, {**checkpoint.metadata, key: value})
    try:
        spec = read_spec(changed)
        Weights(spec, decoder(spec), changed)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_in_any_field_is_taken_or_refused_in_one_line(tiny: Tiny, family: str, kind: str) -> None:
    refused = 0
    with open_checkpoint(file_of(tiny(family), kind)) as checkpoint:
        for key, held in {**dict.fromkeys(ABSENT), **checkpoint.metadata}.items():
            for value in variants(held):
                message = refusal(checkpoint, key, value)
                assert message.isprintable()
                assert len(message) < 400
                refused += bool(message)
    assert refused > 100


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("num_hidden_layers", 2**40, "num_hidden_layers is 1099511627776"),
        ("num_key_value_heads", 4, "6 attention heads share 4 key heads"),
        ("head_dim", 15, "rotary dimension is 15"),
        ("rms_norm_eps", 0.0, "rms_norm_eps is 0.0"),
        ("rms_norm_eps", 10**400, "rms_norm_eps is 1000"),
        ("hidden_size", 0, "hidden_size is 0"),
        ("vocab_size", 287, "embed_tokens.weight' has shape"),
        ("hidden_act", "relu", "hidden_act is 'relu'; accepted: silu"),
    ],
)
def test_messages_name_the_field(tiny: Tiny, key: str, value: Any, reason: str) -> None:
    with open_checkpoint(tiny("llama").folder) as checkpoint:
        assert reason in refusal(checkpoint, key, value)
