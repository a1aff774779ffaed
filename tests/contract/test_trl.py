"""TRL's `SFTTrainer` makes the adapter itself, from `peft_config`."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_dps import DPSConfig

WORDS = ["<pad>", "<unk>", "<end>", *(f"w{number}" for number in range(37))]


@pytest.fixture
def tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=WORDS[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=WORDS[0], unk_token=WORDS[1], eos_token=WORDS[2]
    )


def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=24, pad_token_id=0, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.supports("Training", "TRL's `SFTTrainer(peft_config=DPSConfig(...))`")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_sft_trainer(tmp_path, tokenizer, variant):
    trl = pytest.importorskip("trl")
    rows = [" ".join(f"w{(start + place) % 37}" for place in range(8)) for start in range(16)]
    trainer = trl.SFTTrainer(
        base(),
        trl.SFTConfig(
            str(tmp_path), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
            save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": rows}),
        processing_class=tokenizer,
        peft_config=DPSConfig(stage_steps=0.25, density=0.5, variant=variant),
    )  # fmt: skip
    trainer.train()
    status = trainer.model.dps_status()
    assert (status.steps, status.stage_steps, status.cycle, status.frozen_moved) == (8, 2, 2, False)
    assert status.selected_fraction == 0.5
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model()
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    tokens = torch.arange(3, 11).view(1, 8)
    torch.testing.assert_close(loaded(tokens).logits, trained(tokens).logits, rtol=1e-5, atol=1e-6)
