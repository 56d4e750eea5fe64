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


# kinds of models that no architecture of transformers has
OURS_ALONE = {
    "experts": {
        "experts": {"kind": "sparse", "num_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 16}
    },
    "sparse attention": {
        "pattern": ["band+global", "routing"],
        "sliding_window": 3,
        "num_global_tokens": 1,
        "routing": {"num_clusters": 3, "chunk_size": 4},
    },
    "state space": {
        "pattern": ["mamba2", "full"],
        "ssm": {"state_size": 8, "head_dim": 8, "chunk_size": 4},
    },
}


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", OURS_ALONE)
def test_three_steps_of_sft_on_what_only_we_have(kind, adapted, tokenizer, tmp_path):
    """Through the Auto classes and TRL: the loss falls, what is trained moves, and the result reads back."""
    spec = ModelSection(**(SPEC.model_dump(exclude_unset=True) | OURS_ALONE[kind] | {"family": "llmctl"}))
    folder = tmp_path / "m"
    save_model(new_model(spec, seed=0, eos_token_id=1, pad_token_id=0), folder)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "LlmctlForCausalLM" and model.config.model_type == "llmctl"
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    rows = [{"input_ids": [*list(range(2, 14)), 1], "labels": [*list(range(2, 14)), 1]}] * 6
    arguments = SFTConfig(
        str(tmp_path / "sft"), max_steps=3, per_device_train_batch_size=2, learning_rate=3e-2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True}, lr_scheduler_type="constant", bf16=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if adapted else None,
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.01
    if kind == "experts":
        assert all(row["aux_loss"] > 0 for row in trainer.state.log_history if "loss" in row)
    moved = [
        name
        for name, weight in trainer.model.named_parameters()
        if weight.requires_grad
        and ("lora_B" in name or not adapted)
        and not torch.equal(weight, before[name] if not adapted else torch.zeros_like(weight))
    ]
    assert len(moved) > 8
    trainer.model.save_pretrained(tmp_path / "out")
    x = torch.arange(2, 12)[None]
    expected = trainer.model.eval()(input_ids=x).logits
    again = AutoModelForCausalLM.from_pretrained(folder if adapted else tmp_path / "out")
    again = PeftModel.from_pretrained(again, tmp_path / "out") if adapted else again
    torch.testing.assert_close(again.eval()(input_ids=x).logits, expected, atol=1e-6, rtol=1e-6)
    made = again.generate(input_ids=x, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert made.shape == (1, 15)
