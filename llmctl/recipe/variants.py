"""The variants of an architecture, axis by axis: what each does, whose it is, and the words that ask for it.

`llmctl recipe variants` prints these tables, and docs/architectures.md is written from them. What a field means
stands in `words.py`, formulas and shapes in the docstrings of `llmctl/model/`, and what a variant needs and does
not go with is asked of the recipe check (`goes_with.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from llmctl.errors import UserError, nearest, one_of
from llmctl.recipe import papers
from llmctl.recipe.papers import Paper
from llmctl.recipe.words import WORDS


@dataclass(frozen=True)
class Variant:
    """One entry: a sentence, the `key=value` words of a recipe that ask for it, and a paper if there is one."""

    does: str
    recipe: str
    paper: Paper | None

    @property
    def words(self) -> list[str]:
        """The words of `recipe`, one by one."""
        return self.recipe.split(" ")


@dataclass(frozen=True)
class Axis:
    """One choice: the field that makes it, its variants by name, and what is chosen."""

    field: str
    variants: dict[str, Variant]
    about: str


def find_axis(name: str) -> Axis:
    """The axis of that name. Raises UserError with the nearest one, or the one that a variant belongs to."""
    if name in AXES:
        return AXES[name]
    close = nearest(name, list(AXES)) or next((axis for axis in AXES if name in AXES[axis].variants), None)
    raise UserError(
        f"{name}: not one of {one_of(list(AXES))}",
        f"did you mean `{close}`?" if close else "`llmctl recipe variants` prints all",
    )


NORM = {
    "rmsnorm": Variant(
        "divides by the root of the mean square, and scales each channel", "model.norm=rmsnorm", papers.RMS
    ),
    "rmsnorm1p": Variant(
        "rmsnorm with a scale of 1 + weight, which weight decay draws to 1",
        "model.norm=rmsnorm1p",
        papers.GEMMA,
    ),
    "layernorm": Variant(
        "takes the mean away, divides by the deviation, scales and shifts",
        "model.norm=layernorm",
        papers.LAYER_NORM,
    ),
}
NORM_PLACEMENT = {
    "pre": Variant(
        "normalises what a sublayer reads: x + f(norm(x))", "model.norm_placement=pre", papers.PRE_NORM
    ),
    "post": Variant("normalises the sum: norm(x + f(x))", "model.norm_placement=post", papers.TRANSFORMER),
    "sandwich": Variant(
        "normalises what a sublayer reads and what it gives: x + norm(f(norm(x)))",
        "model.norm_placement=sandwich",
        papers.SANDWICH,
    ),
}
POSITION = {
    "rope": Variant(
        "turns pairs of channels of queries and keys, so that scores see distances",
        "model.position=rope",
        papers.ROPE,
    ),
    "learned": Variant(
        "adds a trained vector for each position; ends where its table ends",
        "model.position=learned",
        papers.CONVS2S,
    ),
    "sinusoidal": Variant(
        "adds sines and cosines of the position to the embeddings",
        "model.position=sinusoidal",
        papers.TRANSFORMER,
    ),
    "relative": Variant(
        "adds a trained number for each head and range of distances to the scores",
        "model.position=relative",
        papers.T5,
    ),
    "alibi": Variant(
        "takes distance times a rate of the head from the scores", "model.position=alibi", papers.ALIBI
    ),
    "none": Variant(
        "adds nothing: the causal mask or a recurrent layer tells the order",
        "model.position=none",
        papers.NOPE,
    ),
}
_ROPE = "model.rope_parameters."
ROPE_TYPE = {
    "default": Variant("leaves the angles as published", f"{_ROPE}rope_type=default", papers.ROPE),
    "linear": Variant(
        "divides every position by factor",
        f"{_ROPE}rope_type=linear {_ROPE}factor=4.0",
        papers.INTERPOLATION,
    ),
    "ntk": Variant(
        "raises the base: the slowest pair turns factor times slower, the fastest as before",
        f"{_ROPE}rope_type=ntk {_ROPE}factor=4.0",
        papers.NTK,
    ),
    "yarn": Variant(
        "divides slow pairs by factor, keeps fast ones, blends the others, and sharpens the scores",
        f"{_ROPE}rope_type=yarn {_ROPE}factor=4.0 {_ROPE}original_max_position_embeddings=256",
        papers.YARN,
    ),
    "llama3": Variant(
        "as yarn, blended by wavelength, with the scores as they are",
        f"{_ROPE}rope_type=llama3 {_ROPE}factor=4.0 {_ROPE}low_freq_factor=1.0 {_ROPE}high_freq_factor=4.0 "
        f"{_ROPE}original_max_position_embeddings=256",
        papers.LLAMA3,
    ),
}
ATTENTION = {
    "gqa": Variant("projects the input to queries, keys and values", "model.attention=gqa", papers.GQA),
    "mla": Variant(
        "makes keys and values of all heads from one small vector a token, which alone is cached",
        "model.attention=mla",
        papers.MLA,
    ),
}
HEADS = {
    "mha": Variant(
        "gives each query head keys and values of its own",
        "model.num_attention_heads=4 model.num_key_value_heads=4",
        papers.TRANSFORMER,
    ),
    "gqa": Variant(
        "lets groups of query heads share keys and values",
        "model.num_attention_heads=4 model.num_key_value_heads=2",
        papers.GQA,
    ),
    "mqa": Variant(
        "lets all query heads share one key and value",
        "model.num_attention_heads=4 model.num_key_value_heads=1",
        papers.MQA,
    ),
}
PATTERN = {
    "full": Variant("sees every position", "model.pattern=[full]", papers.TRANSFORMER),
    "sliding": Variant(
        "sees the last sliding_window positions, its own included",
        "model.pattern=[sliding] model.sliding_window=256",
        papers.MISTRAL,
    ),
    "band": Variant(
        "sees less than sliding_window positions to either side",
        "model.pattern=[band] model.sliding_window=256",
        papers.LONGFORMER,
    ),
    "dilated": Variant(
        "sees every dilation-th position, less than sliding_window of them to either side",
        "model.pattern=[dilated] model.sliding_window=32 model.dilation=4",
        papers.LONGFORMER,
    ),
    "global": Variant(
        "lets the first positions see all and be seen by all; the others see themselves",
        "model.pattern=[global] model.num_global_tokens=4",
        papers.ETC,
    ),
    "random": Variant(
        "lets a block see itself and blocks before it that are drawn once and for all",
        "model.pattern=[random] model.block_size=16 model.num_random_blocks=2",
        papers.BIGBIRD,
    ),
    "block": Variant(
        "sees the block of positions that it lies in",
        "model.pattern=[block] model.block_size=64",
        papers.BLOCKWISE,
    ),
}
MIXER = {
    "routing": Variant(
        "attends to tokens of the same k-means cluster, a head its own",
        "model.pattern=[routing] model.routing.num_clusters=8",
        papers.ROUTING,
    ),
    "lsh": Variant(
        "attends to tokens whose hashes agree; a key is its token's query",
        "model.pattern=[lsh] model.lsh.num_buckets=8 model.lsh.num_hashes=2",
        papers.REFORMER,
    ),
    "mamba2": Variant(
        "keeps a state of one size that forgets and is written to at each token",
        "model.pattern=[mamba2]",
        papers.MAMBA2,
    ),
}
FFN = {
    "swiglu": Variant("multiplies up(x) by silu(gate(x)), and projects down", "model.ffn=swiglu", papers.GLU),
    "geglu": Variant("multiplies up(x) by gelu(gate(x)), and projects down", "model.ffn=geglu", papers.GLU),
    "gelu": Variant("takes gelu of up(x), and projects down", "model.ffn=gelu", papers.GELU),
    "gelu_tanh": Variant(
        "takes gelu, approximated by tanh, of up(x), and projects down", "model.ffn=gelu_tanh", papers.GELU
    ),
    "relu": Variant("takes relu of up(x), and projects down", "model.ffn=relu", papers.TRANSFORMER),
    "relu2": Variant("takes relu(up(x)) squared, and projects down", "model.ffn=relu2", papers.PRIMER),
    "none": Variant(
        "leaves the layer to its mixer alone", "model.ffn=none model.pattern=[mamba2]", papers.MAMBA2
    ),
}
EXPERTS = {
    "sparse": Variant("sends a token to its best experts only", "model.experts.kind=sparse", papers.MOE),
    "dense": Variant(
        "sends a token to all experts, weighted by a softmax", "model.experts.kind=dense", papers.MIXTURE
    ),
    "soft": Variant(
        "averages the experts' parameters by the router, and computes one layer",
        "model.experts.kind=soft",
        papers.SMEAR,
    ),
    "slots": Variant(
        "lets experts work on slots, which are averages of a document's tokens",
        "model.experts.kind=slots model.stack=encoder",
        papers.SOFT_MOE,
    ),
    "expert_choice": Variant(
        "lets each expert take its best tokens of a document",
        "model.experts.kind=expert_choice model.stack=encoder",
        papers.EXPERT_CHOICE,
    ),
}
STACK = {
    "decoder": Variant(
        "sees what came before; predicts the next token", "model.stack=decoder", papers.DECODER
    ),
    "encoder": Variant(
        "sees both sides; fills in masked tokens or gives a vector", "model.stack=encoder", papers.BERT
    ),
    "encoder_decoder": Variant(
        "a decoder that reads, besides its own tokens, what an encoder made of others",
        "model.stack=encoder_decoder model.num_decoder_layers=2",
        papers.TRANSFORMER,
    ),
}
_SPARSE, _GPT2 = "model.experts.kind=sparse", "model.norm=layernorm model.position=learned"
_BERT = (
    f"model.stack=encoder {_GPT2} model.norm_placement=post model.embedding_norm=true model.type_vocab_size=2 "
    "model.attention_bias=all model.mlp_bias=true model.ffn=gelu"
)
FAMILY = {
    "auto": Variant("the first family that expresses the model", "model.family=auto", None),
    "llama": Variant(
        "the defaults: rope, rmsnorm, swiglu, full attention", "model.family=llama", papers.LLAMA
    ),
    "mistral": Variant(
        "llama whose layers may all be sliding",
        "model.family=mistral model.pattern=[sliding] model.sliding_window=256",
        papers.MISTRAL,
    ),
    "qwen2": Variant(
        "llama with biases of queries, keys and values",
        "model.family=qwen2 model.attention_bias=qkv",
        papers.QWEN2,
    ),
    "qwen3": Variant(
        "llama with norms of queries and keys", "model.family=qwen3 model.qk_norm=true", papers.QWEN3
    ),
    "gemma2": Variant(
        "rmsnorm1p around each sublayer, geglu, scaled embeddings, capped scores",
        "model.family=gemma2 model.hidden_size=256 model.embedding_multiplier=16.0 model.norm=rmsnorm1p "
        "model.norm_placement=sandwich model.ffn=geglu model.pattern=[sliding,full] model.sliding_window=256 "
        "model.attn_logit_softcapping=50.0 model.final_logit_softcapping=30.0",
        papers.GEMMA2,
    ),
    "phi3": Variant("llama, with projections stored as one", "model.family=phi3", papers.PHI3),
    "gpt2": Variant(
        "learned positions, layernorm, gelu, biases",
        f"model.family=gpt2 {_GPT2} model.attention_bias=all model.mlp_bias=true model.ffn=gelu_tanh",
        papers.GPT2,
    ),
    "mixtral": Variant("llama with sparse experts", f"model.family=mixtral {_SPARSE}", papers.MIXTRAL),
    "qwen3_moe": Variant(
        "qwen3 with sparse experts, after layers without",
        f"model.family=qwen3_moe model.qk_norm=true {_SPARSE} model.experts.first_k_dense_replace=1",
        papers.QWEN3,
    ),
    "deepseek_v3": Variant(
        "latent attention, and sparse experts balanced by a bias, some shared",
        f"model.family=deepseek_v3 model.attention=mla {_SPARSE} model.experts.scoring_func=sigmoid "
        "model.experts.correction_bias=true model.experts.n_shared_experts=1",
        papers.DEEPSEEK3,
    ),
    "mamba2": Variant(
        "state-space layers and nothing else",
        "model.family=mamba2 model.pattern=[mamba2] model.position=none model.ffn=none",
        papers.MAMBA2,
    ),
    "bert": Variant(
        "an encoder normalised after each sublayer, with kinds of tokens",
        f"model.family=bert {_BERT}",
        papers.BERT,
    ),
    "roberta": Variant(
        "bert whose positions begin behind the padding's",
        f"model.family=roberta {_BERT} model.position_offset=2",
        papers.ROBERTA,
    ),
    "t5": Variant(
        "an encoder and a decoder with relative positions and unscaled scores",
        "model.family=t5 model.stack=encoder_decoder model.position=relative model.query_pre_attn_scalar=1.0 "
        "model.ffn=geglu model.tie_word_embeddings=false",
        papers.T5,
    ),
    "llmctl": Variant("every model; opens after `import llmctl.model`", "model.family=llmctl", None),
}


def _options(*entries: tuple[str, str, Paper | None]) -> dict[str, Variant]:
    """(field, value and what it needs, paper) -> entries whose sentences are those of the fields."""
    return {
        field: Variant(WORDS[f"model.{field}"], f"model.{field}={words}", paper)
        for field, words, paper in entries
    }


OPTIONS = _options(
    ("embedding_norm", "true", papers.BERT),
    ("embedding_multiplier", "16.0", papers.TRANSFORMER),
    ("type_vocab_size", "2", papers.BERT),
    ("position_offset", "2 model.position=learned", papers.ROBERTA),
    ("tie_word_embeddings", "false", papers.TYING),
    ("attention_bias", "qkv", papers.QWEN),
    ("mlp_bias", "true", papers.TRANSFORMER),
    ("qk_norm", "true", papers.QK_NORM),
    ("query_pre_attn_scalar", "32.0", papers.GEMMA2),
    ("attn_logit_softcapping", "50.0", papers.GEMMA2),
    ("final_logit_softcapping", "30.0", papers.GEMMA2),
    ("logits_scaling", "4.0", papers.MUP),
    ("hidden_dropout", "0.1", papers.DROPOUT),
    ("attention_dropout", "0.1", papers.DROPOUT),
    ("mla.q_lora_rank", "96 model.attention=mla", papers.MLA),
    ("experts.n_shared_experts", f"1 {_SPARSE}", papers.DEEPSEEK_MOE),
    ("experts.first_k_dense_replace", f"1 {_SPARSE}", papers.DEEPSEEK_MOE),
    ("experts.scoring_func", f"sigmoid {_SPARSE}", papers.DEEPSEEK3),
    ("experts.n_group", f"4 {_SPARSE} model.experts.topk_group=2", papers.DEEPSEEK3),
    ("experts.noisy", f"true {_SPARSE}", papers.MOE),
    ("experts.correction_bias", f"true {_SPARSE}", papers.BALANCE),
    ("experts.router_aux_loss_coef", f"0.01 {_SPARSE}", papers.SWITCH),
    ("experts.router_z_loss_coef", f"0.001 {_SPARSE}", papers.ST_MOE),
    ("experts.routing", "sequence model.experts.kind=soft model.stack=encoder", papers.SMEAR),
)


def _axis(field: str, variants: dict[str, Variant]) -> Axis:
    """An axis about which `words.py` says enough."""
    return Axis(field, variants, WORDS[field])


# in the order in which a token meets them
AXES: dict[str, Axis] = {
    "stack": _axis("model.stack", STACK),
    "position": _axis("model.position", POSITION),
    "rope_type": Axis(
        "model.rope_parameters.rope_type", ROPE_TYPE, "how rotary positions are stretched to longer contexts"
    ),
    "norm": _axis("model.norm", NORM),
    "norm_placement": _axis("model.norm_placement", NORM_PLACEMENT),
    "attention": _axis("model.attention", ATTENTION),
    "heads": _axis("model.num_key_value_heads", HEADS),
    "pattern": Axis(
        "model.pattern", PATTERN, "what a layer of attention sees, by position; kinds are joined by `+`"
    ),
    "mixer": Axis("model.pattern", MIXER, "layers of the same list that mix tokens in another way"),
    "ffn": _axis("model.ffn", FFN),
    "experts": _axis("model.experts.kind", EXPERTS),
    "options": Axis("model", OPTIONS, "single fields that change a kind, or any model"),
    "family": _axis("model.family", FAMILY),
}
