"""How byte-level vocabularies cut text into words, for every name that a GGUF may give its rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import CohereTokenizer, GPTNeoXTokenizer, Qwen2Tokenizer, Qwen3_5Tokenizer
from vocabularies import ids_of, pair_vocabulary, trained, write_gguf

from ridgeline.model.tokenizer import Tokenizer
from ridgeline.model.tokenizer_words import WORD_RULES

PROBES = (
    "Don't stop, I'LL go\n\n  at 12345:30 for $9.99 (x<=3)!  ",
    '\tfoo_bar(Ünïcode 東京 ひら 안녕) //"q"…\r\n   end 42',
    "camelCase XML @#% `~|\n a",
)
# The lengths in bytes of the tokens of `pair_vocabulary(PROBES)` that llama.cpp (of llama-cpp-python 0.3.36)
# gives for each probe. Where it only approximates a family's own rules, the probe is left out.
EXPECTED = {
    (
        "21222112212121211111111112221111212122",
        "12122222222221222122211221222222111",
        "2222122222212",
    ): (
        "bailingmoe bailingmoe2 deepseek-r1-qwen f2llmv2 grok-2 hunyuan kormo llada-moe megrez qwen2 "
        "qwen35 seed-coder solar-open stablelm2 ufakzeka "
    ),
    (
        "2122211221212121121212222112212122",
        "1212222222222122212221122122222212",
        "2222122222212",
    ): (
        "chatglm-bpe dbrx falcon-h1 falcon3 glm4 jais-2 jina-v5-nano lfm2 llama-bpe llama-v3 llama3 "
        "midm-2.0 minicpm5 pixtral smaug-bpe "
    ),
    (
        "2212211221212121121212222112212122",
        "1212222222222122212221122122222212",
        "2212222222212",
    ): "gpt-4o kanana2 llama4 minimax-m2 talkie",
    (
        "21222112122121211111111112221111212122",
        "12112112222122212221222112212212122111",
        "2222122222212",
    ): "codeshell command-r exaone mellum2 minerva-7b refact smollm starcoder",
    (
        "212221121221212122212222112212122",
        "1211211222212221222122211221221212221",
        "2222122222212",
    ): (
        "a.x-4.0 exaone4 gigachat gpt-2 granite-docling jais jina-de jina-es jina-v2-de jina-v2-es "
        "mellum modern-bert mpt olmo phi-2 trillion "
    ),
    (
        "21222112212121211111111112221111212122",
        "12122222222221222122211221222222111",
        "2212222222212",
    ): "tekken",
    (
        "2122211221212121121212222112212122",
        "12122122221122212222221122122222212",
        "2222122222212",
    ): "deepseek-v3 hunyuan-dense hy_v4 joyai-llm",
    (
        "2111221121221112211111111122111111111111112",
        "12112112222122212221222111111112111222111",
        "22221221111111112",
    ): "chameleon",
    (
        "2111221121221212112121222111121112122",
        "12112112222122212221222111211221212212",
        "22221221212212",
    ): "default",
    (
        "22122112212121211111111112221111212122",
        "121222222212221222122212211212222111",
    ): "youtu",
    (
        "22122112212121212222122211222222",
        "12221122221222122212221122222212221",
        "2222122222122",
    ): "bloom gpt3-finnish poro-chat",
    (
        "2111221121221111211111111112221111212122",
        "121121122221122212221222122112111222111",
        "2222122222212",
    ): "deepseek-coder",
    (
        "21222112212121211111111112221111212122",
        "12122222222222222222112212211222111",
        "2222221222212",
    ): "exaone-moe",
    (
        "211122112122111121122112222112212122",
        "12112112122212221222122212211211122212",
        "2222122222212",
    ): "deepseek-llm",
    (
        "22122112212121211111111112221111221122",
        "122211222212221222122211222222122111",
        "2222122222122",
    ): "viking",
    (
        "2212211221212121121212222112212122",
        "1212222222122222212221122122222212",
    ): "kimi-k2",
    (
        "21222112212121211111111112221111212122",
        "121222222222212221222112212211222111",
        "2222122222212",
    ): "laguna",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path / "cache"))


def test_every_name_is_checked() -> None:
    checked = {name for names in EXPECTED.values() for name in names.split()}
    # Falcon's rules are checked against Hugging Face's (`vocabularies.ORACLE_WORDS`).
    assert checked | {"falcon"} == set(WORD_RULES)


@pytest.mark.parametrize("lengths", EXPECTED, ids=[names.split()[0] for names in EXPECTED.values()])
def test_words_are_cut_as_llama_cpp_cuts_them(lengths: tuple[str, ...], tmp_path: Path) -> None:
    tokens, merges = pair_vocabulary(PROBES)
    for name in EXPECTED[lengths].split():
        keys = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": name,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": merges,
        }
        ours = Tokenizer.from_file(write_gguf(tmp_path / f"{name}.gguf", keys))
        # The probes that count come first.
        for probe, expected in zip(PROBES, lengths, strict=False):
            ids = ours.encode(probe)
            assert "".join(str(len(ours.token_bytes(index))) for index in ids) == expected, (name, probe)
            assert ours.decode(ids) == probe


SCRIPTS = st.sampled_from(
    ["don't", "I'LL", " the", "  ", "\n\n", "\r\n", "\t", "1234567", "½", "Ⅷ", "é", "e\u0301", "Å",
     "\u212b", "हिन्दी", "ไทย", "안녕", "カナ", "你好，", "مرحبا،", "ÉCOLE", "XMLHttp", "…!?",
     "$x<=^y~", "\u3000", "\u2028", "\x00", "🏳️‍🌈"]
)  # fmt: skip
TEXTS = st.lists(SCRIPTS | st.text(max_size=3), max_size=10).map("".join)


@pytest.mark.parametrize(
    ("pre", "family"),
    [
        ("qwen2", Qwen2Tokenizer),
        ("qwen35", Qwen3_5Tokenizer),
        ("command-r", CohereTokenizer),
        ("mpt", GPTNeoXTokenizer),
        ("olmo", GPTNeoXTokenizer),
    ],
)
def test_rules_are_the_familys_own(pre: str, family: type, tmp_path: Path) -> None:
    model = json.loads(trained("smollm").to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    theirs: tokenizers.Tokenizer = family(vocab=dict(model["vocab"]), merges=merges).backend_tokenizer
    keys = vocabularies.vocabulary_keys("smollm") | {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.token_type": [1] * len(model["vocab"]),
    }
    ours = Tokenizer.from_file(write_gguf(tmp_path / "v.gguf", keys))

    @settings(max_examples=150, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        expected = ids_of(theirs, text)
        assert ours.encode(text) == expected

    check()


def test_long_runs_are_cut(tmp_path: Path) -> None:
    rules = {rules.expressions: name for name, rules in WORD_RULES.items()}
    for name in rules.values():
        pre = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(tokenizers.Regex(e), "isolated") for e in WORD_RULES[name].expressions]
        )
        for run in (" " * 20_000, "a" * 20_000, "7" * 20_000, "Aé" * 10_000, "\n " * 5_000):
            assert "".join(word for word, _ in pre.pre_tokenize_str(run + "x")) == run + "x"
