"""What PEFT and TRL do with the core, and with the folders it saves."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from llmctl.model.checkpoint import load_model, new_model, save_model
from llmctl.recipe.model import ModelSection

SPEC = ModelSection(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
WORDS = ["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture
def tokenizer():
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="z"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="z"
    )


@pytest.fixture
def folder(tmp_path, tokenizer):
    save_model(new_model(SPEC, seed=0, eos_token_id=1, pad_token_id=0), tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def opened(how: str, folder):
    return load_model(folder) if how == "ours" else AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("how", ["ours", "auto"])
def test_lora_is_saved_reloaded_and_merged(how, folder, tmp_path):
    x = torch.randint(2, 28, (2, 9))
    model = get_peft_model(
        opened(how, folder), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.2)
        expected = model.eval()(input_ids=x).logits
        assert not torch.allclose(expected, opened(how, folder)(x).logits, atol=1e-2)
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(opened(how, folder), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(input_ids=x).logits, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(again.merge_and_unload()(x).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["ours", "auto"])
def test_one_dpo_step(how, folder, tokenizer, tmp_path):
    rows = [
        {"prompt": "a b c", "chosen": " d e", "rejected": " f g"},
        {"prompt": "b", "chosen": " c", "rejected": " x"},
    ]
    arguments = DPOConfig(
        str(tmp_path / "dpo"), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        opened(how, folder),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(
        0.6931, abs=1e-3
    )  # ln 2: nothing learned yet
    moved = [w for n, w in trainer.model.named_parameters() if "lora_B" in n and w.requires_grad]
    assert moved and all(weight.any() for weight in moved)


def test_sft_on_finished_rows_trains_the_same_as_transformers(folder, tokenizer, tmp_path):
    rows = [{"input_ids": list(range(2, 12)), "labels": [-100] * 4 + list(range(6, 12))} for _ in range(4)]
    losses = {}
    for how in ("ours", "auto"):
        arguments = SFTConfig(
            str(tmp_path / how), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
            use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1, bf16=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        trainer = SFTTrainer(
            opened(how, folder),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
        losses[how] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses["ours"] == pytest.approx(losses["auto"], abs=1e-4)
    assert losses["ours"][-1] < losses["ours"][0]
