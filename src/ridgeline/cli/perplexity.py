"""`ridgeline perplexity`: how well a model predicts a text."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ridgeline.cli import options
from ridgeline.cli.options import flag, given
from ridgeline.cli.output import print_json
from ridgeline.cli.progress import fetch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ridgeline.apps.perplexity import Perplexity

File = Annotated[Path, flag("file", "The text, in UTF-8.", "-f")]
Context = Annotated[int, flag("ctx", "Tokens of a chunk; its second half is scored.", "-c")]
Chunks = Annotated[int | None, flag("chunks", "Score only the first chunks (default: all).")]


def perplexity(
    file: File,
    model: options.Model = None,
    ctx: Context = 512,
    chunks: Chunks = None,
    weights: options.WeightFormat = None,
    kv_format: options.KVFormat = None,
    threads: options.Threads = None,
    device: options.Device = None,
    no_packed_cache: options.NoPackedCache = False,
    json: options.Json = False,
) -> None:
    """Perplexity of a text file, scored as llama-perplexity does."""
    from ridgeline.apps.perplexity import Scorer, check_context, score_text
    from ridgeline.config import EngineConfig
    from ridgeline.loading import load_engine
    from ridgeline.types import RequestError

    if chunks is not None and chunks < 1:
        raise RequestError(f"chunks is {chunks}; accepted: at least 1")
    check_context(ctx)
    text = _read(file)
    engine_options = given(
        model=model,
        weights=weights,
        kv_format=kv_format,
        threads=threads,
        device=device,
        packed_cache=options.packed_cache(no_packed_cache),
    )
    fetch(model)
    loaded = load_engine(EngineConfig(**engine_options, max_model_len=ctx, max_num_seqs=1))
    try:
        engine = loaded.engine
        tokens = loaded.tokenizer.encode(text, add_special=True)
        begin = tokens[0] if tokens and tokens[0] == loaded.tokenizer.bos_id else None
        pages = tuple(pool.pages for pool in engine.scheduler.cache.pools)
        scorer = Scorer(engine.executor, engine.handle, pages, loaded.config.max_num_batched_tokens)
        start = time.perf_counter()
        with _progress(json) as on_chunk:
            result = score_text(scorer, tokens, ctx, chunks, begin, on_chunk)
        elapsed_s = time.perf_counter() - start
    finally:
        loaded.engine.close()
    if json:
        print_json({**asdict(result), "context": ctx, "elapsed_s": elapsed_s, "model": loaded.config.model})
    else:
        print(f"perplexity {result.perplexity:.4f} ± {result.error:.4f}")
        print(f"{result.chunks} chunks of {ctx}, {result.tokens_scored} tokens scored, {elapsed_s:.1f} s")


def _read(file: Path) -> str:
    from ridgeline.types import RequestError

    try:
        return file.read_bytes().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not UTF-8 at byte {error.start}; accepted: a text file") from error
    except OSError as error:
        raise RequestError(f"{file}: {error.strerror}; accepted: a text file") from error


@contextmanager
def _progress(json: bool) -> Iterator[Callable[[Perplexity], None] | None]:
    """The running figure on a terminal's standard error, in one line that is wiped at the end."""
    if json or not sys.stderr.isatty():
        yield None
        return

    def show(figure: Perplexity) -> None:
        print(f"\r{figure.chunks}: {figure.perplexity:.4f}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
