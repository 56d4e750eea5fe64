"""Encoders of BERT's shape: normalised after each sublayer, learned positions, biases everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from llmctl.model.families.row import Family, Inexpressible, require
from llmctl.model.keymap import Rename, Rule
from llmctl.recipe.model import ModelSection

SIZES: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "type_vocab_size": "type_vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "norm_eps": "layer_norm_eps",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
}
FIXED: Mapping[str, Any] = {
    "stack": "encoder",
    "norm": "layernorm",
    "norm_placement": "post",
    "embedding_norm": True,
    "position": "learned",
    "attention_bias": "all",
    "mlp_bias": True,
}


def _read_bert(config: PreTrainedConfig) -> dict[str, Any]:
    if config.is_decoder or config.add_cross_attention:
        raise Inexpressible("is_decoder: True")
    kind = getattr(config, "position_embedding_type", "absolute") or "absolute"
    if kind != "absolute":
        raise Inexpressible(f"position_embedding_type: {kind}")
    if config.classifier_dropout not in (None, config.hidden_dropout_prob):
        raise Inexpressible(
            f"classifier_dropout: {config.classifier_dropout}, other than hidden_dropout_prob"
        )
    return {"max_position_embeddings": config.max_position_embeddings}


def _write_bert(spec: ModelSection) -> dict[str, Any]:
    require(spec, num_key_value_heads=spec.num_attention_heads, position_offset=0)
    if spec.head_dim != spec.hidden_size / spec.num_attention_heads:
        raise Inexpressible(f"head_dim: {spec.head_dim}")
    if not spec.type_vocab_size:
        raise Inexpressible("type_vocab_size: 0")
    return {"max_position_embeddings": spec.max_position_embeddings}


def _read_roberta(config: PreTrainedConfig) -> dict[str, Any]:
    if config.pad_token_id is None:
        raise Inexpressible("pad_token_id: None; positions are counted from it")
    offset = config.pad_token_id + 1
    length = config.max_position_embeddings - offset
    return _read_bert(config) | {"position_offset": offset, "max_position_embeddings": length}


def _write_roberta(spec: ModelSection) -> dict[str, Any]:
    fields = _write_bert(spec.model_copy(update={"position_offset": 0}))
    if not spec.position_offset:
        raise Inexpressible("position_offset: 0")
    return fields | {"max_position_embeddings": spec.max_position_embeddings + spec.position_offset}


def _same_padding(spec: ModelSection, written: dict[str, Any]) -> None:
    pad = written.get("pad_token_id", 1)  # 1 is what the config has when it says nothing
    if pad is None or pad + 1 != spec.position_offset:
        raise Inexpressible(f"position_offset: {spec.position_offset} with pad_token_id: {pad}")


# in both, after `{prefix}.`
_BODY = {
    "embeddings.word_embeddings.weight": "embed_tokens.weight",
    "embeddings.position_embeddings.weight": "positions.weight",
    "embeddings.token_type_embeddings.weight": "embed_types.weight",
    "embeddings.LayerNorm": "embed_norm",
    "encoder.layer.{i}.attention.self.query": "layers.{i}.self_attn.q_proj",
    "encoder.layer.{i}.attention.self.key": "layers.{i}.self_attn.k_proj",
    "encoder.layer.{i}.attention.self.value": "layers.{i}.self_attn.v_proj",
    "encoder.layer.{i}.attention.output.dense": "layers.{i}.self_attn.o_proj",
    "encoder.layer.{i}.attention.output.LayerNorm": "layers.{i}.input_layernorm",
    "encoder.layer.{i}.intermediate.dense": "layers.{i}.mlp.up_proj",
    "encoder.layer.{i}.output.dense": "layers.{i}.mlp.down_proj",
    "encoder.layer.{i}.output.LayerNorm": "layers.{i}.post_attention_layernorm",
}
_BERT_HEADS = {
    "cls.predictions.transform.dense": "transform.dense",
    "cls.predictions.transform.LayerNorm": "transform.norm",
    "cls.predictions.decoder.weight": "lm_head.weight",
    "bert.pooler.dense": "pooler.dense",
    "classifier": "score",
}
_ROBERTA_HEADS = {
    "lm_head.dense": "transform.dense",
    "lm_head.layer_norm": "transform.norm",
    "lm_head.decoder.weight": "lm_head.weight",
    "classifier.dense": "pooler.dense",
    "classifier.out_proj": "score",
}


def _rules(prefix: str, heads: Mapping[str, str], bias: str) -> tuple[Rule, ...]:
    names = {f"{prefix}.{disk}": f"model.{core}" for disk, core in _BODY.items()} | dict(heads)
    names[bias] = "lm_head.bias"
    return tuple(
        Rename(disk + end, core + end)
        for disk, core in names.items()
        for end in ([""] if disk.endswith((".weight", ".bias")) else [".weight", ".bias"])
    )


# the buffer, the head for pairs of sentences, and the pooler where nothing reads it
_SPARE = ("embeddings.position_ids", "seq_relationship.weight", "seq_relationship.bias",
          "pooler.dense.weight", "pooler.dense.bias")  # fmt: skip
# the head's bias has two names: of these the first is read where the head is tied, the second where it is not
_BERT_BIAS = ("cls.predictions.bias", "cls.predictions.decoder.bias")
_ROBERTA_BIAS = ("lm_head.bias", "lm_head.decoder.bias")
_BERT_RULES = [_rules("bert", _BERT_HEADS, bias) for bias in _BERT_BIAS]
_ROBERTA_RULES = [_rules("roberta", _ROBERTA_HEADS, bias) for bias in _ROBERTA_BIAS]


def _either(first: str, second: str) -> dict[str, str]:
    return {first: second, second: first}


ROWS: dict[str, Family] = {
    "bert": Family(
        "Bert",
        sizes=SIZES,
        fixed=FIXED,
        speaks=frozenset({"max_position_embeddings"}),
        acts={"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"},
        rope=False,
        read=_read_bert,
        write=_write_bert,
        rules=lambda spec: _BERT_RULES[not spec.tie_word_embeddings],
        bare="bert.",
        old={
            "LayerNorm.gamma": "LayerNorm.weight",
            "LayerNorm.beta": "LayerNorm.bias",
            **_either(*_BERT_BIAS),
        },
        spare=_SPARE,
    ),
    "roberta": Family(
        "Roberta",
        sizes=SIZES,
        fixed=FIXED,
        speaks=frozenset({"max_position_embeddings", "position_offset"}),
        acts={"gelu": "gelu"},  # the head has it whatever the blocks have
        rope=False,
        read=_read_roberta,
        write=_write_roberta,
        finish=_same_padding,
        rules=lambda spec: _ROBERTA_RULES[not spec.tie_word_embeddings],
        bare="roberta.",
        old=_either(*_ROBERTA_BIAS),
        spare=_SPARE,
    ),
}
