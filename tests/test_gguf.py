"""A uniform export as GGUF, under llama.cpp: the same next tokens. Slow: llama-cpp-python compiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ft

pytestmark = pytest.mark.slow

BASE = Path(__file__).parents[1] / ".cache" / "assets" / "smollm2"
PROMPTS = ("The capital of France is", "Water boils at", "def add(a, b):")
MLP = ["gate_proj", "up_proj", "down_proj"]
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def as_gguf(directory: Path, path: Path) -> None:
    """Write a stock Llama with the ``gguf`` package, in float32."""
    import gguf

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer, config = AutoTokenizer.from_pretrained(directory), model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_vocabulary(writer, directory, tokenizer, config.vocab_size)
    writer.add_tensor("token_embd.weight", _array(model.model.embed_tokens.weight))
    writer.add_tensor("output_norm.weight", _array(model.model.norm.weight))
    for i, block in enumerate(model.model.layers):
        for theirs, ours in NAMES.items():
            weight = block.get_submodule(theirs).weight
            if ours in ("attn_q", "attn_k"):  # llama.cpp turns neighbours, transformers halves
                pairs = weight.view(-1, 2, config.head_dim // 2, weight.shape[1])
                weight = pairs.transpose(1, 2).reshape(weight.shape)
            writer.add_tensor(f"blk.{i}.{ours}.weight", _array(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: Any, directory: Path, tokenizer: Any, size: int) -> None:
    import gguf

    words = {i: word for word, i in tokenizer.get_vocab().items()}
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["id"] for token in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([words.get(i, f"<unused {i}>") for i in range(size)])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(size)]
    )
    merges = content["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)


def _array(weight: torch.Tensor) -> np.ndarray[Any, Any]:
    return weight.detach().float().contiguous().numpy()


def test_llama_cpp_goes_on_with_the_same_tokens(tmp_path: Path) -> None:
    import llama_cpp  # not to be skipped: `make test-slow` installs it

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    texts = [f"{prompt} {i}." for i in range(400) for prompt in PROMPTS]
    lowrank_ft.wrap(
        model, "modegpt", ratio=0.1, allocation="uniform", targets=MLP, data=texts, tokenizer=tokenizer,
        calibration={"samples": 12, "gradient_samples": 2, "length": 256},
    )  # fmt: skip
    lowrank_ft.export(model, tmp_path / "stock", "hf-uniform", tokenizer=tokenizer)
    as_gguf(tmp_path / "stock", tmp_path / "model.gguf")
    runner = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, logits_all=False, verbose=False)
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        ours = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
        assert runner.tokenize(prompt.encode(), add_bos=False) == ids
        theirs: list[int] = []
        for token in runner.generate(ids, temp=0.0, reset=True):
            theirs.append(token)
            if len(theirs) == len(ours):
                break
        assert theirs == ours
