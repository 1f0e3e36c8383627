"""What holds for every family: the logits of transformers on every executor, and bits that ignore company.

Models have one layer of each kind and windows of three tokens, because CUDA's kernels run in Triton's
interpreter where there is no GPU. Their whole tiny models are tested beside what is special about them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny_experts
import tiny_gated
import tiny_models
import tiny_parallel
import torch
from running import Loaded, load, relative_error
from test_families import weights_of
from tiny_models import TinyModel

from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.model.families import FAMILIES, family_of
from ridgeline.native import isa_levels
from ridgeline.types import CheckpointError

Small = Callable[[str], TinyModel]
Make = Callable[[str, Path, Callable[[Any], Any]], TinyModel]

SPARSE = tuple(name for name in tiny_experts.SPARSE_MODELS if not name.endswith("mxfp4"))
MODELS: dict[str, Make] = {
    **dict.fromkeys(tiny_models.MODELS, tiny_models.make),
    **dict.fromkeys(tiny_parallel.MODELS, tiny_parallel.make),
    **dict.fromkeys((*tiny_gated.GATED, *tiny_gated.CONFIG_ONLY), tiny_gated.make_gated),
    **dict.fromkeys(SPARSE, tiny_experts.make_sparse),
}
TOKENS = np.random.default_rng(13).integers(0, 50, 60).tolist()
WINDOW = 3
ORIGINAL = "original_max_position_embeddings"
PER_LAYER = ("layer_types", "no_rope_layers")


def shrunk(model: Any) -> Any:
    """A model with the first layer of each kind, whose windows and original contexts are short."""
    config = model.config
    lists = [name for name in PER_LAYER if getattr(config, name, None)]
    kinds = list(zip(*(getattr(config, name) for name in lists), strict=True)) or [()]
    firsts = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    for name in lists:
        setattr(config, name, [getattr(config, name)[i] for i in firsts])
    config.num_hidden_layers = len(firsts)
    if getattr(config, "sliding_window", None):
        config.sliding_window = WINDOW
    if getattr(config, ORIGINAL, None):
        setattr(config, ORIGINAL, WINDOW)
        config.rope_parameters[ORIGINAL] = WINDOW
    return type(model)(config)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    directory = tmp_path_factory.mktemp("small")
    return cache(lambda name: MODELS[name](name, directory, shrunk))


def test_no_family_is_left_out(small: Small) -> None:
    found = set()
    for name in MODELS:
        with open_checkpoint(small(name).folder) as checkpoint:
            found.add(family_of(checkpoint).name)
    assert found == {family.name for family in FAMILIES}


@pytest.mark.parametrize("name", MODELS)
def test_float32_logits_equal_transformers(small: Small, name: str) -> None:
    """A prompt, and one token more."""
    expected = small(name).logits(TOKENS[:6])
    for executor in ("reference", *isa_levels(), "cuda"):
        loaded = load(small(name).folder, executor, "W32A32", "KV32")
        seen = np.concatenate([loaded.run(TOKENS[:5]), loaded.run(TOKENS[5:6], 5)])
        assert relative_error(seen, expected) < 1e-4, executor
        loaded.executor.close()


@pytest.mark.parametrize("name", MODELS)
def test_tensors_that_do_not_fit_are_named(small: Small, name: str, tmp_path: Path) -> None:
    folder = small(name).folder
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    held = safetensors.torch.load_file(folder / "model.safetensors")
    one = sorted(held)[-1]
    for tensors, message in (
        (held | {one: torch.zeros(held[one].shape[0] + 1, 7)}, f"tensor '{one}' has shape"),
        ({key: value for key, value in held.items() if key != one}, f"tensor '{one}' is missing"),
        (held | {"model.layers.0.sideways": torch.zeros(2)}, r"'model.layers.0.sideways' is not known"),
        (held | {one: held[one].to(torch.float64)}, f"tensor '{one}' is stored as 'F64'"),
    ):
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            weights_of(tmp_path)


def greedy(loaded: Loaded, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The logits of three tokens after each prompt, in steps that all prompts share."""
    tables = [[9, 2, 6], [4, 30, 1], [0, 11]]
    pending, starts = list(prompts), [0] * len(prompts)
    chosen: list[list[np.ndarray]] = [[] for _ in prompts]
    for _ in range(3):
        rows = [loaded.rows(*each) for each in zip(pending, starts, tables[: len(prompts)], strict=True)]
        ends = np.cumsum([len(tokens) for tokens in pending])
        logits = loaded.logits(*rows)
        starts = [start + len(tokens) for start, tokens in zip(starts, pending, strict=True)]
        for of, end in zip(chosen, ends, strict=True):
            of.append(logits[end - 1])
        pending = [[int(of[-1].argmax())] for of in chosen]
    return [np.stack(of) for of in chosen]


@pytest.mark.parametrize("name", MODELS)
def test_bits_do_not_depend_on_the_batch(small: Small, name: str) -> None:
    """Three requests at once on two threads, and each of them alone on one."""
    isa = isa_levels()[0]
    alone, crowd = (load(small(name).folder, isa, "W8A8-g32", threads=threads) for threads in (1, 2))
    prompts = [TOKENS[:33], TOKENS[33:37], TOKENS[40:41]]
    expected = [greedy(alone, [prompt])[0] for prompt in prompts]
    np.testing.assert_array_equal(greedy(crowd, prompts), expected)
    alone.executor.close()
    crowd.executor.close()
