"""Compare Ridgeline's perplexity with llama.cpp's, on one model requantised to each GGUF type by llama.cpp.

    python bench/compare_perplexity.py --model model.gguf --text wiki.test.txt --llama-python venv/bin/python

llama.cpp requantises the model (by its recipe for the type, so that a file may hold several storages, or to
that one alone with --pure), and both sides score the same tokens of the same file. Ratios near 1 say that a
type is read and multiplied right; the two round activations differently.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TYPES = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS",
    "MXFP4_MOE", "TQ1_0", "TQ2_0",
)  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """One type: both perplexities, and the size of the file."""

    type: str
    ours: float
    llama: float
    file_bytes: int

    @property
    def ratio(self) -> float:
        return self.ours / self.llama


# ---------------------------------------------------------------------- llama.cpp, in the Python that has it


def requantise(model: str, type_name: str, pure: bool, out: str) -> None:
    """Write `model` in a type of llama.cpp's. Raises SystemExit when it cannot."""
    import llama_cpp

    wanted = llama_cpp.llama_model_quantize_default_params()
    wanted.allow_requantize, wanted.pure = True, pure
    wanted.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type_name}")
    if llama_cpp.llama_model_quantize(model.encode(), out.encode(), ctypes.byref(wanted)):
        raise SystemExit(f"llama.cpp does not requantise {model} to {type_name}")


def llama_perplexity(model: str, chunks: Sequence[Sequence[int]]) -> float:
    """llama.cpp's perplexity of the second half of each chunk."""
    import llama_cpp
    import numpy as np

    held = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    if not held:
        raise SystemExit(f"llama.cpp does not load {model}")
    size = len(chunks[0])
    wanted = llama_cpp.llama_context_default_params()
    wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = size
    context = llama_cpp.llama_init_from_model(held, wanted)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(held))
    scores = []
    for chunk in chunks:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch = llama_cpp.llama_batch_init(size, 0, 1)
        batch.n_tokens = size
        for i, token in enumerate(chunk):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
            batch.logits[i] = size // 2 <= i < size - 1
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit(f"llama.cpp does not run {model}")
        for i in range(size // 2, size - 1):
            row = llama_cpp.llama_get_logits_ith(context, i)
            logits = np.ctypeslib.as_array(row, (vocabulary,)).astype(np.float64)
            scores.append(np.logaddexp.reduce(logits) - logits[chunk[i + 1]])
        llama_cpp.llama_batch_free(batch)
    return float(np.exp(np.mean(scores)))


def serve_llama() -> None:
    """One job from standard input, its answer as the last line of standard output."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    llama_cpp.llama_backend_init()
    job = json.load(sys.stdin)
    requantise(job["model"], job["type"], job["pure"], job["out"])
    print(json.dumps(llama_perplexity(job["out"], job["chunks"])))


def run_llama(python: str, **job: Any) -> float:
    """`requantise` and `llama_perplexity` in another Python. Raises RuntimeError with its last line."""
    command = [python, __file__, "--serve-llama"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return float(json.loads(done.stdout.splitlines()[-1]))


# ------------------------------------------------------------------------------------------ our own side


def chunks_of(model: str, text: str, context: int, count: int) -> list[list[int]]:
    """The first chunks of the text's tokens."""
    from ridgeline.model.checkpoint import open_checkpoint
    from ridgeline.model.tokenizer import Tokenizer

    with open_checkpoint(Path(model)) as checkpoint:
        tokens = Tokenizer.from_checkpoint(checkpoint).encode(text[: 20 * context * count])
    return [tokens[i * context : (i + 1) * context] for i in range(count)]


def our_perplexity(model: str, chunks: Sequence[Sequence[int]]) -> float:
    """Ours of the same tokens, on the CPU in the file's own formats."""
    from ridgeline.apps.perplexity import Scorer, score_text
    from ridgeline.config import EngineConfig
    from ridgeline.loading import load_engine

    engine = load_engine(EngineConfig(model=model, device="cpu", max_model_len=len(chunks[0]))).engine
    try:
        pages = tuple(pool.pages for pool in engine.scheduler.cache.pools)
        scorer = Scorer(engine.executor, engine.handle, pages, len(chunks[0]))
        tokens = [token for chunk in chunks for token in chunk]
        return score_text(scorer, tokens, len(chunks[0])).perplexity
    finally:
        engine.close()


def compare(
    model: str, text: str, types: Sequence[str], llama_python: str, pure: bool, context: int, chunks: int
) -> list[Compared]:
    """Both sides on each type, one after the other."""
    parts = chunks_of(model, text, context, chunks)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in types:
            out = Path(folder) / f"{name}.gguf"
            theirs = run_llama(llama_python, model=model, type=name, pure=pure, out=str(out), chunks=parts)
            found.append(Compared(name, our_perplexity(str(out), parts), theirs, out.stat().st_size))
            out.unlink()
            print(
                f"{name:10} ours {found[-1].ours:12.4f}  llama.cpp {theirs:12.4f}  "
                f"ratio {found[-1].ratio:.4f}  {found[-1].file_bytes / 1e6:.1f} MB",
                flush=True,
            )
    return found


def main() -> None:
    if "--serve-llama" in sys.argv:
        return serve_llama()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--llama-python", default=sys.executable, help="the Python that has llama-cpp-python")
    parser.add_argument("--types", default=",".join(TYPES), help="llama.cpp's names, with commas between")
    parser.add_argument("--pure", action="store_true", help="all matrices in the one type")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = compare(
        args.model,
        args.text.read_text(),
        args.types.split(","),
        args.llama_python,
        args.pure,
        args.ctx,
        args.chunks,
    )
    if args.json:
        args.json.write_text(json.dumps([asdict(each) | {"ratio": each.ratio} for each in found], indent=1))
    return None


if __name__ == "__main__":
    main()
