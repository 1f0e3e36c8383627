"""Write GGUF files of the shapes that people run, with random weights: `python -m bench.shapes`.

    python -m bench.shapes --folder shapes --llama-python VENV/bin/python --shapes llama-1b --types Q4_K_M

Speed depends on shapes and formats alone, so random weights measure what the real files would, where those
cannot be had. The float file is written with the `gguf` package, one tensor in memory at a time, and
quantised by llama.cpp's own `llama_model_quantize`, which chooses each tensor's type as it does for anybody.
The tokenizer is the default model's, with 49,152 words: embedding and head are smaller than the originals'.
The same seed gives the same bytes. Files that are there already are kept.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.system import ROOT, environment_of

FLOATS = "F16"
_RESERVE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder's sizes, in the words of GGUF's metadata; `types` is what is quantised unless told."""

    architecture: str
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head: int
    rope_base: float
    context: int
    tied: bool
    types: tuple[str, ...]

    def metadata(self) -> dict[str, int | float]:
        """Keys of GGUF below the architecture's name."""
        return {
            "context_length": self.context,
            "embedding_length": self.hidden,
            "block_count": self.layers,
            "feed_forward_length": self.feed_forward,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": self.head,
            "attention.value_length": self.head,
            "rope.dimension_count": self.head,
            "rope.freq_base": self.rope_base,
            "attention.layer_norm_rms_epsilon": 1e-5,
        }

    def tensors(self, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes (rows, columns) in the file's order; vectors are norms."""
        yield "token_embd.weight", (vocabulary, self.hidden)
        for layer in range(self.layers):
            for name, shape in self._layer():
                yield f"blk.{layer}.{name}.weight", shape
        yield "output_norm.weight", (self.hidden,)
        if not self.tied:
            yield "output.weight", (vocabulary, self.hidden)

    def _layer(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        queries, keys = self.heads * self.head, self.kv_heads * self.head
        yield "attn_norm", (self.hidden,)
        yield "attn_q", (queries, self.hidden)
        yield "attn_k", (keys, self.hidden)
        yield "attn_v", (keys, self.hidden)
        if self.architecture == "qwen3":
            yield "attn_q_norm", (self.head,)
            yield "attn_k_norm", (self.head,)
        yield "attn_output", (self.hidden, queries)
        yield "ffn_norm", (self.hidden,)
        yield "ffn_gate", (self.feed_forward, self.hidden)
        yield "ffn_up", (self.feed_forward, self.hidden)
        yield "ffn_down", (self.hidden, self.feed_forward)


_ALL_TYPES = ("Q4_0", "Q4_1", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
SHAPES = {
    "llama-1b": Shape("llama", 16, 2048, 8192, 32, 8, 64, 5e5, 131072, True, _ALL_TYPES),
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 3072, 16, 8, 128, 1e6, 40960, True, ("Q4_K_M", "Q8_0")),
    "llama-8b": Shape("llama", 32, 4096, 14336, 32, 8, 128, 5e5, 131072, False, ("Q4_K_M",)),
}
"""Llama-3.2-1B, Qwen3-0.6B and Llama-3.1-8B, from their `config.json`."""


def random_tensor(name: str, shape: tuple[int, ...], layers: int, seed: list[int]) -> np.ndarray:
    """Weights that keep a model's values near 1: normal with the inverse root of the inputs as deviation,
    smaller where a layer adds to the residual (as GPT-2 is initialised), norms near 1."""
    draw = np.random.default_rng(seed)
    values = draw.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        return 1 + np.float32(0.05) * values
    deviation = shape[-1] ** -0.5
    if "attn_output" in name or "ffn_down" in name:
        deviation *= (2 * layers) ** -0.5
    values *= np.float32(deviation)
    return values.astype(np.float16)


def write_floats(shape: Shape, name: str, tokenizer_file: Path, target: Path, seed: int = 0) -> None:
    """The float file of a shape. Needs the disk for it and memory for its largest tensor in float32."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    tokenizer = {
        key: f for key, f in GGUFReader(tokenizer_file).fields.items() if key.startswith("tokenizer.")
    }
    vocabulary = len(tokenizer["tokenizer.ggml.tokens"].data)
    writer = GGUFWriter(target, shape.architecture)
    writer.add_name(f"{name} with random weights")
    writer.add_file_type(1)
    for key, value in {**shape.metadata(), "vocab_size": vocabulary}.items():
        add: Any = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{shape.architecture}.{key}", value)
    for key, field in tokenizer.items():
        sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type)
    tensors = list(shape.tensors(vocabulary))
    for tensor, size in tensors:
        kind = np.dtype(np.float32 if len(size) == 1 else np.float16)
        writer.add_tensor_info(tensor, size, kind, prod(size) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for index, (tensor, size) in enumerate(tensors):
        writer.write_tensor_data(random_tensor(tensor, size, shape.layers, [seed, index]))
    writer.close()


def quantise(source: Path, target: Path, type_name: str, python: str, threads: int) -> None:
    """llama.cpp's own quantiser, in its own Python."""
    partial = target.with_suffix(".part")
    command = [python, "-m", "bench.peers.llama_quantise", str(source), str(partial), type_name, str(threads)]
    done = subprocess.run(command, cwd=ROOT, env=environment_of("llama"), capture_output=True, text=True)
    if done.returncode:
        partial.unlink(missing_ok=True)
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise SystemExit(f"error: {target.name} was not quantised: {said}")
    partial.rename(target)


def make(name: str, chosen: argparse.Namespace) -> None:
    """The files of one shape; the float file stays only where it was asked for."""
    shape: Shape = SHAPES[name]
    types = chosen.types or shape.types
    targets = {kind: chosen.folder / f"{name}-{kind}.gguf" for kind in types}
    wanted = {kind: target for kind, target in targets.items() if not target.exists()}
    if not wanted:
        print(f"{name}: all files are there")
        return
    floats = chosen.folder / f"{name}-{FLOATS}.gguf"
    if not floats.exists():
        _require_disk(shape, chosen.folder, len(wanted))
        partial = floats.with_suffix(".part")
        write_floats(shape, name, chosen.tokenizer_file, partial)
        partial.rename(floats)
    for kind, target in wanted.items():
        if kind != FLOATS:
            quantise(floats, target, kind, chosen.llama_python, chosen.threads)
        print(f"{target}: {target.stat().st_size / 2**20:.0f} MiB", flush=True)
    if FLOATS not in types:
        floats.unlink()


def _require_disk(shape: Shape, folder: Path, files: int) -> None:
    """Refuse to begin what would not fit: floats, and files of half their size (8 bits) at most."""
    floats = sum(2 * prod(size) for _, size in shape.tensors(49152))
    need = floats + files * floats // 2 + _RESERVE_BYTES
    free = shutil.disk_usage(folder).free
    if free < need:
        raise SystemExit(f"error: {free >> 30} GiB are free in {folder}; accepted: {-(-need >> 30)} GiB")


def main() -> None:
    from ridgeline.model.catalog import resolve

    parser = argparse.ArgumentParser(prog="python -m bench.shapes", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--llama-python", required=True, metavar="PYTHON", help="one with llama-cpp-python")
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["llama-1b"])
    parser.add_argument("--types", nargs="+", metavar="TYPE", help=f"llama.cpp's names, and {FLOATS}")
    parser.add_argument("--tokenizer", default="smollm2", help="the model whose tokenizer is taken")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    chosen.folder = chosen.folder.absolute()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    chosen.tokenizer_file = resolve(chosen.tokenizer)
    for name in chosen.shapes:
        make(name, chosen)


if __name__ == "__main__":
    main()
