"""The decoder that docs/results compares on: from GGUF to a folder of transformers, and the text that it is asked."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.pretrained_decoder import ARTICLES, articles, convert
from tests.needs import gguf_tokenizers

WIDTH, HEADS, VOCABULARY = 32, 2, ["<unk>", "<s>", "</s>", "a", "b", "ab", "Ġ"]


def write_gguf(path):
    """Write a tiny Llama as GGUF, and return it."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    size = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(VOCABULARY), tie_word_embeddings=False, **size)).eval()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1])  # the first three are control tokens
    writer.add_token_merges(["a b"])
    for name, token in (("bos", 1), ("eos", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(token)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, weight in model.state_dict().items():
        stored = paired(weight) if "q_proj" in name or "k_proj" in name else weight
        target = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(target, stored.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def paired(weight):
    """Turn the rows of a head into the order of GGUF, where a rotation's two rows are neighbours."""
    return weight.reshape(HEADS, 2, WIDTH // HEADS // 2, WIDTH).transpose(1, 2).reshape(WIDTH, WIDTH)


@gguf_tokenizers
def test_a_gguf_file_becomes_a_folder_with_the_same_model(tmp_path):
    model = write_gguf(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path / "folder")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert not hasattr(loaded.config, "quantization_config")
    ids = AutoTokenizer.from_pretrained(tmp_path / "folder")("abb", return_tensors="pt")["input_ids"]
    assert ids[0, -2:].tolist() == [5, 4]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_articles_hold_their_sentences_in_order(tmp_path):
    lines = ["2_1\t1.0\tThird.", "1_2\t-1.0\tSecond.", "1_1\t0.5\tFirst. ", ""]
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    assert articles(tmp_path / "corpus.txt") == "First. Second.\n\nThird.\n"


def test_no_more_articles_than_are_wanted(tmp_path):
    lines = [f"{number}_1\t0.0\tSentence {number}." for number in range(1, 2 * ARTICLES)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    assert articles(tmp_path / "corpus.txt").count("\n\n") == ARTICLES - 1
