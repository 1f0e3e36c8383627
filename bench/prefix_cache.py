"""What the prefix cache is worth: time to the first token of a question about a long document.

    python bench/prefix_cache.py --model model.gguf

Each document is asked about twice on one server: `cold`, and `warm` with what the first question has left in
the KV cache. The server then ends and begins again on the same `--cache-dir`, and a third question is asked:
`restarted`. The second one is asked again too, and its answer must be the same. Times are those of an HTTP
client that streams, medians over documents; a short request comes first, so that a server's first is not
among them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from server_runs import leave_on_sigterm, running

_QUESTION_TOKENS = 20
_TOKEN_IDS = (1000, 40_000)
"""Of random documents: ordinary tokens of any vocabulary of today."""


class Answer:
    """A streamed completion: when its first token came, its text, and how much of its prompt was cached."""

    def __init__(self, url: str, prompt: Sequence[int], tokens: int) -> None:
        body = {
            "model": _model_of(url),
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
        self.first_token_s: float | None = None
        self.text, self.cached_tokens = "", 0
        began_s = time.perf_counter()
        with urllib.request.urlopen(request) as lines:
            for line in lines:
                if line.startswith(b"data: {"):
                    self._take(json.loads(line[6:]), time.perf_counter() - began_s)

    def _take(self, event: dict[str, Any], elapsed_s: float) -> None:
        for choice in event["choices"]:
            if self.first_token_s is None:
                self.first_token_s = elapsed_s
            self.text += choice["text"]
        if event.get("usage"):
            self.cached_tokens = event["usage"]["prompt_tokens_details"]["cached_tokens"]


def _model_of(url: str) -> str:
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        return str(json.load(answer)["data"][0]["id"])


def measure(command: Sequence[str], tokens: int, rounds: int) -> dict[str, Any]:
    """Ask about `rounds` documents of so many tokens."""
    chance = random.Random(1)

    def text(count: int) -> list[int]:
        return [chance.randrange(*_TOKEN_IDS) for _ in range(count)]

    documents = [text(tokens) for _ in range(rounds)]
    second, third = ([document + text(_QUESTION_TOKENS) for document in documents] for _ in range(2))
    with running(command) as (url, _):
        Answer(url, text(64), 4)
        cold = [Answer(url, document + text(_QUESTION_TOKENS), 8) for document in documents]
        warm = [Answer(url, prompt, 8) for prompt in second]
    with running(command) as (url, _):
        Answer(url, text(64), 4)
        restarted = [Answer(url, prompt, 8) for prompt in third]
        again = [Answer(url, prompt, 8) for prompt in second]
    if [answer.text for answer in warm] != [answer.text for answer in again]:
        raise SystemExit("error: an answer from restored pages differs")
    result: dict[str, Any] = {"document_tokens": tokens, "documents": rounds}
    for name, answers in (("cold", cold), ("warm", warm), ("restarted", restarted)):
        result[f"{name}_ttft_s"] = median(answer.first_token_s or 0.0 for answer in answers)
        result[f"{name}_cached_tokens"] = min(answer.cached_tokens for answer in answers)
    for name in ("warm", "restarted"):
        result[f"{name}_share_of_cold"] = result[f"{name}_ttft_s"] / result["cold_ttft_s"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure what the prefix cache saves, in process and on disk."
    )
    parser.add_argument("--model", required=True, help="a model that ridgeline serves")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--document-tokens", type=int, default=4000)
    parser.add_argument("--documents", type=int, default=3)
    chosen = parser.parse_args()
    leave_on_sigterm()
    if not Path(chosen.model).exists():
        raise SystemExit(f"error: {chosen.model} does not exist; accepted: a model file or folder")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ridgeline.cli.main", "serve", chosen.model]
        command += ["--threads", str(chosen.threads), "--cache-dir", folder]
        print(json.dumps(measure(command, chosen.document_tokens, chosen.documents)))


if __name__ == "__main__":
    main()
