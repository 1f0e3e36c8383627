"""The benchmark of sampling, on a small model: what it counts, not how fast it is."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from worded_models import make_worded

from bench import sampling
from ridgeline import LLM


def test_schemas_have_as_many_properties_as_they_say() -> None:
    for count in sampling.PROPERTIES:
        schema = sampling.schema_of(count)
        jsonschema.Draft202012Validator.check_schema(schema)
        assert len(schema["properties"]) == len(schema["required"]) == count


def test_steps_are_counted_and_the_engine_is_left_as_it_was(tmp_path: Path) -> None:
    with LLM(str(make_worded(tmp_path)), threads=1, kv_cache_memory_bytes=8 << 20) as llm:
        engine = llm._loaded.engine
        before = (engine.executor.drawer, engine._sampler._drawer)
        steps = sampling.steps_of(llm, 4, 9, ignore_eos=True)
        assert (engine.executor.drawer, engine._sampler._drawer) == before
    # The first of nine tokens comes with the prompts, and the first step of the answers is left out.
    assert len(steps) == 7
    assert all(0 < drawn < step for step, drawn in steps)


def test_both_parts_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(make_worded(tmp_path))
    sampling.main(["--model", model, "--seconds", "0", "--rows", "8", "4"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(report["chains"]) == set(sampling.CHAINS)
    assert all(0 < case["share"] < 1 for case in report["chains"].values())
    assert set(report["constraints"]) == {"1", "10", "50"}
