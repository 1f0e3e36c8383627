"""The bodies of requests: OpenAI's fields, and those of vLLM's that we have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from ridgeline.sampling.beam_search import MAX_LENGTH_PENALTY, BeamSearchParams
from ridgeline.server.errors import bad_request
from ridgeline.server.wire.base import Accepts, Body, anything, only
from ridgeline.server.wire.beams import beam_params, check_beams
from ridgeline.server.wire.forms import (
    ResponseFormatField,
    Speculation,
    SpeculationField,
    StructuredOutputsField,
    forced_calls,
)
from ridgeline.types import SamplingParams, StructuredOutputsParams

MAX_PROMPTS = 1024
MAX_SEQUENCES = 2048
MAX_MESSAGES = 10_000
MAX_TOOLS = 512
MAX_STOP = 4096
MAX_SALT = 256
MAX_WAIT_S = 3600
MAX_TOP_LOGPROBS = 20
COMPLETION_TOKENS = 16
"""What a completion has at most where its request does not say; OpenAI's default."""


def _stops(value: Any) -> Any:
    """One stop string, or a list of them."""
    value = [value] if isinstance(value, str) else value
    if isinstance(value, list) and len(value) > 64:
        raise ValueError(f"{len(value)} stop strings; accepted: at most 64")
    if isinstance(value, list) and any(isinstance(text, str) and len(text) > MAX_STOP for text in value):
        raise ValueError(f"a stop string is too long; accepted: up to {MAX_STOP} characters")
    return value


def _biases(value: Mapping[str, float]) -> Mapping[str, float]:
    if len(value) > 4096:
        raise ValueError(f"{len(value)} tokens; accepted: at most 4096")
    for token in value:
        if not (token.isascii() and token.isdigit() and len(token) < 12):
            raise ValueError("keys should be token ids")
    return value


def _token_ids(value: list[int]) -> list[int]:
    if len(value) > 4096:
        raise ValueError(f"{len(value)} token ids; accepted: at most 4096")
    return value


Stops = Annotated[list[str], BeforeValidator(_stops, json_schema_input_type=str | list[str])]
Biases = Annotated[dict[str, float], AfterValidator(_biases)]
TokenIds = Annotated[list[int], AfterValidator(_token_ids)]
Salt = Annotated[str, Field(min_length=1, max_length=MAX_SALT)]
"""What is computed for a request is shared only with those of the same key that send the same."""


Tier = Literal["auto", "default", "scale", "flex", "priority", "keystroke", "interactive", "batch"]
"""OpenAI's service tiers, and our classes by their names."""


class Queued(Body):
    """What decides when a request is served, and with whom it shares what is computed.

    `max_wait_s` bounds how long it waits to begin; it is refused at once where it would likely wait longer.
    """

    cache_salt: Salt | None = None
    service_tier: Tier | None = None
    max_wait_s: float | None = Field(default=None, ge=1, le=MAX_WAIT_S)


class StreamOptions(Body):
    include_usage: bool = False
    unsupported: ClassVar[Mapping[str, Accepts]] = {
        "include_obfuscation": anything,
        "continuous_usage_stats": only(False),
    }


def _stream_options(value: Any) -> Any:
    if isinstance(value, dict):
        StreamOptions.refuse_unsupported(value)
    return value


class Sampled(Queued):
    """What both kinds of completion have: how tokens are chosen, and how the answer comes."""

    model: str | None = None
    stream: bool = False
    stream_options: Annotated[StreamOptions, BeforeValidator(_stream_options)] | None = None
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Biases | None = None
    seed: int | None = None
    stop: Stops | None = None
    stop_token_ids: TokenIds | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    typical_p: float | None = None
    top_n_sigma: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: Stops | None = None
    bad_words: Stops | None = None
    response_format: ResponseFormatField | None = None
    structured_outputs: StructuredOutputsField | None = None
    speculation: SpeculationField | None = None
    use_beam_search: bool = False
    length_penalty: float | None = Field(default=None, ge=-MAX_LENGTH_PENALTY, le=MAX_LENGTH_PENALTY)
    early_stopping: bool | None = None

    unsupported: ClassVar[Mapping[str, Accepts]] = {
        "user": anything,
        "metadata": anything,
        "safety_identifier": anything,
        "prompt_cache_key": anything,
        "prompt_cache_retention": anything,
        "prompt_cache_options": anything,
        "store": only(False),
        "moderation": only(),
        "best_of": only(),
        "allowed_token_ids": only([]),
        "truncate_prompt_tokens": only(),
        "spaces_between_special_tokens": only(True),
        "return_tokens_as_token_ids": only(False),
        "return_token_ids": only(False),
        "priority": only(0),
        "request_id": only(),
        "guided_json": only(),
        "guided_regex": only(),
        "guided_choice": only(),
        "guided_grammar": only(),
        "logits_processors": only([]),
        "mm_processor_kwargs": only({}),
        "kv_transfer_params": only(),
        "vllm_xargs": only({}),
    }

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def content(self) -> Sequence[object]:
        """What is to be answered."""
        raise NotImplementedError

    @property
    def answers(self) -> int:
        """How many answers it wants."""
        return self.n

    def check(self) -> None:
        """What no single field can say. Raises HttpError."""
        raise NotImplementedError

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """For the engine, from this body and the model's own. Raises RequestError."""
        raise NotImplementedError

    def sampling(self, defaults: SamplingParams, **fixed: Any) -> SamplingParams:
        """Parameters for the engine: the model's own, changed by what was sent and by `fixed`. Raises
        RequestError for a value out of range."""
        own = {"best_of", "logit_bias", "logprobs", "max_tokens", "speculation", "structured_outputs"}
        names = set(SamplingParams.__dataclass_fields__) - own
        sent = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.logit_bias:
            sent["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        sent["structured_outputs"] = self.form()
        guessed = self.speculation
        if guessed is not None:
            sent["speculation"] = guessed.params() if isinstance(guessed, Speculation) else guessed
        base = {name: getattr(defaults, name) for name in SamplingParams.__dataclass_fields__}
        return SamplingParams(**{**base, **sent, **fixed})

    def beams(self, params: SamplingParams) -> BeamSearchParams | None:
        """What to search for, of a body whose `params` these are; None where it asks for no beams. Raises
        RequestError and HttpError."""
        return beam_params(self, params) if self.use_beam_search else None

    def form(self) -> StructuredOutputsParams | None:
        """The form that the answer must have. Raises RequestError and HttpError."""
        form = None if self.response_format is None else self.response_format.form()
        if self.structured_outputs is None:
            return form
        if form is not None:
            raise bad_request(
                "response_format and structured_outputs are set; accepted: one of them", "structured_outputs"
            )
        return self.structured_outputs.form()

    @property
    def form_field(self) -> str | None:
        """Where the form of the answer is asked for."""
        if self.structured_outputs is not None:
            return "structured_outputs"
        return None if self.response_format is None else "response_format"

    def check_common(self) -> None:
        """What both kinds of completion have to keep to."""
        check_beams(self)
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is only for stream: true", "stream_options")


# ------------------------------------------------------------------------------------------------ chat


class ChatTemplateFields(Body):
    """What a chat template is given."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=MAX_TOOLS)
    documents: list[dict[str, Any]] | None = Field(default=None, max_length=MAX_TOOLS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


class ToolFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: ToolFunction


class ChatRequest(ChatTemplateFields, Sampled):
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True

    unsupported: ClassVar[Mapping[str, Accepts]] = {
        **Sampled.unsupported,
        "functions": only([]),
        "function_call": only("none", "auto"),
        "modalities": only(["text"]),
        "audio": only(),
        "prediction": only(),
        "verbosity": only("medium"),
        "web_search_options": only(),
        "echo": only(False),
        "chat_template": only(),
        "add_special_tokens": only(False),
        "include_reasoning": only(True),
    }

    @property
    def content(self) -> Sequence[object]:
        return self.messages

    def check(self) -> None:
        self.check_common()
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")

    @property
    def forces_calls(self) -> bool:
        """Whether the answer has to call tools."""
        return self.tool_choice not in (None, "none", "auto")

    @property
    def form_field(self) -> str | None:
        return "tool_choice" if self.forces_calls else super().form_field

    def form(self) -> StructuredOutputsParams | None:
        form = super().form()
        if not self.forces_calls:
            return form
        if form is not None:
            raise bad_request(
                "tool_choice forces a call and the answer has another form; accepted: one of them",
                "tool_choice",
            )
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        return forced_calls(self.tools or [], named, self.parallel_tool_calls)

    def params(self, defaults: SamplingParams) -> SamplingParams:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.sampling(
            defaults, max_tokens=limit, logprobs=(self.top_logprobs or 0) if self.logprobs else None
        )


# ----------------------------------------------------------------------------------------- completions


def _prompts(value: Any) -> list[str | list[int]]:
    """A text, texts, token ids, or lists of token ids, as a list of prompts."""
    accepted = "it should be a string, token ids, or a list of either"
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError(accepted)
    if all(type(each) is int for each in value):
        return [value]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"{len(value)} prompts; accepted: at most {MAX_PROMPTS}")
    for each in value:
        tokens = isinstance(each, list) and each and all(type(token) is int for token in each)
        if not isinstance(each, str) and not tokens:
            raise ValueError(accepted)
    return value


Prompt = str | list[int] | list[str | list[int]]


class CompletionRequest(Sampled):
    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts, json_schema_input_type=Prompt)]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool = False
    best_of: int | None = None
    add_special_tokens: bool = True

    unsupported: ClassVar[Mapping[str, Accepts]] = {
        **{name: accepts for name, accepts in Sampled.unsupported.items() if name != "best_of"},
        "suffix": only(""),
        "prompt_embeds": only(),
    }

    @property
    def content(self) -> Sequence[object]:
        return self.prompt

    @property
    def answers(self) -> int:
        return max(self.n, self.best_of or 0) * len(self.prompt)

    def check(self) -> None:
        self.check_common()
        if self.stream and self.best_of is not None and self.best_of != self.n:
            raise bad_request("best_of cannot be streamed; accepted: n, or stream: false", "best_of")
        if self.use_beam_search and self.echo_logprobs is not None:
            raise bad_request("echo with logprobs cannot be used with use_beam_search", "echo")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise bad_request("max_tokens is 0; accepted: a positive number", "max_tokens")
        if len(self.prompt) * max(self.n, self.best_of or 1) > MAX_SEQUENCES:
            raise bad_request(
                f"{len(self.prompt)} prompts with n {self.n}; accepted: at most {MAX_SEQUENCES} answers", "n"
            )

    @property
    def echo_logprobs(self) -> int | None:
        """How many log-probabilities the tokens of the echoed prompt have, None for none."""
        return self.logprobs if self.echo else None

    @property
    def only_echo(self) -> bool:
        """Whether the answer is the prompt, and the model need not be asked."""
        return self.max_tokens == 0 and self.echo_logprobs is None and self.prompt_logprobs is None

    def params(self, defaults: SamplingParams) -> SamplingParams:
        limit = COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        if self.only_echo:
            limit = 1  # of parameters that nobody will use
        wanted = [most for most in (self.echo_logprobs, self.prompt_logprobs) if most is not None]
        scores = max(wanted, default=None)
        return self.sampling(
            defaults,
            max_tokens=limit,
            logprobs=self.logprobs,
            prompt_logprobs=scores,
            best_of=self.best_of,
        )


# ------------------------------------------------------------------------------------------ embeddings


class EmbeddingRequest(Queued):
    """`pooling` and `normalize` are ours: the mean of the final hidden states or the last, of length 1."""

    model: str | None = None
    input: Annotated[list[str | list[int]], BeforeValidator(_prompts, json_schema_input_type=Prompt)]
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True
    add_special_tokens: bool = True

    unsupported: ClassVar[Mapping[str, Accepts]] = {
        "user": anything,
        "dimensions": only(),
        "truncate_prompt_tokens": only(),
        "priority": only(0),
    }


# -------------------------------------------------------------------------------------------- tokenizer


class TokenizeRequest(Body):
    """A text, or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=MAX_TOOLS)
    documents: list[dict[str, Any]] | None = Field(default=None, max_length=MAX_TOOLS)
    add_special_tokens: bool = True
    return_token_strs: bool = False
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    unsupported: ClassVar[Mapping[str, Accepts]] = {
        "chat_template": only(),
        "mm_processor_kwargs": only({}),
    }

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise bad_request("the body has prompt and messages, or none of them; accepted: one", "prompt")


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int] = Field(max_length=1_000_000)
