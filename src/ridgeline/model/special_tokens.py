"""Which tokens of a vocabulary mean something to the engine: where text begins, where an answer ends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

# Texts with which models end a turn or a document, whatever else their files declare.
END_TOKENS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|end_of_turn|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<｜end▁of▁sentence｜>",
        "<end_of_utterance>",
        "<EOT>",
        "_<EOT>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "<turn|>",
        "<|tool_response>",
        "[EOT]",
    }
)


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Token ids with a meaning. `prefix` and `suffix` are what `add_special` puts around a text.

    `end_ids` has every token that ends an answer, `eos_id` among them.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None
    end_ids: frozenset[int] = field(default_factory=frozenset)
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()


def well_known_ends(tokens: Iterable[tuple[int, str]]) -> frozenset[int]:
    """The ids among added tokens (id, text) whose text is known to end an answer.

    Where a vocabulary has `<|return|>` (OpenAI's harmony format) or `<|flush|>`, `<|end|>` only closes a part
    of a longer answer, so it does not end one.
    """
    found = {text: token_id for token_id, text in tokens if text in END_TOKENS}
    if "<|return|>" in found or "<|flush|>" in found:
        found.pop("<|end|>", None)
    return frozenset(found.values())
