# SPDX-License-Identifier: Apache-2.0
"""Converts a LLaMA model from a GGUF file to a Hugging Face directory, for embedded_model.py.

The conversion supports the embedded model alone: the LLaMA architecture and GPT-2's byte-level BPE.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm


def convert(gguf_path: Path, directory: Path) -> None:
    """Write the Hugging Face files of the LLaMA model in `gguf_path` into the existing `directory`."""
    reader = gguf.GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = model_config(fields, tied="output.weight" not in {tensor.name for tensor in reader.tensors})
    bos, eos, pad = config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    special = {
        "bos_token": tokens[bos],
        "eos_token": tokens[eos],
        "pad_token": tokens[pad],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
    }
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad})
    _write_json(directory / "special_tokens_map.json", special)
    _write_json(
        directory / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "chat_template": fields["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
        },
    )
    write_tokenizer(fields, directory / "tokenizer.json")
    tensors = read_tensors(reader, config["num_attention_heads"], config["num_key_value_heads"])
    try:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk too
        raise OSError(str(error)) from error
    # safetensors makes its file readable by the owner alone, but users may share a cache.
    shutil.copymode(directory / "config.json", directory / "model.safetensors")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def model_config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Make the config.json of a LLaMA model from the metadata of a GGUF file."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        # GGUF stores it as a float32, where 1e-5 reads as 9.999999747e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_scaling": None,
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "vocab_size": fields["llama.vocab_size"],
    }


def write_tokenizer(fields: dict[str, Any], path: Path) -> None:
    """Write tokenizer.json: GPT-2's byte-level BPE that splits numbers into digits, as in SmolLM2's training."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in fields["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, token_type in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
            if token_type == gguf.TokenType.CONTROL
        ]
    )
    tokenizer.save(str(path))


def read_tensors(reader: gguf.GGUFReader, num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    """Read all tensors as bfloat16, under the names of Hugging Face's LlamaForCausalLM."""
    heads = {"attn_q": num_heads, "attn_k": num_kv_heads}
    tensors = {}
    for tensor in tqdm(reader.tensors, desc="Converting the GGUF file", unit="tensor"):
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            # ggml interleaves the two halves that rotary embeddings pair; Hugging Face keeps them apart.
            rows, columns = values.shape
            pairs = values.reshape(heads[part], rows // heads[part] // 2, 2, columns)
            values = pairs.swapaxes(1, 2).reshape(rows, columns)
        tensors[_hugging_face_name(tensor.name)] = torch.tensor(values).to(torch.bfloat16)
    return tensors


def _hugging_face_name(name: str) -> str:
    outside_layers = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in outside_layers:
        return outside_layers[name]
    in_layer = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{in_layer[part]}.{kind}"
