"""The default model as users get it: its perplexity against llama.cpp's figure and against transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ridgeline import LLM, SamplingParams
from ridgeline.apps.perplexity import Perplexity, Scorer, score_text

CONTEXT = 512
LLAMA_CPP_PERPLEXITY = 19.03
"""llama-perplexity on this file and text: 40 chunks of 512 tokens, llama-cpp-python 0.3.36."""


def perplexity(llm: LLM, text: str, chunks: int) -> Perplexity:
    engine = llm.loaded.engine
    pages = tuple(pool.pages for pool in engine.scheduler.cache.pools)
    scorer = Scorer(engine.executor, engine.handle, pages, llm.config.max_num_batched_tokens)
    return score_text(scorer, llm.tokenizer.encode(text), CONTEXT, chunks)


@pytest.mark.full
def test_perplexity_is_that_of_llama_cpp(default_model_path: Path, wiki_text: Path) -> None:
    with LLM(str(default_model_path)) as llm:
        result = perplexity(llm, wiki_text.read_text("utf-8"), chunks=40)
    assert result.tokens_scored == 40 * (CONTEXT // 2 - 1)
    assert result.perplexity == pytest.approx(LLAMA_CPP_PERPLEXITY, rel=0.005)


def transformers_model(path: Path) -> Any:
    """The file's dequantised weights, by the gguf package, in transformers' Llama."""
    import gguf
    import torch
    import transformers
    from tiny_models import GGUF_LLAMA_NAMES

    reader = gguf.GGUFReader(path)
    field = {key.removeprefix("llama."): value.contents() for key, value in reader.fields.items()}
    config = transformers.LlamaConfig(
        vocab_size=field["vocab_size"],
        hidden_size=field["embedding_length"],
        intermediate_size=field["feed_forward_length"],
        num_hidden_layers=field["block_count"],
        num_attention_heads=field["attention.head_count"],
        num_key_value_heads=field["attention.head_count_kv"],
        rope_parameters={"rope_type": "default", "rope_theta": field["rope.freq_base"]},
        rms_norm_eps=field["attention.layer_norm_rms_epsilon"],
        tie_word_embeddings=True,
    )
    names = {ours: theirs for theirs, ours in GGUF_LLAMA_NAMES.items()}
    state = {}
    for tensor in reader.tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        if tensor.name.startswith("blk."):
            _, layer, stem, leaf = tensor.name.split(".")
            if stem in ("attn_q", "attn_k"):  # rotary pairs back to halves
                value = (
                    value.reshape(-1, config.head_dim // 2, 2, value.shape[1])
                    .swapaxes(1, 2)
                    .reshape(value.shape)
                )
            state[f"model.layers.{layer}.{names[stem]}.{leaf}"] = torch.tensor(value)
    by_name = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors if "blk" not in t.name
    }
    state["model.embed_tokens.weight"] = torch.tensor(by_name["token_embd.weight"])
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state["model.norm.weight"] = torch.tensor(by_name["output_norm.weight"])
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.float().eval()


def test_float32_perplexity_is_that_of_transformers(default_model_path: Path, wiki_text: Path) -> None:
    import torch

    text = wiki_text.read_text("utf-8")[:40_000]
    chunks = 4
    with LLM(str(default_model_path), weights="W32A32") as llm:
        seen = perplexity(llm, text, chunks)
        tokens = llm.tokenizer.encode(text)[: chunks * CONTEXT]
    model = transformers_model(default_model_path)
    total = 0.0
    for begin in range(0, len(tokens), CONTEXT):
        ids = torch.tensor([tokens[begin : begin + CONTEXT]])
        with torch.no_grad():
            logits = model(ids).logits[0, CONTEXT // 2 : -1].double()
        total += torch.nn.functional.cross_entropy(logits, ids[0, CONTEXT // 2 + 1 :], reduction="sum").item()
    assert seen.perplexity == pytest.approx(math.exp(total / seen.tokens_scored), rel=0.0005)


def test_it_answers_a_question(default_model_path: Path) -> None:
    with LLM(str(default_model_path)) as llm:
        question = [{"role": "user", "content": "Name three primary colors."}]
        output = llm.chat(question, SamplingParams(temperature=0, max_tokens=40))[0].outputs[0]
    assert "Red" in output.text
    assert "Blue" in output.text
    assert output.finish_reason == "stop"
