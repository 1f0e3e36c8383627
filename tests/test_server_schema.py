"""The server against its own /openapi.json: schemathesis asks what the description allows and what it does
not, and every answer has to be as described."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from openai_schemas import events, validate_response
from serving import ServerProcess, server_process

from ridgeline.server.wire import responses
from ridgeline.server.wire.beams import BESIDE, ONLY_BEAMS

QUIET = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
STREAMED = {
    "/v1/chat/completions": responses.ChatCompletionChunk,
    "/v1/completions": responses.Completion,
}


@pytest.fixture(scope="module")
def server(tiny_llama: Path) -> Iterator[ServerProcess]:
    with server_process(tiny_llama, "--served-model-name", "tiny", "--max-num-seqs", 8) as running:
        yield running


@pytest.fixture(scope="module")
def examples(request: pytest.FixtureRequest) -> int:
    return 300 if request.config.getoption("--full") else 3


def test_every_answer_is_as_described(server: ServerProcess, examples: int, tmp_path: Path) -> None:
    """Values at the edges of the description and beyond, then random ones, of all endpoints and methods."""
    command = [
        *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json"),
        "--checks=all",
        # The description says nothing of ranges that depend on the model, nor what fields say of each other.
        "--exclude-checks=positive_data_acceptance",
        "--exclude-path=/v1/steps",  # its answers have no end
        "--phases=coverage,fuzzing",
        f"--max-examples={examples}",
        *("--seed=1", "--generation-database=none", "--warnings=off", "--no-color"),
    ]
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "SCHEMATHESIS_HOOKS": "openai_checks"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"[1-9]\d\d+ generated", ended.stdout), ended.stdout


# Random values are rarely in range; these are put where they may be.
RANGES: dict[str, tuple[float, float]] = {
    "n": (1, 3),
    "temperature": (0, 5),
    "top_p": (0.1, 1),
    "top_k": (-1, 50),
    "min_p": (0, 1),
    "repetition_penalty": (0.5, 2),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "seed": (-(2**63), 2**63),
    "max_tokens": (1, 4),
    "max_completion_tokens": (1, 4),
    "min_tokens": (0, 1),
    "best_of": (1, 1),
    "typical_p": (0.1, 1),
    "top_n_sigma": (-1, 5),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1),
    "mirostat": (0, 0),
    "mirostat_tau": (0, 10),
    "mirostat_eta": (0, 1),
    "dry_multiplier": (0, 5),
    "dry_base": (1, 4),
    "dry_allowed_length": (1, 5),
    "dry_penalty_last_n": (-1, 50),
}


def plausible(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """A body that the model can be asked, with as much of what was drawn as that allows."""
    made = {**body, "model": "tiny"}
    for name, (low, high) in RANGES.items():
        if isinstance(made.get(name), int | float):
            made[name] = type(made[name])(min(max(made[name], low), high))
    if path in STREAMED:
        made.setdefault("max_tokens", 4)
    if path == "/tokenize":
        made["prompt"] = made.get("prompt") or "x"
        made.pop("messages", None)
    if "messages" in made:
        texts = [str(message)[:20] for message in made["messages"]]
        made["messages"] = [{"role": "user", "content": text} for text in texts[:5]]
    for name in ("prompt", "input", "tokens"):
        if name in made:
            made[name] = in_vocabulary(made[name])
    for name in ("stop", "stop_token_ids", "logit_bias", "tools", "documents", "best_of", "tool_choice"):
        made.pop(name, None)
    for name in (
        "response_format",
        "structured_outputs",
        "bad_words",
        "dry_sequence_breakers",
        "speculation",
    ):
        made.pop(name, None)
    for name in ("reasoning_effort", "chat_template_kwargs", "continue_final_message", "parallel_tool_calls"):
        made.pop(name, None)
    for name in BESIDE if made.get("use_beam_search") else ONLY_BEAMS:
        made.pop(name, None)
    if made.get("use_beam_search"):
        made["echo"] = False if path == "/v1/completions" else None
    if not made.get("stream"):
        made.pop("stream_options", None)
    if not made.get("logprobs"):
        made.pop("top_logprobs", None)
    return made


def in_vocabulary(value: Any) -> Any:
    if isinstance(value, list):
        return [in_vocabulary(each) for each in value or [1]]
    return value % 288 if isinstance(value, int) else value


def ask(case: Any) -> int:
    """The status, of an answer in which nothing is wrong."""
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    response = case.call()
    case.validate_response(response, excluded_checks=[positive_data_acceptance])
    kind = response.headers.get("content-type", [""])[0]
    whole, text = not response.stream_cut_short, response.content.decode()
    validate_response(case.path, response.status_code, kind, text, whole)
    if kind.startswith("text/event-stream"):
        for event in events(text, whole):
            STREAMED[case.path].model_validate(event)
    return response.status_code


@pytest.mark.full
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize"]
)
def test_what_the_model_answers_is_as_described(server: ServerProcess, examples: int, path: str) -> None:
    statuses: Counter[int] = Counter()
    # Not above: importing it makes hypothesis try far more often, in every test of this process.
    import schemathesis
    from schemathesis import GenerationMode
    from schemathesis.checks import load_all_checks

    load_all_checks()
    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json")

    @settings(max_examples=4 * examples, phases=[Phase.generate], **QUIET)
    @given(case=described[path]["POST"].as_strategy(generation_mode=GenerationMode.POSITIVE))
    def run(case: Any) -> None:
        case.body = plausible(path, case.body)
        statuses[ask(case)] += 1

    run()
    assert statuses[200] > 0.9 * sum(statuses.values()), statuses
