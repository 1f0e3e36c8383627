"""Tokenizers: exact against Hugging Face's, from both kinds of file; text is never a control token."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from vocabularies import CONTROLS, ids_of, oracle, vocabulary_keys, write_folder, write_gguf

from ridgeline.model import tokenizer_cache
from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.model.generation_defaults import generation_defaults
from ridgeline.model.tokenizer import Tokenizer
from ridgeline.model.tokenizer_gguf import read_gguf_tokenizer
from ridgeline.types import CheckpointError, RequestError

# Pieces that meet in odd ways: words, spaces, digits, control tokens whole and cut, scripts, combining marks.
PIECES = st.sampled_from(
    [*CONTROLS, "<|im_", "end|>", "<tool>", "im_", " ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "12345", "½",
     "Ⅷ", "the sky", "é", "e\u0301", "東京", "🌈", "👩\u200d🚀", "\u00a0", "\x00", "\x1c", "\u2028", "ſ",
     "\ufdd0"]
)  # fmt: skip
TEXTS = st.lists(PIECES | st.text(max_size=3), max_size=12).map("".join)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabularies")


def of_gguf(path: Path, **changes: Any) -> Tokenizer:
    named = {f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()}
    return Tokenizer.from_file(write_gguf(path, vocabulary_keys() | named))


@pytest.fixture(scope="module")
def smollm(folder: Path) -> Tokenizer:
    return of_gguf(folder / "smollm.gguf")


# -------------------------------------------------------------------------------------------- encode


@pytest.mark.parametrize("count", [150, pytest.param(12_500, marks=pytest.mark.full)])
@pytest.mark.parametrize("pre", vocabularies.ORACLE_WORDS)
def test_gguf_vocabulary_is_exact(pre: str, count: int, folder: Path) -> None:
    ours = Tokenizer.from_file(write_gguf(folder / f"{pre}.gguf", vocabulary_keys(pre)))
    parsing, plain = oracle(pre), oracle(pre, special=False)

    @settings(max_examples=count, deadline=None, database=None)
    @given(TEXTS)
    def check(text: str) -> None:
        assert ours.encode(text, parse_special=True) == ids_of(parsing, text)
        assert ours.encode(text) == ids_of(plain, text)
        assert ours.decode(ours.encode(text)) == text

    check()


def test_llama3_takes_a_word_that_is_a_token_whole(folder: Path) -> None:
    for pre, whole in (("llama-bpe", True), ("smollm", False)):
        keys = vocabulary_keys(pre)
        # No merges lead to this token.
        keys["tokenizer.ggml.tokens"] = [*keys["tokenizer.ggml.tokens"], "zqxj"]
        keys["tokenizer.ggml.token_type"] = [*keys["tokenizer.ggml.token_type"], 1]
        ours = Tokenizer.from_file(write_gguf(folder / f"{pre}-whole.gguf", keys))
        assert (ours.encode("zqxj") == [ours.vocab_size - 1]) is whole


def test_control_tokens_in_text_are_text(smollm: Tokenizer) -> None:
    text = "x <|im_end|>\n<|im_start|>system<|endoftext|>"
    assert not smollm.special_ids & set(smollm.encode(text))
    assert smollm.decode(smollm.encode(text)) == text
    assert smollm.encode("<|im_end|>", parse_special=True) == [2]
    # A user-defined token is found in text too, even where it lies inside the text of a control token.
    defined = smollm.token_id("im_")
    assert smollm.encode("<tool>") == [smollm.token_id("<tool>")]
    assert defined in smollm.encode("<|im_end|>")


def test_added_tokens_past_the_model_keep_their_ids(folder: Path) -> None:
    library = tokenizers.Tokenizer.from_str(vocabularies.trained().to_str())
    size = library.get_vocab_size()
    library.add_special_tokens(["<|x|>", "<|y|>"])
    library.add_tokens(["<think>"])
    ours = Tokenizer.from_file(write_folder(folder / "past", library))
    assert ours.encode("<|x|><think>", parse_special=True) == [size, size + 2]
    assert ours.encode("<think>") == [size + 2]
    assert ours.encode("<|x|>") == ids_of(vocabularies.trained(), "<|x|>")
    assert ours.vocab_size == size + 3


@settings(max_examples=150, deadline=None)
@given(before=TEXTS, masked=TEXTS, after=TEXTS)
def test_masked_text_is_text(smollm: Tokenizer, before: str, masked: str, after: str) -> None:
    mask = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in before + masked + after)
    ids = smollm.encode_masked(before + mask + after, {mask: masked})
    plain = smollm.encode_masked(before + mask + after, {mask: "x"})
    assert smollm.decode(ids, skip_special=False) == before + masked + after
    specials = [index for index in ids if index in smollm.special_ids]
    assert specials == [index for index in plain if index in smollm.special_ids]
    assert smollm.encode_masked(before, {mask: masked}) == smollm.encode(before, parse_special=True)


def test_masks_keep_word_boundaries(smollm: Tokenizer) -> None:
    # The mask's neighbours and its text are one word to the merges, as if it had been written there.
    assert smollm.encode_masked("the s\ue000ue<|im_end|>", {"\ue000": "ky is bl"}) == [
        *smollm.encode("the sky is blue"),
        2,
    ]


def test_long_texts_are_encoded_like_short_ones(smollm: Tokenizer) -> None:
    line = "The ridge é 山\n"
    assert smollm.encode(line * 2000) == smollm.encode(line) * 2000
    with pytest.raises(RequestError, match="surrogate at character 28000"):
        smollm.encode(line * 2000 + "\ud800")


def test_lone_surrogates_are_refused(smollm: Tokenizer) -> None:
    with pytest.raises(RequestError, match="surrogate at character 2"):
        smollm.encode("ab\ud800")


# ------------------------------------------------------------------------------------ special tokens


@pytest.mark.parametrize(
    ("changes", "begin"),
    [({}, []), ({"ggml__add_bos_token": True}, [1]), ({"ggml__add_bos_token": False}, [])],
)
def test_begin_token_of_gguf(tmp_path: Path, changes: dict[str, Any], begin: list[int]) -> None:
    ours = of_gguf(tmp_path / "v.gguf", **changes)
    assert ours.encode("sky", add_special=True) == begin + ours.encode("sky")
    marked = "<|im_start|>sky"
    # Never a second one.
    assert ours.encode(marked, add_special=True, parse_special=True) == ours.encode(
        marked, parse_special=True
    )


def test_llama3_adds_begin_unless_told(tmp_path: Path) -> None:
    keys = vocabulary_keys("llama-bpe")
    ours = Tokenizer.from_file(write_gguf(tmp_path / "a.gguf", keys))
    assert ours.encode("sky", add_special=True)[0] == 1
    silent = Tokenizer.from_file(
        write_gguf(tmp_path / "b.gguf", keys | {"tokenizer.ggml.add_bos_token": False})
    )
    assert silent.encode("sky", add_special=True) == ours.encode("sky")


def test_end_tokens_of_gguf(tmp_path: Path) -> None:
    # <|im_end|> by its id and name, <|endoftext|> by name, im_ because the file names it.
    ours = of_gguf(tmp_path / "v.gguf", ggml__eot_token_id=4)
    assert (ours.eos_id, ours.eos_ids) == (2, {0, 2, 4})
    assert ours.named_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def test_end_tokens_without_types(tmp_path: Path) -> None:
    ours = of_gguf(tmp_path / "v.gguf", ggml__token_type=None)
    assert ours.special_ids == {0, 1, 2}


def test_harmony_end_only_closes_a_part(tmp_path: Path) -> None:
    keys = vocabulary_keys()
    more = ["<|end|>", "<|return|>", "<|call|>"]
    keys["tokenizer.ggml.tokens"] = keys["tokenizer.ggml.tokens"] + more
    keys["tokenizer.ggml.token_type"] = keys["tokenizer.ggml.token_type"] + [3, 3, 3]
    ours = Tokenizer.from_file(write_gguf(tmp_path / "v.gguf", keys))
    assert {ours.token_text(index) for index in ours.eos_ids} == {
        "<|endoftext|>", "<|im_end|>", "<|return|>", "<|call|>",
    }  # fmt: skip


def test_special_tokens_of_a_folder(tmp_path: Path) -> None:
    library = oracle()
    library.enable_truncation(4)
    library.enable_padding(length=16)
    library.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    files: dict[str, Any] = {
        "tokenizer_config": {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}},
        "generation_config": {"eos_token_id": [2, 3], "temperature": 0.5, "top_k": 40, "top_p": None},
        "config": {"eos_token_id": 50256, "pad_token_id": 0},
    }
    ours = Tokenizer.from_file(write_folder(tmp_path / "model", library, **files))
    assert (ours.bos_id, ours.eos_id, ours.eos_ids) == (1, 2, {0, 2, 3})
    text = "The sky is blue because of air"
    assert ours.encode(text, add_special=True) == [1, *ids_of(oracle(), text), 2]
    files["tokenizer_config"]["add_bos_token"] = False
    quiet = Tokenizer.from_file(write_folder(tmp_path / "quiet", library, **files) / "tokenizer.json")
    assert quiet.encode("sky", add_special=True) == [*quiet.encode("sky"), 2]


# -------------------------------------------------------------------------------------------- decode


def stream(ours: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    detokenizer = ours.detokenizer(skip_special)
    return [*(detokenizer.push(index) for index in ids), detokenizer.finish()]


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 599), max_size=30), skip=st.booleans())
def test_streamed_text_is_decoded_text(smollm: Tokenizer, ids: list[int], skip: bool) -> None:
    text = "".join(stream(smollm, ids, skip))
    assert text == smollm.decode(ids, skip) == oracle().decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_stream_never_shows_half_a_character(smollm: Tokenizer, text: str) -> None:
    shown = ""
    for piece in stream(smollm, smollm.encode(text)):
        shown += piece
        assert text.startswith(shown)
    assert shown == text


def test_stream_gives_a_character_when_it_is_whole(smollm: Tokenizer) -> None:
    rainbow = [smollm.token_id(character) for character in "ðŁĮĪ"]
    assert None not in rainbow
    assert stream(smollm, rainbow) == ["", "", "", "🌈", ""]
    assert stream(smollm, rainbow[:2]) == ["", "", "\ufffd"]
    assert b"".join(smollm.token_bytes(index) for index in rainbow) == "🌈".encode()


def test_ids_outside_the_vocabulary_are_nothing(smollm: Tokenizer) -> None:
    ids = smollm.encode("sky")
    assert smollm.decode([-1, *ids, 10**6, 2**40]) == "sky"
    assert stream(smollm, [-1, *ids, 10**6]) == ["", *[smollm.decode([i]) for i in ids], "", ""]


def sentencepiece_like(strip: bool) -> tokenizers.Tokenizer:
    """Llama 2's kind of tokenizer.json (with `strip`) or Gemma's."""
    pieces = [
        "<unk>",
        "<s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "s",
        "k",
        "y",
        "▁s",
        "▁sk",
        "▁sky",
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    library = tokenizers.Tokenizer(
        models.BPE(vocabulary, [("▁", "s"), ("▁s", "k"), ("▁sk", "y")], byte_fallback=True, unk_token="<unk>")
    )
    steps: list[Any] = [normalizers.Prepend("▁")] if strip else []
    library.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tail = [decoders.Strip(" ", 1, 0)] if strip else []
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
    )
    library.add_special_tokens(["<unk>", "<s>"])
    return library


@pytest.mark.parametrize("strip", [True, False])
def test_stream_of_sentencepiece(tmp_path: Path, strip: bool) -> None:
    library = sentencepiece_like(strip)
    ours = Tokenizer.from_file(write_folder(tmp_path / "model", library))
    for text in ("sky", " sky", "  sky é🌈", "é", "", "\n sky"):
        ids = ours.encode(text)
        assert ids == ids_of(library, text)
        assert "".join(stream(ours, [1, *ids])) == ours.decode([1, *ids]) == library.decode([1, *ids]) == text
    assert ours.token_bytes(2 + 0xE9) == b"\xe9"
    assert ours.token_bytes(ours.token_id("▁sky") or 0) == b" sky"


def metaspace() -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(
        models.BPE({"▁": 0, "s": 1, "▁s": 2, "<unk>": 3}, [("▁", "s")], unk_token="<unk>")
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    library.decoder = decoders.Metaspace(prepend_scheme="first")
    return library


def wordpiece() -> tokenizers.Tokenizer:
    words = ["[UNK]", "sky", "##s", "blue", "##ish", ",", "é"]
    library = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    library.add_special_tokens(["[UNK]"])
    return library


@pytest.mark.parametrize(
    ("library", "count"), [(metaspace(), 3), (wordpiece(), 7)], ids=["metaspace", "wordpiece"]
)
def test_stream_of_other_decoders(tmp_path: Path, library: tokenizers.Tokenizer, count: int) -> None:
    ours = Tokenizer.from_file(write_folder(tmp_path / "model", library))

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, count - 1), max_size=12))
    def check(ids: list[int]) -> None:
        assert "".join(stream(ours, ids)) == ours.decode(ids) == library.decode(ids, skip_special_tokens=True)

    check()


# --------------------------------------------------------------------------------------------- cache


class NoArrays(dict[str, Any]):
    """Metadata whose arrays must not be decoded."""

    def get(self, key: str, default: Any = None) -> Any:
        value = super().get(key, default)
        assert not isinstance(value, list), f"{key} was decoded"
        return value


def test_second_load_comes_from_the_cache(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "v.gguf", vocabulary_keys())
    first = Tokenizer.from_file(path)
    again = Tokenizer(*read_gguf_tokenizer(path, NoArrays(vocabulary_keys())))
    text = "<|im_start|>The sky, 東京 2026 <tool>"
    assert again.encode(text) == first.encode(text)
    assert again.encode(text, parse_special=True) == first.encode(text, parse_special=True)
    assert (again.eos_ids, again.special_ids) == (first.eos_ids, first.special_ids)


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"0" * 64 + b"\n{}", None], ids=["empty", "short", "sum", "bit"]
)
def test_damaged_cache_is_built_again(tmp_path: Path, damage: bytes | None) -> None:
    path = write_gguf(tmp_path / "v.gguf", vocabulary_keys())
    expected = Tokenizer.from_file(path).encode("The sky is blue")
    (cached,) = (tmp_path / "cache" / "tokenizers").iterdir()
    good = cached.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    cached.write_bytes(bytes(flipped) if damage is None else damage)
    assert Tokenizer.from_file(path).encode("The sky is blue") == expected
    assert cached.read_bytes() == good


def test_changed_file_is_built_again(tmp_path: Path) -> None:
    keys = vocabulary_keys()
    path = write_gguf(tmp_path / "v.gguf", keys)
    assert Tokenizer.from_file(path).eos_ids == {0, 2}
    swapped = list(keys["tokenizer.ggml.tokens"])
    a, b = swapped.index("a"), swapped.index("b")
    swapped[a], swapped[b] = "b", "a"
    for tokens, text in ((swapped, "b"), (keys["tokenizer.ggml.tokens"], "a")):
        write_gguf(path, keys | {"tokenizer.ggml.tokens": tokens}, age_s=30)
        assert Tokenizer.from_file(path).token_text(a) == text
    # Within one tick of its clock a file can change and look the same: one that is so new is not cached.
    now_s = time.time()
    for tokens, text in ((swapped, "b"), (keys["tokenizer.ggml.tokens"], "a")):
        write_gguf(path, keys | {"tokenizer.ggml.tokens": tokens})
        os.utime(path, (now_s, now_s))
        assert Tokenizer.from_file(path).token_text(a) == text


def test_cache_is_bounded_and_may_be_unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_cache, "_KEPT_FILES", 3)
    for index in range(6):
        Tokenizer.from_file(write_gguf(tmp_path / f"{index}.gguf", vocabulary_keys()))
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 3
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("RIDGELINE_CACHE", str(blocked))
    assert Tokenizer.from_file(tmp_path / "0.gguf").encode("sky")


# -------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"ggml__model": None}, "no vocabulary"),
        ({"ggml__model": "t5"}, "tokenizer.ggml.model, is 't5'; accepted: 'gpt2'"),
        ({"ggml__model": "llama"}, "tokenizer.ggml.scores is missing"),
        ({"ggml__pre": "no-such-rules"}, r"'no-such-rules'; accepted: .*gpt-2, .*smollm"),
        ({"ggml__tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"ggml__tokens": [1, 2]}, "tokenizer.ggml.tokens is missing or not a list of strings"),
        ({"ggml__tokens": ["a", "b", "a"]}, "'a' stands twice"),
        ({"ggml__merges": ["ab"]}, "merge 'ab'"),
        ({"ggml__merges": ["no such", "tok en"]}, "out of vocabulary"),
        ({"ggml__token_type": [1, 1]}, "a type for each"),
        ({"ggml__eos_token_id": 9999}, "eos_token_id is 9999; accepted: token ids 0 to"),
        ({"ggml__add_bos_token": "yes"}, "add_bos_token is 'yes'"),
    ],
)
def test_damaged_vocabularies_are_refused(tmp_path: Path, changes: dict[str, Any], seen: str) -> None:
    with pytest.raises(CheckpointError, match=seen) as caught:
        of_gguf(tmp_path / "v.gguf", **changes)
    assert "\n" not in str(caught.value)


def test_missing_name_of_rules_means_default(tmp_path: Path) -> None:
    unnamed = of_gguf(tmp_path / "a.gguf", ggml__pre=None)
    default = of_gguf(tmp_path / "b.gguf", ggml__pre="default")
    text = "It's 12345, $9.99 (naïve)\n\n"
    assert unnamed.encode(text) == default.encode(text)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"model": {"type": "BPE"}}', b"\xff\xfe"])
def test_damaged_tokenizer_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged") as caught:
        Tokenizer.from_file(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Tokenizer.from_file(tmp_path / "nothing.gguf")
    with pytest.raises(CheckpointError, match=r"not a tokenizer\.json"):
        Tokenizer.from_file(tmp_path / "vocab.json")


# ------------------------------------------------------------------------------------------ defaults


def test_sampling_defaults(tmp_path: Path) -> None:
    class Folder:
        kind, path, metadata = "safetensors", tmp_path, {}  # type: ignore[var-annotated]

        def __init__(self, config: object) -> None:
            self.config = config

        def sidecar(self, name: str) -> bytes | None:
            return json.dumps(self.config).encode() if name == "generation_config.json" else None

    chosen = {"temperature": 0.6, "top_p": 0.95, "top_k": None, "eos_token_id": 2, "do_sample": True}
    assert generation_defaults(Folder(chosen)) == {"temperature": 0.6, "top_p": 0.95}
    assert generation_defaults(Folder({"do_sample": False, "top_k": 5})) == {"temperature": 0.0}
    careful = {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.1}
    assert generation_defaults(Folder(careful)) == {"temperature": 0.0, "repetition_penalty": 1.1}
    with pytest.raises(CheckpointError, match="recommended top_p is 7"):
        generation_defaults(Folder({"top_p": 7}))
    keys = {
        "general.sampling.temp": 0.7,
        "general.sampling.top_k": 20,
        "general.sampling.penalty_repeat": 1.1,
    }
    with open_checkpoint(write_gguf(tmp_path / "v.gguf", keys)) as checkpoint:
        assert generation_defaults(checkpoint) == {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1}


def test_default_model(default_model_path: Path) -> None:
    ours = Tokenizer.from_file(default_model_path)
    assert ours.vocab_size == 49152
    assert (ours.bos_id, ours.eos_id, ours.eos_ids) == (1, 2, {0, 2})
    # As llama.cpp tokenizes it.
    ids = [4898, 314, 260, 6376, 4461, 47]
    assert ours.encode("Why is the sky blue?", add_special=True) == ids
    assert ours.decode(ids) == "Why is the sky blue?"
    assert ours.encode("<|im_end|>") != ours.encode("<|im_end|>", parse_special=True) == [2]


def test_tokenizer_is_read_without_its_cache_folder(tmp_path: Path, smollm: Tokenizer) -> None:
    path = write_gguf(tmp_path / "v.gguf", vocabulary_keys())
    Tokenizer.from_file(path)
    (cached,) = (tmp_path / "cache" / "tokenizers").iterdir()
    os.unlink(cached)  # noqa: PTH108
    assert Tokenizer.from_file(path).encode("sky") == smollm.encode("sky")
