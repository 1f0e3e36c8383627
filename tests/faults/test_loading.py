"""Rows 10 to 12: models that are well-formed and wrong, and files that change under a server."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest
import safetensors.numpy
from tiny_models import TinyModel, write_gguf

from faults.commands import Command
from faults.house import CANARY, House, error_of, until
from faults.model_files import write_whole_gguf
from ridgeline.model.tokenizer import Tokenizer
from ridgeline.types import CheckpointError

pytestmark = pytest.mark.timeout(90)  # a server that does start does not end
Tiny = Callable[[str], TinyModel]


# ------------------------------------------------------------------------------ 10: shapes and values


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("intermediate_size", 192, "model.layers.0.mlp."),
        ("num_key_value_heads", 3, "model.layers.0.self_attn."),
        ("vocab_size", 300, "model.embed_tokens.weight"),
        ("num_hidden_layers", 4, "model.layers.3."),
        ("num_hidden_layers", 2, "model.layers.2."),
    ],
)
def test_row_10_config_and_tensors_disagree(
    command: Command, tmp_path: Path, tiny_llama: Path, setting: str, value: int, named: str
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, setting: value}))
    assert f"tensor '{named}" in command.fails("run", "--model", folder, "hi")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["layers.1.mlp.up_proj.weight", "layers.1.input_layernorm.weight"])
def test_row_10_values_that_are_not_finite(
    command: Command, tmp_path: Path, tiny_llama: Path, name: str, bad: float
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors[f"model.{name}"].reshape(-1)[-1] = bad
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert f"tensor 'model.{name}'" in command.fails("run", "--model", folder, "hi")


@pytest.mark.parametrize("bits", [0x7E00, 0x7C00, 0xFC00], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize(("storage", "part"), [("Q8_0", 0), ("Q4_0", 0), ("Q4_1", 0), ("Q4_1", 2)])
def test_row_10_scales_that_are_not_finite(
    command: Command, tmp_path: Path, tiny: Tiny, storage: str, part: int, bits: int
) -> None:
    """`part` is where in a block the scale or the minimum lies."""
    path, model = tmp_path / "quantised.gguf", tiny("llama")
    write_gguf(model.torch_model, path, gguf.GGMLQuantizationType[storage])
    path = write_whole_gguf(TinyModel("llama", None, model.folder, path), tmp_path / "model.gguf")
    name = "blk.1.ffn_up.weight"
    (tensor,) = (held for held in gguf.GGUFReader(path).tensors if held.name == name)
    assert tensor.tensor_type.name == storage
    with path.open("r+b") as file:
        file.seek(int(tensor.data_offset) + part)
        file.write(bits.to_bytes(2, "little"))
    assert f"tensor '{name}'" in command.fails("run", "--model", path, "hi")


def test_row_10_a_server_ends_with_the_tensors_name(
    command: Command, tmp_path: Path, tiny_llama: Path
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = np.nan
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "tensor 'model.norm.weight'" in command.fails("serve", folder, "--port", 0)


# ---------------------------------------------------------------------------- 11: tokenizer, template

TOKENIZERS: dict[str, dict[str, Any]] = {
    "is missing": {"ggml__tokens": None},
    "is missing or not a list of strings": {"ggml__tokens": [1, 2]},
    "stands twice": {"ggml__tokens": ["a", "b", "a"], "ggml__token_type": None},
    "merge 'ab'": {"ggml__merges": ["ab"]},
    "out of vocabulary": {"ggml__merges": ["no such", "tok en"]},
    "a type for each": {"ggml__token_type": [1, 1]},
    "eos_token_id is 9999; accepted: token ids": {"ggml__eos_token_id": 9999},
    "'no-such-rules'; accepted": {"ggml__pre": "no-such-rules"},
    "'evil'": {"ggml__model": "evil"},
    "the chat template is 7; accepted: text": {"chat_template": 7},
}


@pytest.mark.parametrize("said", TOKENIZERS)
def test_row_11_tokenizers_in_a_gguf(command: Command, tmp_path: Path, tiny: Tiny, said: str) -> None:
    path = write_whole_gguf(tiny("llama"), tmp_path / "model.gguf", **TOKENIZERS[said])
    line = command.fails("serve", path, "--port", 0)
    assert said in line
    assert command.fails("run", "--model", path, "hi") == line


SIDECARS = {
    "tokenizer.json": (
        b"", b"[]", b"{", b"null", b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 99999999999999999999}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": {"type": "Split", '
        b'"pattern": {"Regex": "(((("}, "behavior": "Isolated", "invert": false}}',
    ),
    "tokenizer_config.json": (b"[]", b"{", b"\xff", b'{"chat_template": 7}', b"[" * 200_000),
    "chat_template.jinja": (b"\xff", b"{% if %}", b"{{ ", b"{{ x | no_such_filter }}",
                            b"{{" + b"(" * 50_000),
}  # fmt: skip


@pytest.mark.parametrize("name", SIDECARS)
def test_row_11_tokenizers_and_templates_in_a_folder(
    command: Command, tmp_path: Path, tiny_llama: Path, name: str
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    for content in SIDECARS[name]:
        (folder / name).write_bytes(content)
        line = command.fails("serve", folder, "--port", 0)
        assert name.partition(".")[0].partition("_")[0] in line or "chat template" in line
        assert command.fails("run", "--model", folder, "hi") == line


def test_row_11_any_damage_to_a_tokenizer_is_told_or_harmless(tmp_path: Path, tiny_llama: Path) -> None:
    rng, loaded = np.random.default_rng(0), 0
    refused: list[str] = []
    whole = (tiny_llama / "tokenizer.json").read_bytes()
    for _ in range(300):
        raw = bytearray(whole)
        raw[rng.integers(len(raw))] = rng.choice(list(b'09 ax-,:"{\\\xff'))
        (tmp_path / "tokenizer.json").write_bytes(raw)
        try:
            tokenizer = Tokenizer.from_file(tmp_path)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        tokenizer.decode(tokenizer.encode("Any text, é\n"))
        loaded += 1
    assert min(loaded, len(refused)) > 10
    assert all(line.isprintable() for line in refused)


# --------------------------------------------------------------- 12: the file changes under a server


@pytest.fixture
def file_house(tmp_path: Path, tiny: Tiny) -> Iterator[tuple[House, Path]]:
    """A server of a model in a file of its own."""
    path = write_whole_gguf(tiny("llama"), tmp_path / "model.gguf")
    with House.open(path) as house:
        yield house, path


def maps(process: psutil.Process, path: Path) -> list[str]:
    return [held.path for held in process.memory_maps() if held.path.startswith(str(path))]


def test_row_12_a_model_file_that_is_cut_while_it_is_served(file_house: tuple[House, Path]) -> None:
    """On the CPU weights are repacked, so that the cut shows when the engine starts anew."""
    house, path = file_house
    whole, server = path.read_bytes(), psutil.Process(house.server.process.pid)
    assert maps(server, path) == maps(house.server.engine, path) == []
    os.truncate(path, 4096)
    assert house.sing() == house.canary
    os.kill(house.server.engine.pid, signal.SIGBUS)  # as a mapped page beyond the end would
    house.server.await_log("engine died", "model.gguf", "accepted:")
    house.server.await_log("engine died", "starting it again in 1.0 s")
    with house.web() as web:
        body = {"model": "model", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        for route, ask in (
            ("/v1/completions", CANARY),
            ("/v1/chat/completions", body),
            ("/v1/completions", {**CANARY, "stream": True}),
            ("/v1/embeddings", {"input": "hi"}),
        ):
            answer = web.post(route, json=ask)
            assert error_of(answer, 503)["code"] == "restarting"
            assert int(answer.headers["retry-after"]) >= 1
        assert error_of(web.get("/health"), 503)["code"] == "restarting"
        assert web.get("/live").status_code == 200
        assert web.post("/tokenize", json={"prompt": "hi"}).status_code == 200
    # Attempts leave nothing, and they go on.
    until(lambda: not server.children(), "between attempts")
    descriptors = server.num_fds()
    attempts = sum("engine died" in line for line in house.server.log)
    until(lambda: sum("engine died" in line for line in house.server.log) > attempts, "tried again")
    until(lambda: not server.children() and server.num_fds() <= descriptors, "without descriptors left over")
    path.write_bytes(whole)
    house.check()
