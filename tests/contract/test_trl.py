"""TRL's trainers make the adapter themselves, from `peft_config`, and compare with a reference."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from peft_dps import DPSConfig
from peft_dps.errors import EngineError

TOKENS = torch.arange(3, 11).view(1, 8)
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


@pytest.fixture
def options(tmp_path):
    return {
        "output_dir": str(tmp_path), "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip


@pytest.mark.supports("Training", "TRL's `SFTTrainer(peft_config=DPSConfig(...))`")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_sft_trainer(tmp_path, options, tokenizer, variant):
    trl = pytest.importorskip("trl")
    rows = [" ".join(f"w{(start + place) % 37}" for place in range(8)) for start in range(16)]
    trainer = trl.SFTTrainer(
        base(),
        trl.SFTConfig(**options),
        train_dataset=Dataset.from_dict({"text": rows}),
        processing_class=tokenizer,
        peft_config=DPSConfig(stage_steps=2, density=0.5, variant=variant),
    )
    trainer.train()
    status = trainer.model.dps_status()
    assert (status.steps, status.stage_steps, status.cycle, status.frozen_moved) == (8, 2, 2, False)
    assert status.selected_fraction == 0.5
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model()
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    torch.testing.assert_close(loaded(TOKENS).logits, trained(TOKENS).logits, rtol=1e-5, atol=1e-6)


@pytest.fixture
def preferences():
    rows = range(16)
    return Dataset.from_dict(
        {
            "prompt": [f"w{row} w{row + 1}" for row in rows],
            "chosen": [f" w{row + 2} w{row + 3}" for row in rows],
            "rejected": [" w0 w0" for _ in rows],
        }
    )


@pytest.mark.supports("Training", "TRL's `DPOTrainer`, on a plain model or a fresh adapter")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("variant", ["dense", "mix"])
@pytest.mark.parametrize("start", ["plain", "fresh"])
def test_dpo_compares_with_the_base_model(options, tokenizer, preferences, variant, start):
    trl = pytest.importorskip("trl")
    from trl.trainer.utils import use_adapter

    config = DPSConfig(stage_steps=2, density=0.5, variant=variant, task_type="CAUSAL_LM")
    expected, seen = base().eval()(TOKENS).logits, []

    class Probe(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            assert model.training
            with torch.no_grad(), use_adapter(model, "ref" if start == "fresh" else None):
                seen.append(model(TOKENS).logits)

    trainer = trl.DPOTrainer(
        get_peft_model(base(), config) if start == "fresh" else base(),
        args=trl.DPOConfig(**options, bf16=False),
        train_dataset=preferences,
        processing_class=tokenizer,
        peft_config=config if start == "plain" else None,
        callbacks=[Probe()],
    )
    trainer.train()
    status = trainer.model.dps_status("default")
    assert (status.steps, status.cycle, status.frozen_moved) == (8, 2, False)
    assert len(seen) == 8
    for logits in seen:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.refuses(
    "Training",
    "TRL's reference models on a trained adapter (DPO, KTO, GRPO)",
    "TRL copies it by names that only some tuners have; merge it first, and let the trainer make a new one",
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_a_reference_that_was_not_copied_is_refused(options, tokenizer, preferences):
    trl = pytest.importorskip("trl")
    model = get_peft_model(base(), DPSConfig(stage_steps=2, task_type="CAUSAL_LM", init_weights=False))
    model.peft_config["default"].init_weights = True  # of the reference, which has the same configuration
    arguments = {"args": trl.DPOConfig(**options), "train_dataset": preferences, "processing_class": tokenizer}
    trainer = trl.DPOTrainer(model, **arguments)
    with pytest.raises(EngineError, match=r"'ref' holds the pretrained weights.*merge_and_unload"):
        trainer.train()
    trainer.model.base_model.delete_adapter("ref")
    merged = trainer.model.merge_and_unload()
    trainer = trl.DPOTrainer(merged, **arguments, peft_config=DPSConfig(stage_steps=2, task_type="CAUSAL_LM"))
    trainer.train()
    assert trainer.model.dps_status().engaged


def test_adapters_at_rest_have_no_noise_in_the_trainer(tmp_path, options):
    """Such as a reference, which is made the active adapter for a forward in training mode."""
    model = get_peft_model(base(), DPSConfig(stage_steps=2, density=0.5, variant="mix", init_weights=False))
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    expected = model.eval()(TOKENS).logits.detach()
    model.set_adapter("default")
    seen = []

    class Probe(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            model.set_adapter("other")
            seen.append(model.train()(TOKENS).logits.detach())
            model.set_adapter("default")

    rows = [{"input_ids": row, "labels": row} for row in TOKENS.expand(8, 8)]
    trainer = Trainer(model, TrainingArguments(**{**options, "max_steps": 4}), train_dataset=rows, callbacks=[Probe()])
    trainer.train()
    assert len(seen) == 4
    for logits in seen:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    model.set_adapter("other")
    assert not torch.allclose(model.train()(TOKENS).logits, expected, atol=1e-4), "at rest after the training too"
