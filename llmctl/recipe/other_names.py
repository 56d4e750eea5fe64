"""What other tools call a setting: the arguments of transformers, TRL, PEFT, Axolotl, Unsloth, LLaMA-Factory, nanoGPT.

`--lr 2e-4` and `lr=2e-4` are answered with the field they mean. Only here; nothing of it is accepted as a setting.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Meant:
    """A field by its path, what to set it to (None: what was given to the other name), and what differs."""

    field: str
    value: str | None = None
    note: str = ""


BATCH = ("train.per_device_train_batch_size", "score.batch_size", "eval.batch_size", "compare.batch_size")
LENGTH = ("data.max_length", "score.max_length", "eval.max_length", "compare.max_length")
DTYPE = ("train.dtype", "eval.dtype", "score.dtype", "compare.dtype", "generate.dtype", "chat.dtype", "dtype")
DATA = ("data.train", "score.data", "eval.data", "compare.data")
NEW_TOKENS = ("generate.max_new_tokens", "chat.max_new_tokens", "compare.max_new_tokens")

# Field or fields, the first of which that a stage has is meant <- names of it elsewhere. A name that ends a field's
# path (`learning_rate`, `packing`) is found without a line here.
NAMES: dict[tuple[str, ...], str] = {
    ("train.learning_rate",): "lr max_lr peak_lr",
    ("train.num_train_epochs",): "epochs num_epochs n_epochs epoch",
    BATCH: "batch_size bs micro_batch_size train_batch_size per_device_batch_size",
    ("train.per_device_eval_batch_size",): "eval_batch_size val_batch_size",
    (
        "train.gradient_accumulation_steps",
    ): "grad_accum grad_accumulation gradient_accumulation accumulate_grad_batches",
    ("train.max_steps",): "steps num_steps max_iters num_train_steps total_steps",
    ("train.lr_scheduler_type",): "lr_scheduler scheduler schedule",
    ("train.warmup_ratio",): "warmup",
    ("train.weight_decay",): "wd",
    ("train.max_grad_norm",): "gradient_clipping grad_clip clip_grad_norm",
    ("train.adam_beta1",): "beta1",
    ("train.adam_beta2",): "beta2",
    ("train.adam_epsilon",): "adam_eps eps",
    ("train.eval_steps",): "eval_interval eval_every",
    ("train.save_steps",): "save_interval save_every",
    ("train.logging_steps",): "log_interval log_every log_steps",
    ("train.gradient_checkpointing",): "use_gradient_checkpointing activation_checkpointing",
    ("train.torch_compile",): "compile",
    ("train.seed", "generate.seed", "chat.seed"): "random_seed random_state",
    (
        "train.threads",
        "generate.threads",
        "chat.threads",
        "eval.threads",
        "score.threads",
        "compare.threads",
    ): ("num_threads n_threads cpu_threads"),
    ("lora.r",): "lora_r lora_rank rank",
    ("lora.alpha",): "lora_alpha",
    ("lora.dropout",): "lora_dropout",
    ("lora.target_modules",): "lora_target_modules lora_target lora_modules",
    ("method",): "adapter finetuning_type peft_method",
    LENGTH: "max_seq_length max_seq_len max_len seq_len seq_length sequence_len sequence_length cutoff_len model_max_length context_length",
    DATA: "dataset datasets dataset_name dataset_path train_file train_data data_path",
    ("data.eval",): "eval_file eval_dataset validation_file val_data valid_data test_datasets",
    ("data.eval_fraction",): "val_set_size val_size test_size validation_split",
    ("data.text_field", "eval.text_field", "compare.text_field"): "dataset_text_field text_column text_key",
    ("data.packing",): "sample_packing pack",
    ("data.template",): "chat_template",
    ("out",): "output_dir output save_dir out_dir",
    ("base",): "model_name_or_path model_name base_model pretrained_model_name_or_path model_path",
    DTYPE: "torch_dtype precision mixed_precision",
    NEW_TOKENS: "max_tokens num_predict n_predict",
    ("generate.temperature", "chat.temperature"): "temp",
    ("chat.system",): "system_prompt",
    ("quantize.bits",): "wbits w_bit quantization_bit num_bits",
    ("quantize.group_size",): "groupsize q_group_size",
    ("dpo.beta",): "dpo_beta pref_beta",
    ("dpo.loss_type",): "pref_loss",
    ("model.hidden_size",): "n_embd d_model dim hidden_dim embed_dim",
    ("model.num_hidden_layers",): "n_layer n_layers num_layers depth",
    ("model.num_attention_heads",): "n_head n_heads num_heads",
    ("model.num_key_value_heads",): "n_kv_heads num_kv_heads n_kv_head",
    ("model.max_position_embeddings",): "n_ctx n_positions context_window",
}

# names that mean a value of a field, or count otherwise than the field does
FIXED: dict[str, tuple[tuple[str, ...], str | None, str]] = {
    "warmup_steps": (("train.warmup_ratio",), "0.03", "a share of the steps"),
    "warmup_iters": (("train.warmup_ratio",), "0.03", "a share of the steps"),
    "min_lr": (("train.min_lr_ratio",), "0.1", "a share of the peak"),
    "bf16": (DTYPE, "bfloat16", ""),
    "fp16": (DTYPE, "bfloat16", "float16 is not trained in"),
    "load_in_4bit": (("method",), "qlora", ""),
    "use_4bit": (("method",), "qlora", ""),
    "use_lora": (("method",), "lora", ""),
    "use_peft": (("method",), "lora", ""),
    "full_finetuning": (("method",), "full", ""),
    "train_on_inputs": (("data.mask_prompt",), "false", "true masks the prompt"),
    "train_on_prompt": (("data.mask_prompt",), "false", "true masks the prompt"),
    "completion_only_loss": (("data.mask_prompt",), "true", ""),
    "assistant_only_loss": (("data.mask_prompt",), "true", ""),
    "do_sample": (("generate.temperature", "chat.temperature"), "0.8", "0 picks the likeliest token"),
}
_FIELDS = {name: fields for fields, names in NAMES.items() for name in names.split()}


def meant_by(name: str, fields: Collection[str]) -> Meant | None:
    """The field that a name of another tool, or the last part of a field's path, stands for.

    Args:
        name: as written: `lr`, `--learning-rate`.
        fields: paths of the fields that the stage has.
    """
    key = name.lstrip("-").replace("-", "_").lower()
    own = [field for field in fields if "." in field and field.rpartition(".")[2] == key]
    if len(own) == 1:
        return Meant(own[0])
    candidates, value, note = FIXED.get(key, (_FIELDS.get(key, ()), None, ""))
    found = next((field for field in candidates if field in fields), None)
    return None if found is None else Meant(found, value, note)
