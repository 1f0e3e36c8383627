"""A check for schemathesis, which finds it by SCHEMATHESIS_HOOKS: answers are what OpenAI describes too."""

from __future__ import annotations

import schemathesis
from jsonschema import ValidationError
from openai_schemas import validate_response


@schemathesis.check
def openai_conformance(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    kind = response.headers.get("content-type", [""])[0]
    whole, text = not response.stream_cut_short, response.content.decode()
    try:
        validate_response(case.path, response.status_code, kind, text, whole)
    except ValidationError as error:
        raise AssertionError(f"not as OpenAI describes it: {error.message}") from None
