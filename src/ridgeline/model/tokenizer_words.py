"""How byte-level vocabularies cut text into words before any merge, by the names that GGUF files give.

`tokenizer.ggml.pre` names the rules (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); the patterns
are those of each family's own tokenizer, which some readers of GGUF only approximate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WordRules:
    """Each expression isolates its matches in what the one before left.

    `ignore_merges` takes a word that is itself a token whole; `nfc` normalises the text first; `add_bos`
    holds where the file does not say.
    """

    expressions: tuple[str, ...]
    ignore_merges: bool = False
    nfc: bool = False
    add_bos: bool = False


_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_ANY_CASE = rf"(?i:{_CONTRACTIONS})"
_GPT2 = _CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def _gpt4(digits: str, start: str = _ANY_CASE + "|") -> str:
    """The word pattern of cl100k and its descendants, which differ in how many digits they keep together."""
    return rf"{start}[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*" + _SPACES


def _cased(digits: str, end: str, upper: str = "", start: str = "") -> str:
    """The word pattern of o200k and its descendants: capitals open a word, `end` may close it."""
    capitals, smalls = (
        rf"[{part}\p{{M}}{upper}]" for part in (r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}", r"\p{Ll}\p{Lm}\p{Lo}")
    )
    opening = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}{opening}{capitals}*{smalls}+{end}|{opening}{capitals}+{smalls}*{end}"
        rf"|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+"
    )


# The letters of alphabets with capitals and smalls, as DeepSeek's first tokenizers list them.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf"
    "\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d"
    "\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4"
    "\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_PUNCTUATION = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*" + _SPACES
)
_HANGUL_AND_CJK = (
    "[\uac00-\ud7a3\u3131-\u318e]+"
    "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|" + _HAN_AND_KANA
)
_SENTENCE = r" ?[^(\s|.,!?" + "\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_JAIS2_SPACES = "".join(
    rf"|\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2")
)

_PLAIN_GPT2 = WordRules((_GPT2,))
_NFC_GPT2 = WordRules((_GPT2,), nfc=True)
_SINGLE_DIGITS = WordRules((r"\p{N}", _GPT2))
_LLAMA3 = WordRules((_gpt4("{1,3}"),), ignore_merges=True, add_bos=True)
_CL100K = WordRules((_gpt4("{1,3}"),))
_QWEN2 = WordRules((_gpt4(""),), nfc=True)
_CL100K_SINGLE_DIGITS = WordRules((_gpt4(""),))
_O200K = WordRules((_cased("{1,3}", _ANY_CASE + "?") + r"[\r\n/]*" + _SPACES,))
_DEEPSEEK3 = WordRules((r"\p{N}{1,3}", _HAN_AND_KANA, _DEEPSEEK_V3))
_BLOOM = WordRules((_SENTENCE,))
_BAILING = WordRules(
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",
    )
)

_RULES: tuple[tuple[str, WordRules], ...] = (
    # What readers assume of files from before rules had names.
    ("default", WordRules((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    (
        "gpt-2 phi-2 jais jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum trillion exaone4 "
        "granite-docling",
        _PLAIN_GPT2,
    ),
    # GPT-NeoX's tokenizer and those made from it.
    ("mpt olmo modern-bert", _NFC_GPT2),
    ("smollm starcoder refact codeshell exaone minerva-7b mellum2", _SINGLE_DIGITS),
    ("command-r", WordRules((r"\p{N}", _GPT2), nfc=True)),
    ("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", _LLAMA3),
    ("dbrx smaug-bpe glm4 chatglm-bpe", _CL100K),
    ("qwen2", _QWEN2),
    ("deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", _CL100K_SINGLE_DIGITS),
    (
        "qwen35",
        WordRules(
            (
                rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
                r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES,
            ),
            nfc=True,
        ),
    ),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", _O200K),
    (
        "tekken",
        WordRules((_cased("", "") + r"[\r\n/]*" + _SPACES,), ignore_merges=True, add_bos=True),
    ),
    (
        "youtu",
        WordRules((_HANGUL_AND_CJK, _cased("", _ANY_CASE + "?") + r"[\r\n/]*" + _SPACES), ignore_merges=True),
    ),
    (
        "kimi-k2",
        WordRules(
            (_cased("{1,3}", _ANY_CASE + "?", r"&&[^\p{Han}]", r"[\p{Han}]+|") + r"[\r\n]*" + _SPACES,)
        ),
    ),
    (
        "deepseek-llm",
        WordRules(
            (
                r"[\r\n]",
                rf"\s?[{_CASED_LETTERS}]+",
                rf"\s?[{_DEEPSEEK_PUNCTUATION}]+",
                r"\s+$",
                _DEEPSEEK_CJK,
                r"\p{N}+",
            )
        ),
    ),
    ("deepseek-coder", WordRules((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}"))),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _DEEPSEEK3),
    ("falcon", WordRules((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    ("bloom poro-chat gpt3-finnish", _BLOOM),
    ("viking", WordRules((_SENTENCE, r"\p{N}"))),
    (
        "chameleon",
        WordRules(
            (
                "<sentinel:[0-9]+>",
                "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            add_bos=True,
        ),
    ),
    (
        "seed-coder",
        WordRules(
            (
                rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+"
                + _SPACES,
            )
        ),
    ),
    (
        "exaone-moe",
        WordRules(
            (
                rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    ("bailingmoe bailingmoe2 llada-moe", _BAILING),
    ("laguna", WordRules((r"[^\n]+|[\n]+", _gpt4("")))),
    ("minicpm5", WordRules((r"\p{N}{1,3}", _gpt4("+")), ignore_merges=True)),
    ("ufakzeka", WordRules((_gpt4("", ""),))),
    ("jais-2", WordRules((_gpt4("{1,3}").removesuffix(r"|\s+(?!\S)|\s+") + _JAIS2_SPACES + r"|\s{1}",))),
)

# A vocabulary without a name is cut as "default".
WORD_RULES: Mapping[str, WordRules] = {name: rules for names, rules in _RULES for name in names.split()}
