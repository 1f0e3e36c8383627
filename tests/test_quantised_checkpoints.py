"""Quantised safetensors folders: every layout against values that were packed without our code."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import quantised_files as files
import torch
from checkpoint_files import open_descriptors
from running import load, load_program, relative_error

from ridgeline.apps.describe import describe
from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.native import isa_levels
from ridgeline.precision.storage import STORAGES, check_finite
from ridgeline.types import CheckpointError

if TYPE_CHECKING:
    from tiny_models import TinyModel

BLOCKS = {"weight_block_size": [32, 64], "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
PER_TENSOR = {"quant_method": "fp8", "activation_scheme": "static"}
GROUPS = {"num_bits": 4, "strategy": "group", "group_size": 32}
CHANNELS = {"num_bits": 8, "strategy": "channel"}


def float_settings(layout: str = "float-quantized", **weights: Any) -> dict[str, Any]:
    return files.compressed_settings(layout, {"num_bits": 8, "type": "float", **weights})


SCHEMES: dict[str, files.Scheme] = {
    "gptq 4": files.gptq(),
    "gptq 4 v2": files.gptq(version="gptq_v2"),
    "gptq 4 named": files.gptq(version="gptq", group=-1),
    "gptq 4 of 128": files.gptq(group=128),
    "gptq 4 bfloat16": files.gptq(dtype=torch.bfloat16),
    "gptq 4 asymmetric": files.gptq(symmetric=False, storage="Q4_1", exact=False),
    "gptq 4 asymmetric v2": files.gptq(symmetric=False, version="gptq_v2", storage="Q4_1", exact=False),
    "gptq 4 act-order": files.gptq(act_order=True, storage="F32"),
    "gptq 4 asymmetric act-order": files.gptq(symmetric=False, act_order=True, storage="F32"),
    "gptq 4 of 16": files.gptq(group=16, storage="F32"),
    "gptq 2": files.gptq(bits=2, symmetric=False),
    "gptq 3": files.gptq(bits=3),
    "gptq 3 asymmetric": files.gptq(bits=3, symmetric=False),
    "gptq 8": files.gptq(bits=8, storage="Q8_0"),
    "gptq 8 asymmetric": files.gptq(bits=8, symmetric=False, storage="F32"),
    "awq": files.awq(storage="Q4_1", exact=False),
    "awq of 128": files.awq(group=128, storage="Q4_1", exact=False),
    "awq symmetric": files.awq(symmetric=True),
    "ct 4": files.compressed("pack-quantized", GROUPS),
    "ct 4 float32": files.compressed("pack-quantized", GROUPS, torch.float32, exact=False),
    "ct 4 asymmetric": files.compressed(
        "pack-quantized", {**GROUPS, "symmetric": False}, storage="Q4_1", exact=False
    ),
    "ct 4 channel": files.compressed("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "ct 8": files.compressed("pack-quantized", {**GROUPS, "num_bits": 8}, storage="Q8_0"),
    "ct int8": files.compressed("int-quantized", CHANNELS, storage="Q8_0"),
    "ct int8 naive": files.compressed("naive-quantized", {**GROUPS, "num_bits": 8}, storage="Q8_0"),
    "ct int8 tensor": files.compressed(
        "int-quantized", {"num_bits": 8, "strategy": "tensor"}, storage="Q8_0"
    ),
    "ct int8 asymmetric": files.compressed("int-quantized", {**CHANNELS, "symmetric": False}, storage="F32"),
    "ct float8": files.float8(
        float_settings(strategy="channel"), (1, 0), "weight_scale", dtype=torch.bfloat16
    ),
    "ct float8 tensor": files.float8(
        float_settings(strategy="tensor"), None, "weight_scale", lambda rows: (1,), dtype=torch.bfloat16
    ),
    "ct float8 block": files.float8(
        float_settings("naive-quantized", strategy="block", block_structure=[32, 64]),
        (32, 64),
        "weight_scale",
    ),
    "fp8 block": files.float8(BLOCKS, (32, 64), "weight_scale_inv"),
    "fp8 tensor": files.float8(PER_TENSOR, None, "weight_scale", lambda rows: ()),
    "fp8 rows": files.float8({"quant_method": "fbgemm_fp8"}, (1, 0), "weight_scale", lambda rows: (rows, 1)),
    "nf4": files.nf4(double=False),
    "nf4 double": files.nf4(double=True),
    "int8": files.int8(storage="Q8_0", exact=False),
}
SHAPES = ((32, 96), (64, 160), (96, 32), (288, 96))


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Any:
    before = open_descriptors()
    yield
    assert open_descriptors() <= before


def matrix(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32)


def written(
    folder: Path, scheme: files.Scheme, shape: tuple[int, ...] = (64, 160)
) -> tuple[Path, np.ndarray]:
    parts, values = files.parts_of(scheme, matrix(shape))
    return files.write(folder / "model", parts, scheme.settings), values


# ------------------------------------------------------------------------------------ whole tensors


@pytest.mark.parametrize("name", SCHEMES)
def test_values_are_those_that_were_packed(tmp_path: Path, name: str) -> None:
    scheme = SCHEMES[name]
    for shape in SHAPES:
        if "act-order" in name and shape[1] == 32:  # a single group is in order
            continue
        path, values = written(tmp_path, scheme, shape)
        with open_checkpoint(path) as checkpoint:
            assert list(checkpoint.tensors) == ["layer.weight"]
            info, tensor = checkpoint.tensors["layer.weight"], checkpoint.tensor("layer.weight")
            assert (info.shape, info.storage, info.nbytes) == (shape, scheme.storage, tensor.nbytes)
            assert (tensor.shape, tensor.storage.name) == (shape, scheme.storage)
            check_finite(tensor, "layer.weight")
            seen = tensor.dequantise()
            if scheme.exact:
                np.testing.assert_array_equal(seen, values.astype(np.float32))
            else:
                assert relative_error(seen, values) < 2**-11
            checkpoint.release("layer.weight")
            np.testing.assert_array_equal(checkpoint.tensor("layer.weight").dequantise(), seen)
        with pytest.raises(CheckpointError, match="is closed"):
            checkpoint.tensor("layer.weight")


@pytest.mark.parametrize("name", ["ct 4 channel", "ct int8", "fp8 block", "nf4", "nf4 double", "int8"])
def test_rows_of_any_length(tmp_path: Path, name: str) -> None:
    """Where the layout allows them; blocks of 32 do not fit, so values are decoded."""
    for shape in ((7, 33), (5, 50), (9, 65)):
        path, values = written(tmp_path, SCHEMES[name], shape)
        with open_checkpoint(path) as checkpoint:
            tensor = checkpoint.tensor("layer.weight")
            assert tensor.storage.name == "F32"
            np.testing.assert_allclose(tensor.dequantise(), values, rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["gptq 4 asymmetric", "gptq 3", "awq", "ct 4 asymmetric", "fp8 block", "nf4"]
)
def test_rows_are_decoded_in_blocks(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = written(tmp_path, SCHEMES[name])
    with open_checkpoint(path) as checkpoint:
        whole = checkpoint.tensor("layer.weight").data
        monkeypatch.setattr("ridgeline.precision.storage.BLOCK_VALUES_AT_A_TIME", 160 * 3)
        np.testing.assert_array_equal(checkpoint.tensor("layer.weight").data, whole)


def test_experts_of_mxfp4(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stem = "model.layers.0.mlp.experts.gate_up_proj"
    parts, values = files.mxfp4_experts(np.random.default_rng(0), (3, 10, 96))
    tensors = {f"{stem}_{part}": value for part, value in parts.items()} | {f"{stem}_bias": torch.ones(3, 10)}
    with open_checkpoint(files.write(tmp_path / "m", tensors, {"quant_method": "mxfp4"})) as checkpoint:
        assert set(checkpoint.tensors) == {stem, f"{stem}_bias"}
        tensor = checkpoint.tensor(stem)
        assert (tensor.storage.name, tensor.shape) == ("MXFP4", (3, 10, 96))
        np.testing.assert_array_equal(tensor.dequantise(), values)
        other = convert_moe_packed_tensors(parts["blocks"], parts["scales"], dtype=torch.float32)
        np.testing.assert_array_equal(tensor.dequantise(), other.transpose(1, 2).numpy())
        assert checkpoint.tensors[stem].nbytes == 3 * 10 * 3 * 17


def test_every_code_of_float8(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).reshape(8, 32)
    tensors = {"l.weight": codes.view(torch.float8_e4m3fn), "l.weight_scale": torch.tensor(1.0)}
    with open_checkpoint(files.write(tmp_path / "m", tensors, PER_TENSOR)) as checkpoint:
        tensor = checkpoint.tensor("l.weight")
        expected = codes.view(torch.float8_e4m3fn).float().numpy()
        np.testing.assert_array_equal(tensor.dequantise(), expected)
        with pytest.raises(CheckpointError, match=r"'l\.weight' .* not a number"):
            check_finite(tensor, "l.weight")


def scaled(scheme: files.Scheme, part: str, factor: float) -> tuple[files.Tensors, np.ndarray]:
    """Parts with their scales multiplied, which moves the values along."""
    tensors, values = files.parts_of(scheme, matrix((64, 160)))
    tensors[f"layer.{part}"] = (tensors[f"layer.{part}"].float() * factor).to(tensors[f"layer.{part}"].dtype)
    return tensors, values * factor


@pytest.mark.parametrize(
    ("name", "part", "factor", "storage"),
    [
        ("ct 4", "weight_scale", 2.0**22, "F32"),  # above what float16 holds
        ("ct 4", "weight_scale", 2.0**-20, "F32"),  # below
        ("ct 4", "weight_scale", 2.0**14, "Q4_0"),
        ("ct 4 asymmetric", "weight_scale", 2.0**21, "F32"),
        ("ct int8", "weight_scale", 2.0**-40, "F32"),
        ("gptq 4 asymmetric", "scales", 2.0**14, "Q4_1"),
    ],
)
def test_scales_that_float16_does_not_hold(
    tmp_path: Path, name: str, part: str, factor: float, storage: str
) -> None:
    tensors, values = scaled(SCHEMES[name], part, factor)
    path = files.write(tmp_path / "m", tensors, SCHEMES[name].settings)
    with open_checkpoint(path) as checkpoint:
        tensor = checkpoint.tensor("layer.weight")
        assert tensor.storage.name == storage
        assert relative_error(tensor.dequantise(), values) < (1e-7 if storage == "F32" else 2**-11)


def test_minima_beyond_float16(tmp_path: Path) -> None:
    """Scales of which 15 are more than float16 holds, so that only the minimum does not fit."""
    tensors, values = scaled(SCHEMES["gptq 4 asymmetric"], "scales", 2.0**20)
    assert torch.isfinite(tensors["layer.scales"]).all()
    with open_checkpoint(files.write(tmp_path / "m", tensors, SCHEMES["gptq 4"].settings)) as checkpoint:
        tensor = checkpoint.tensor("layer.weight")
        assert tensor.storage.name == "F32"
        np.testing.assert_array_equal(tensor.dequantise(), values.astype(np.float32))


def test_a_dead_output_does_not_cost_the_others_their_codes(tmp_path: Path) -> None:
    weight = matrix((64, 160))
    weight[3] *= 1e-8
    parts, values = files.parts_of(SCHEMES["ct 4"], weight)
    with open_checkpoint(files.write(tmp_path / "m", parts, SCHEMES["ct 4"].settings)) as checkpoint:
        tensor = checkpoint.tensor("layer.weight")
        assert tensor.storage.name == "Q4_0"
        assert relative_error(tensor.dequantise(), values) < 2**-16


@pytest.mark.parametrize("name", ["gptq 4", "awq", "ct 8", "fp8 block", "nf4"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_scales_that_are_not_finite_are_refused(tmp_path: Path, name: str, value: float) -> None:
    parts, _ = files.parts_of(SCHEMES[name], matrix((64, 160)))
    key = next(key for key in parts if key.endswith(("scales", "_scale", "_scale_inv", "absmax")))
    parts[key][0, ...] = value
    with open_checkpoint(files.write(tmp_path / "m", parts, SCHEMES[name].settings)) as checkpoint:
        tensor = checkpoint.tensor("layer.weight")
        with pytest.raises(CheckpointError, match=r"'layer\.weight' .* infinite or not a number"):
            check_finite(tensor, "layer.weight")


# ------------------------------------------------------------------------------------- whole models

TOKENS = [5, 17, 42, 3, 99, 200, 7, 7, 31, 64]
MODELS = [
    "gptq 4", "gptq 4 asymmetric", "gptq 4 act-order", "gptq 3", "gptq 8", "awq", "ct 4", "ct 4 asymmetric",
    "ct int8", "ct float8", "fp8 block", "fp8 tensor", "nf4 double", "int8",
]  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_logits_of_its_values(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    scheme = SCHEMES[name]
    quantised, plain = files.write_models(tiny_llama, tmp_path, scheme)
    expected = load(plain, "reference", "W32A32", "KV32").run(TOKENS)
    seen = load(quantised, "reference", "W32A32", "KV32").run(TOKENS)
    assert relative_error(seen, expected) < (1e-6 if scheme.exact else 1e-2)
    auto = load(quantised, "reference").run(TOKENS)
    assert relative_error(auto, expected) < 0.3
    assert relative_error(load(quantised, isa_levels()[0]).run(TOKENS), auto) < 0.05


def test_formats_follow_what_is_handed_over(tiny_llama: Path, tmp_path: Path) -> None:
    quantised, _ = files.write_models(tiny_llama, tmp_path, SCHEMES["gptq 4"])
    _, store = load_program(quantised, "auto")
    assert store.formats["layers.0.q"].name == "W4A8-g32"
    assert store.formats["embed"].name == "W8A8-g32"
    assert store.matrix("layers.1.down").storage.name == "Q4_0"
    store.release("layers.1.down")
    store.close()
    assert describe(quantised).formats == {"Q4_0": 21, "F32": 8}
    assert describe(quantised).parameters == describe(tmp_path / "plain").parameters


def test_a_quantised_head(tiny: Callable[[str], TinyModel], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = tiny("llama3").folder
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    head, _ = files.parts_of(SCHEMES["gptq 4"], tensors.pop("lm_head.weight").numpy(), "lm_head")
    path = files.write(
        tmp_path / "m", tensors | head, SCHEMES["gptq 4"].settings | {"lm_head": True}, **config
    )
    _, store = load_program(path, "auto")
    assert store.formats["head"].name == "W4A8-g32"
    assert store.formats["layers.0.q"].name == "W8A8-g32"
    store.close()


def test_settings_in_other_places(tmp_path: Path) -> None:
    """Older files: settings in a file beside config.json, or under compression_config."""
    for file, name in (("quantize_config.json", "gptq 4"), ("quant_config.json", "awq")):
        settings = dict(SCHEMES[name].settings)
        del settings["quant_method"]
        if name == "awq":
            settings = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
        parts, _ = files.parts_of(SCHEMES[name], matrix((32, 96)))
        path = files.write(tmp_path / file, parts, None)
        (path / file).write_text(json.dumps(settings))
        with open_checkpoint(path) as checkpoint:
            assert list(checkpoint.tensors) == ["layer.weight"]
    settings = dict(SCHEMES["ct 4"].settings)
    del settings["quant_method"]
    parts, _ = files.parts_of(SCHEMES["ct 4"], matrix((32, 96)))
    path = files.write(tmp_path / "ct", parts, None, compression_config=settings)
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.tensors) == ["layer.weight"]


def test_a_quantised_cache_leaves_weights_alone(tmp_path: Path) -> None:
    tensors = {"l.k_proj.weight": torch.ones(2, 32), "l.k_scale": torch.ones(1), "l.v_scale": torch.ones(1)}
    settings = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}}
    with open_checkpoint(files.write(tmp_path / "m", tensors, settings)) as checkpoint:
        assert list(checkpoint.tensors) == ["l.k_proj.weight"]
    settings["config_groups"] = {"attention": {"targets": ["LlamaAttention"], "weights": None}}
    with open_checkpoint(files.write(tmp_path / "m", tensors, settings)) as checkpoint:
        assert checkpoint.tensor("l.k_proj.weight").dequantise().sum() == 64


def test_optional_parts_and_settings(tmp_path: Path) -> None:
    """A GPTQ file without g_idx, modules left out by `dynamic`, and biases of zeros that nobody asked for."""
    scheme = SCHEMES["gptq 4"]
    module = "model.layers.0.self_attn.q_proj"
    parts, values = files.parts_of(scheme, matrix((32, 96)), module)
    del parts[f"{module}.g_idx"]
    settings = scheme.settings | {"dynamic": {"-:.*gate.*": {}, "+:.*up.*": {}}}
    zeros, ones = torch.zeros(32, dtype=torch.float16), torch.ones(32, dtype=torch.float16)
    for bias, config, shown in ((zeros, {}, 1), (ones, {}, 2), (zeros, {"attention_bias": True}, 2)):
        path = files.write(tmp_path / "m", parts | {f"{module}.bias": bias}, settings, **config)
        with open_checkpoint(path) as checkpoint:
            assert len(checkpoint.tensors) == shown
            np.testing.assert_array_equal(checkpoint.tensor(f"{module}.weight").dequantise(), values)


# ---------------------------------------------------------------------------------------- refusals


def refused(folder: Path, tensors: files.Tensors, settings: dict[str, Any], **config: Any) -> str:
    path = files.write(folder / "model", tensors, settings, **config)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert message.isprintable()
    return message


def nested(settings: dict[str, Any], keys: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy of the settings with one of them, which may lie deeper, changed."""
    first, *rest = keys
    inner = nested(settings.get(first) or {}, tuple(rest), value) if rest else value
    return {**settings, first: inner}


WEIGHTS = ("config_groups", "group_0", "weights")
SETTINGS: list[tuple[str, tuple[str, ...], Any, str]] = [
    (
        "gptq 4",
        ("quant_method",),
        "hqq",
        "quant_method is 'hqq'; accepted: gptq, awq, compressed-tensors, fp8",
    ),
    ("gptq 4", ("quant_method",), None, "quant_method is missing"),
    ("gptq 4", ("bits",), 5, "bits is 5; accepted: 2, 3, 4, 8"),
    ("gptq 4", ("bits",), True, "bits is True"),
    ("gptq 4", ("group_size",), 0, "group_size is 0; accepted: -1 or"),
    ("gptq 4", ("checkpoint_format",), "marlin", "checkpoint_format is 'marlin'; accepted: gptq, gptq_v2"),
    ("gptq 4", ("is_marlin_format",), True, "is_marlin_format is True"),
    ("gptq 4", ("pack_dtype",), "int16", "pack_dtype is 'int16'"),
    ("gptq 4", ("dynamic",), {".*mlp.*": {"bits": 8}}, r"dynamic: .*mlp.* is {'bits': 8}"),
    ("gptq 4", ("dynamic",), [1], "dynamic is [1]; accepted: an object"),
    ("awq", ("bits",), 8, "bits is 8; accepted: 4"),
    ("awq", ("version",), "gemv", "version is 'gemv'; accepted: gemm"),
    ("awq", ("version",), "exllama", "version is 'exllama'"),
    ("awq", ("backend",), "llm-awq", "backend is 'llm-awq'"),
    ("ct 4", ("format",), "marlin-24", "format is 'marlin-24'; accepted: pack-quantized"),
    ("ct 4", ("format",), "nvfp4-pack-quantized", "format is 'nvfp4-pack-quantized'"),
    ("ct 4", ("sparsity_config",), {"format": "sparse-24-bitmask"}, "sparsity_config: format is 'sparse-24"),
    ("ct 4", ("transform_config",), {"config_groups": {"u": {}}}, "transform_config: config_groups is"),
    ("ct 4", ("config_groups",), {}, "config_groups is {}; accepted: at least one"),
    ("ct 4", (*WEIGHTS, "num_bits"), 6, "config_groups.group_0.weights: num_bits is 6; accepted: 4, 8"),
    ("ct 4", (*WEIGHTS, "type"), "float", "type is 'float'; accepted: int for pack-quantized"),
    ("ct 4", (*WEIGHTS, "strategy"), "block", "strategy is 'block'; accepted: tensor, channel, group"),
    ("ct 4", (*WEIGHTS, "group_size"), None, "group_size is missing"),
    ("ct 4", ("config_groups", "group_1", "weights"), CHANNELS, "accepted: groups of layers whose weights"),
    ("ct float8 block", (*WEIGHTS, "block_structure"), None, "block_structure is missing"),
    ("fp8 block", ("weight_block_size",), [128], "weight_block_size is [128]; accepted: two whole numbers"),
    ("fp8 block", ("fmt",), "e5m2", "fmt is 'e5m2'"),
]


@pytest.mark.parametrize(("name", "keys", "value", "expected"), SETTINGS)
def test_settings_that_are_refused(
    tmp_path: Path, name: str, keys: tuple[str, ...], value: Any, expected: str
) -> None:
    parts, _ = files.parts_of(SCHEMES[name], matrix((32, 96)))
    message = refused(tmp_path, parts, nested(SCHEMES[name].settings, keys, value))
    assert expected in message
    assert "accepted: " in message


def changed(
    part: str, change: Callable[[torch.Tensor], torch.Tensor | None]
) -> Callable[[files.Tensors], None]:
    def apply(tensors: files.Tensors) -> None:
        value = change(tensors[f"layer.{part}"])
        del tensors[f"layer.{part}"]
        if value is not None:
            tensors[f"layer.{part}"] = value

    return apply


STATE = "weight.quant_state.bitsandbytes__nf4"
PARTS: list[tuple[str, Callable[[files.Tensors], None], str]] = [
    ("gptq 4", changed("scales", lambda t: None), "'layer.scales' is missing"),
    (
        "gptq 4",
        changed("qzeros", lambda t: t[:-1]),
        "'layer.qzeros' is 'I32' of shape (2, 4); accepted: (3, 4)",
    ),
    (
        "gptq 4",
        changed("qweight", lambda t: t.float()),
        "'layer.qweight' is 'F32' of shape (12, 32); accepted: I32",
    ),
    ("gptq 4", changed("qweight", lambda t: t[0]), "accepted: a matrix"),
    ("gptq 4", changed("qweight", lambda t: t[:, :30]), "accepted: whole words of 4-bit codes"),
    (
        "gptq 4",
        changed("g_idx", lambda t: t + 1),
        "'layer.g_idx' is 'I32' of shape (96,); accepted: groups from 0",
    ),
    ("gptq 4", changed("g_idx", lambda t: t - 1), "seen: -1 to 1"),
    ("gptq 4", changed("scales", lambda t: t.to(torch.float64)), "accepted: F16 or BF16 or F32"),
    ("awq", changed("scales", lambda t: t.T), "'layer.scales' is 'F16' of shape (32, 3); accepted: (3, 32)"),
    (
        "ct 4",
        changed("weight_shape", lambda t: t + 8),
        "accepted: the 4-bit codes of 'layer.weight_shape', [40, 104]",
    ),
    ("ct 4", changed("weight_scale", lambda t: t[:, :2]), "accepted: (32, 3)"),
    ("ct int8", changed("weight_scale", lambda t: None), "'layer.weight_scale' is missing"),
    ("fp8 block", changed("weight_scale_inv", lambda t: None), "'layer.weight_scale_inv' is missing"),
    ("fp8 block", changed("weight_scale_inv", lambda t: t[:, :1]), "accepted: (1, 2)"),
    ("nf4", changed("weight", lambda t: t[1:]), "'layer.weight' is 'U8' of shape (1535, 1)"),
    ("nf4", changed("weight.absmax", lambda t: t.to(torch.uint8)), "accepted: F32"),
    ("nf4", changed(STATE, lambda t: t[:-1]), "is not valid JSON"),
    ("nf4", changed(STATE, lambda t: t[None]), "accepted: ("),
    ("nf4 double", changed("weight.nested_absmax", lambda t: t[:-1]), "'layer.weight.nested_absmax'"),
    ("nf4 double", changed("weight.nested_quant_map", lambda t: None), "nested_quant_map' is missing"),
    ("int8", changed("SCB", lambda t: t[:-1]), "'layer.SCB' is 'F32' of shape (31,); accepted: (32,)"),
    ("int8", changed("weight_format", lambda t: t + 2), "accepted: 0, for rows in order"),
]


@pytest.mark.parametrize(("name", "change", "expected"), PARTS)
def test_parts_that_are_refused(
    tmp_path: Path, name: str, change: Callable[[files.Tensors], None], expected: str
) -> None:
    parts, _ = files.parts_of(SCHEMES[name], matrix((32, 96)))
    change(parts)
    assert expected in refused(tmp_path, parts, SCHEMES[name].settings)


def test_more_refusals(tmp_path: Path) -> None:
    scheme = SCHEMES["gptq 4"]
    parts, _ = files.parts_of(scheme, matrix((32, 96)))
    both = parts | {"layer.weight": torch.ones(32, 96)}
    assert "'layer.weight' stands beside its quantised parts" in refused(tmp_path, both, scheme.settings)
    assert "model_type is 'gpt2'" in refused(tmp_path, parts, scheme.settings, model_type="gpt2")
    blocks = {"e_blocks": torch.zeros(2, 3, 4, 15, dtype=torch.uint8)}
    assert "'e_blocks' is 'U8' of shape (2, 3, 4, 15)" in refused(tmp_path, blocks, {"quant_method": "mxfp4"})


# --------------------------------------------------------------------------------------------- fuzz

DAMAGE: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda t: t.reshape(-1)[:-1],
    lambda t: t[..., None],
    lambda t: t.reshape(-1)[:1],
    lambda t: t.T if t.ndim == 2 else t[None],
    lambda t: t.reshape(-1).view(torch.uint8).to(torch.int32),
    lambda t: t.float().to(torch.float64),
    lambda t: torch.full_like(t.float(), 1e9).to(t.dtype),
    lambda t: torch.zeros_like(t.float()).to(t.dtype),
]
ODD: list[Any] = [None, True, 0, -1, 2, 3, 1 << 40, 0.5, "x", [], [0, 0], [1, 1 << 20], {}, {"format": 1}]


def survives(path: Path) -> bool:
    """Open and read everything; only a CheckpointError of one line may refuse it."""
    try:
        with open_checkpoint(path) as checkpoint:
            for name, info in checkpoint.tensors.items():
                if info.storage not in STORAGES:
                    continue
                tensor = checkpoint.tensor(name)
                assert (tensor.shape, tensor.storage.name, tensor.nbytes) == (
                    info.shape,
                    info.storage,
                    info.nbytes,
                )
                check_finite(tensor, name)
    except CheckpointError as error:
        message = str(error)
    else:
        return True
    assert message.isprintable()
    return False


@pytest.mark.parametrize(
    "name", ["gptq 4", "awq", "ct 4 asymmetric", "ct int8", "fp8 block", "nf4 double", "int8"]
)
def test_damaged_parts(tmp_path: Path, name: str) -> None:
    parts, _ = files.parts_of(SCHEMES[name], matrix((32, 96)))
    used = [part for part in parts if part.removeprefix("layer.") not in SCHEMES[name].more]
    sound = 0
    for part, damage in product(used, DAMAGE):
        path = files.write(tmp_path / "m", parts | {part: damage(parts[part])}, SCHEMES[name].settings)
        sound += survives(path)
    assert sound < len(used) * len(DAMAGE) / 2


@pytest.mark.parametrize("name", ["gptq 4", "awq", "ct 4 asymmetric", "ct float8 block", "fp8 block"])
def test_odd_settings(tmp_path: Path, name: str) -> None:
    parts, _ = files.parts_of(SCHEMES[name], matrix((32, 96)))
    settings = SCHEMES[name].settings
    places = [(key,) for key in settings]
    if "config_groups" in settings:
        places += [
            (*WEIGHTS[:2],),
            WEIGHTS,
            *((*WEIGHTS, key) for key in settings["config_groups"]["group_0"]["weights"]),
        ]
    refusals = 0
    for keys, value in product(places, ODD):
        refusals += not survives(files.write(tmp_path / "m", parts, nested(settings, keys, value)))
    assert refusals > len(places)


def test_odd_states(tmp_path: Path) -> None:
    parts, _ = files.parts_of(SCHEMES["nf4 double"], matrix((32, 96)))
    state = json.loads(bytes(parts[f"layer.{STATE}"].tolist()))
    refusals = 0
    for key, value in product(state, ODD):
        text = json.dumps({**state, key: value}).encode()
        changes = {f"layer.{STATE}": torch.tensor(list(text), dtype=torch.uint8)}
        refusals += not survives(files.write(tmp_path / "m", parts | changes, SCHEMES["nf4 double"].settings))
    assert refusals > 3 * len(ODD)


def test_an_unquantised_folder_is_left_as_it_is(tmp_path: Path) -> None:
    tensors = {"one.weight": torch.ones(2, 32)}
    for settings in (None, {}):
        with open_checkpoint(files.write(tmp_path / "m", tensors, settings)) as checkpoint:
            assert checkpoint.tensor("one.weight").storage.name == "F32"
    scheme = replace(SCHEMES["gptq 4"])
    with open_checkpoint(files.write(tmp_path / "m", tensors, scheme.settings)) as checkpoint:
        assert checkpoint.tensor("one.weight").storage.name == "F32"
