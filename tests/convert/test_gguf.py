"""A .gguf file, written here with weights as they are: what comes out is the model that went in."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from cases import make_model

from bmojo import BMojoLM
from bmojo.convert import ConversionError, convert, export_model
from bmojo.data import Document, train_bpe

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(path, config, tensors, vocabulary):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list(vocabulary["vocab"]))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(vocabulary["vocab"]))
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            prefix = f"blk.{layer}."
        else:
            prefix = ""
        if module in ("self_attn.q_proj", "self_attn.k_proj"):  # the format turns pairs that lie side by side
            heads = tensor.shape[0] // config.head_dim
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{prefix}{NAMES[module]}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_a_gguf_is_read_with_its_tokenizer(tmp_path, config):
    tokenizer = train_bpe([Document("a", "abc abd " * 20)], config.vocab_size, tmp_path / "tokenizer.json")
    model = make_model(config, dtype=torch.float32)
    _, tensors = export_model("llama", config, model.state_dict())
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    write_gguf(tmp_path / "model.gguf", config, tensors, vocabulary)
    done = convert(tmp_path / "model.gguf", tmp_path / "ours")
    assert (done.source_format, done.dtype) == ("llama", "float32")
    back = BMojoLM.load(tmp_path / "ours")
    assert back.config.replace(norm_eps=config.norm_eps, chunk_size=config.chunk_size) == config
    assert back.config.norm_eps == pytest.approx(config.norm_eps)  # stored in float32
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert json.loads((tmp_path / "ours" / "generation_config.json").read_text())["eos_token_id"] == 2
    assert (tmp_path / "ours" / "tokenizer.json").is_file()
    assert tokenizer.vocab_size == config.vocab_size


def test_a_damaged_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF, or so it says")
    with pytest.raises(ConversionError, match="can't be read as a model"):
        convert(tmp_path / "model.gguf", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
