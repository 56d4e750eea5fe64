"""Architectures that make no sense: said from the recipe alone, before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.program import Program
from tests.stages.bad_input import EXPLAIN, NEW, Bad, cases, check

MODELS = {
    "rows longer than the table of positions": Bad(
        f"{NEW} data.max_length=65 model.position=learned",
        "command line: data.max_length is 65, but model.max_position_embeddings is 64, "
        "and learned positions end there",
        f"{EXPLAIN} every field",
    ),
    "a window beyond the context": Bad(
        f"{NEW} model.pattern=[sliding] model.sliding_window=65",
        "command line: model.sliding_window (65) is larger than the context "
        "(model.max_position_embeddings, 64): such layers would be `full`",
        f"{EXPLAIN} every field",
    ),
    "slots in a decoder": Bad(
        f"{NEW} model.experts.kind=slots",
        "command line: model: experts of kind `slots` look ahead (slots are averages over all tokens of a "
        "document): they go with stack: encoder only",
        f"{EXPLAIN} model",
    ),
    "expert choice in a decoder": Bad(
        f"{NEW} model.experts.kind=expert_choice",
        "command line: model: experts of kind `expert_choice` look ahead (an expert chooses among all tokens of "
        "a document): they go with stack: encoder only",
        f"{EXPLAIN} model",
    ),
    "a kind of layer that is none": Bad(
        f"{NEW} model.pattern=[slidding]",
        "command line: model.pattern.0: `slidding` is not one of `full`, `sliding`, `band`, `dilated`, `global`, "
        "`random`, `block`, `routing`, `lsh`, `mamba2`",
        "did you mean `sliding`?",
    ),
    "a kind of experts that is none": Bad(
        f"{NEW} model.experts.kind=sparce",
        "command line: model.experts: `sparce` is not one of `sparse`, `dense`, `soft`, `slots`, `expert_choice`",
        "did you mean `sparse`?",
    ),
    "a window that no layer has": Bad(
        f"{NEW} model.sliding_window=16",
        "command line: model: sliding_window is set but no layer of pattern is `sliding`, `band`, `dilated`",
        f"{EXPLAIN} model",
    ),
    "heads that do not divide": Bad(
        f"{NEW} model.num_attention_heads=3",
        "command line: model: hidden_size (16) is not a multiple of num_attention_heads (3); "
        "set head_dim to choose a width",
        f"{EXPLAIN} model",
    ),
    "groups that do not divide": Bad(
        f"{NEW} model.num_key_value_heads=3",
        "command line: model: num_attention_heads (2) is not a multiple of num_key_value_heads (3)",
        f"{EXPLAIN} model",
    ),
    "a mixer joined with a pattern": Bad(
        f"{NEW} model.pattern=[sliding+lsh] model.sliding_window=4",
        "command line: model.pattern.0: `sliding+lsh`: `lsh` is a layer of its own and joins no other",
        f"{EXPLAIN} model.pattern",
    ),
    "a union with everything": Bad(
        f"{NEW} model.pattern=[full+block] model.block_size=4",
        "command line: model.pattern.0: `full+block`: `full` sees everything already",
        "drop it or the others",
    ),
    "latent attention without rotation": Bad(
        f"{NEW} model.attention=mla model.position=alibi",
        "command line: model: attention: mla turns part of each key, so position must be rope, not alibi",
        f"{EXPLAIN} model",
    ),
    "more experts a token than there are": Bad(
        f"{NEW} model.experts.kind=sparse model.experts.num_experts_per_tok=9",
        "command line: model: experts.num_experts_per_tok (9) is more than num_experts (8)",
        f"{EXPLAIN} model",
    ),
}


@cases(MODELS)
def test_model(bad: Bad, stocked: Path, llmctl: Program) -> None:
    check(bad, stocked, llmctl)


def test_it_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("stage: pretrain\nmodel: {experts: {kind: slots}}\n", encoding="utf-8")
    program = (
        "import sys\n"
        "from llmctl.errors import UserError\n"
        "from llmctl.recipe.load import check_file\n"
        "from pathlib import Path\n"
        f"try: check_file(Path({str(recipe)!r}))\n"
        "except UserError as error: print(error.message)\n"
        "print('torch' in sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "experts of kind `slots` look ahead" in ended.stdout and ended.stdout.endswith("False\n")
