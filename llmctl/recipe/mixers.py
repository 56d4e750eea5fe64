"""Sections of `model.*` that belong to one way of mixing tokens."""

from __future__ import annotations

from llmctl.recipe.base import Section, about
from llmctl.recipe.ranges import MOST_PARTS, MOST_TOKENS, MOST_WIDTH


class MlaSection(Section):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values from one small vector a token."""

    q_lora_rank: int | None = about("model.mla.q_lora_rank", None, gt=0, le=MOST_WIDTH)
    kv_lora_rank: int = about("model.mla.kv_lora_rank", 64, gt=0, le=MOST_WIDTH)
    qk_nope_head_dim: int = about("model.mla.qk_nope_head_dim", 32, gt=0, le=MOST_WIDTH)
    qk_rope_head_dim: int = about("model.mla.qk_rope_head_dim", 16, gt=0, le=MOST_WIDTH)
    v_head_dim: int = about("model.mla.v_head_dim", 32, gt=0, le=MOST_WIDTH)


class RoutingSection(Section):
    """Routing attention: tokens see their own k-means cluster (Roy et al. 2020, arXiv:2003.05997)."""

    num_clusters: int = about("model.routing.num_clusters", 8, gt=1, le=MOST_PARTS)
    chunk_size: int = about("model.routing.chunk_size", 64, gt=0, le=MOST_TOKENS)
    decay: float = about("model.routing.decay", 0.999, gt=0, lt=1)


class LshSection(Section):
    """Hashed attention with shared queries and keys (Reformer, Kitaev et al. 2020, arXiv:2001.04451)."""

    num_buckets: int = about("model.lsh.num_buckets", 8, gt=1, multiple_of=2, le=MOST_PARTS)
    num_hashes: int = about("model.lsh.num_hashes", 2, gt=0, le=MOST_PARTS)
    chunk_size: int = about("model.lsh.chunk_size", 64, gt=0, le=MOST_TOKENS)


class SsmSection(Section):
    """A state-space layer of the Mamba-2 form (Dao and Gu 2024, arXiv:2405.21060)."""

    state_size: int = about("model.ssm.state_size", 64, gt=0, le=MOST_WIDTH)
    conv_kernel: int = about("model.ssm.conv_kernel", 4, gt=1, le=MOST_TOKENS)
    expand: int = about("model.ssm.expand", 2, gt=0, le=MOST_PARTS)
    head_dim: int = about("model.ssm.head_dim", 32, gt=0, le=MOST_WIDTH)
    n_groups: int = about("model.ssm.n_groups", 1, gt=0, le=MOST_PARTS)
    chunk_size: int = about("model.ssm.chunk_size", 64, gt=0, le=MOST_TOKENS)
    use_bias: bool = about("model.ssm.use_bias", False)
    use_conv_bias: bool = about("model.ssm.use_conv_bias", True)
    time_step_min: float = about("model.ssm.time_step_min", 0.001, gt=0, le=1)
    time_step_max: float = about("model.ssm.time_step_max", 0.1, gt=0, le=1)
    time_step_floor: float = about("model.ssm.time_step_floor", 1e-4, gt=0, le=1)
