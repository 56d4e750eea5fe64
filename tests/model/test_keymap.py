"""Rules between disk and core, both ways, on the shapes real families need."""

from __future__ import annotations

import pytest
import torch

from llmctl.model.keymap import Rename, Rule, Split, Stack, Unpair, to_core, to_disk

E, V = 4, 7


def gpt2_like() -> tuple[dict[str, torch.Tensor], tuple[Rule, ...]]:
    """Fused, transposed projections, as GPT-2's Conv1D stores them."""
    disk = {"wte.weight": torch.randn(V, E)}
    for layer in range(2):
        disk[f"h.{layer}.attn.c_attn.weight"] = torch.randn(E, 3 * E)
        disk[f"h.{layer}.attn.c_attn.bias"] = torch.randn(3 * E)
        disk[f"h.{layer}.mlp.c_fc.weight"] = torch.randn(E, 2 * E)
    parts = tuple(f"layers.{{i}}.{name}_proj" for name in "qkv")
    return disk, (
        Rename("wte.weight", "embed.weight"),
        Split("h.{i}.attn.c_attn.weight", tuple(f"{p}.weight" for p in parts), dim=1, transpose=True),
        Split("h.{i}.attn.c_attn.bias", tuple(f"{p}.bias" for p in parts)),
        Rename("h.{i}.mlp.c_fc.weight", "layers.{i}.up.weight", transpose=True),
    )


def grouped_like() -> tuple[dict[str, torch.Tensor], tuple[Rule, ...]]:
    """One matrix for queries, keys and values of unequal width, as in Phi-3."""
    disk = {"layers.0.qkv.weight": torch.randn(8 + 2 + 2, E)}
    names = tuple(f"layers.{{i}}.{name}.weight" for name in ("q", "k", "v"))
    return disk, (Split("layers.{i}.qkv.weight", names, sizes=(8, 2, 2)),)


def experts_like() -> tuple[dict[str, torch.Tensor], tuple[Rule, ...]]:
    """One tensor an expert on disk, stacked in the core, as in Mixtral."""
    disk = {f"layers.{i}.experts.{e}.w1.weight": torch.randn(3, E) for i in range(2) for e in range(12)}
    disk["norm.weight"] = torch.randn(E)
    return disk, (Stack("layers.{i}.experts.{e}.w1.weight", "layers.{i}.experts.up", count=12),)


def turned_like() -> tuple[dict[str, torch.Tensor], tuple[Rule, ...]]:
    """Rows of rotary pairs side by side, in the last rows of each head, as in DeepSeek-V3."""
    disk = {f"layers.{i}.q.weight": torch.randn(3 * 10, E) for i in range(2)} | {"kv.bias": torch.randn(10)}
    return disk, (
        Unpair("layers.{i}.q.weight", "layers.{i}.q.weight", head=10, rotary=6),
        Unpair("kv.bias", "kv.bias", head=10, rotary=8),
    )


def core_of(disk: dict[str, torch.Tensor], rules: tuple[Rule, ...]) -> dict[str, torch.Tensor]:
    core: dict[str, torch.Tensor] = {}
    for step in to_core(sorted(disk), rules):
        core |= step.load([disk[name] for name in step.disk])
    return core


CASES = {"turned": turned_like, "gpt2": gpt2_like, "grouped": grouped_like, "experts": experts_like}


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_is_exact(name):
    disk, rules = CASES[name]()
    back = to_disk(core_of(disk, rules), rules)
    assert back.keys() == disk.keys()
    assert all(torch.equal(back[key], disk[key]) and back[key].is_contiguous() for key in disk)


def test_split_and_transpose_put_the_right_numbers_in_place():
    disk, rules = gpt2_like()
    core = core_of(disk, rules)
    fused = disk["h.1.attn.c_attn.weight"]
    x = torch.randn(5, E)
    for index, name in enumerate("qkv"):
        weight = core[f"layers.1.{name}_proj.weight"]
        expected = (x @ fused)[:, index * E : (index + 1) * E]
        torch.testing.assert_close(torch.nn.functional.linear(x, weight), expected)


def test_stack_orders_experts_by_number_not_by_text():
    disk, rules = experts_like()
    stacked = core_of(disk, rules)["layers.1.experts.up"]
    assert stacked.shape == (12, 3, E)
    assert torch.equal(stacked[10], disk["layers.1.experts.10.w1.weight"])


def test_pairs_side_by_side_become_halves():
    """Row r of each head is named by its number: x and y of a pair are 3 apart in the core, 1 apart on disk."""
    disk, rules = turned_like()
    disk["layers.0.q.weight"] = torch.arange(30.0)[:, None].expand(30, E).contiguous()
    first = core_of(disk, rules)["layers.0.q.weight"][:, 0].view(3, 10)
    assert first[0].tolist() == [0, 1, 2, 3, 4, 6, 8, 5, 7, 9]
    assert torch.equal(first[2], first[0] + 20)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_says_whether_it_copies(name):
    """What does not copy stays in the memory of the file; so a loader may leave it mapped."""
    disk, rules = CASES[name]()
    for step in to_core(disk, rules):
        parts = [disk[name] for name in step.disk]
        known = {part.untyped_storage().data_ptr() for part in parts}
        for value in step.load(parts).values():
            if value.numel():
                assert (value.untyped_storage().data_ptr() not in known) == step.rule.copies, step


def test_names_without_a_rule_stay():
    steps = to_core(["a.weight", "b.0.c"], (Rename("x.{i}", "y.{i}"),))
    assert [step.core for step in steps] == [("a.weight",), ("b.0.c",)]


@pytest.mark.parametrize(
    "rule",
    [
        Rename("a", "b", transpose=True),
        Split("a", ("b", "c"), sizes=(2, 4)),
        Split("a", ("b", "c"), dim=1, transpose=True),
        Unpair("a", "b", head=6, rotary=4),
    ],
    ids=repr,
)
def test_rows_go_where_the_outputs_of_the_matrix_go(rule: Rule) -> None:
    """A low-rank update of the matrix on disk is one of the core's: b is cut, a is shared."""
    a, b = torch.randn(2, 5), torch.randn(6, 2)
    stored_in_out = getattr(rule, "transpose", False)
    whole = (b @ a).T if stored_in_out else b @ a
    for part, rows in zip(rule.load([whole]), rule.split_rows(b), strict=True):
        torch.testing.assert_close(rows @ a, part)
    assert torch.equal(rule.join_rows(rule.split_rows(b)), b)
