"""One forward pass, watched: what every step of a model reads, gives and costs.

The pass is the model's own; hooks look at it and change nothing. Attention weights, which no fast path ever
holds, are computed again from the queries, keys and mask that the mixer noted, and shown only if they give what
the mixer gave (`attention_maps.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmctl.kernels.attention import PLAIN, Scores
from llmctl.model import routers
from llmctl.model.attention_maps import WINDOW, attention_in
from llmctl.model.context import Context, plain_context
from llmctl.model.hf import LlmctlForCausalLM
from llmctl.model.routers import Choice
from llmctl.model.traced import Guess, Layer, Routing, Step, Table, Trace, alike, tables_of

CHANNELS = 64  # numbers of a row that are kept
# what a unit's name, its last part, means; one that is not here goes by its own name
UNITS = {
    "q_proj": "queries",
    "k_proj": "keys",
    "v_proj": "values",
    "qk_proj": "queries, keys",
    "q_norm": "norm of queries",
    "k_norm": "norm of keys",
    "o_proj": "output",
    "q_a_proj": "queries, narrow",
    "q_a_layernorm": "norm",
    "q_b_proj": "queries",
    "kv_a_proj_with_mqa": "latent",
    "kv_a_layernorm": "norm of latent",
    "kv_b_proj": "keys and values",
    "gate_proj": "gate",
    "up_proj": "widen",
    "down_proj": "shrink",
    "gate": "router",
    "in_proj": "input",
    "out_proj": "output",
    "conv1d": "convolution",
}
# model.ffn -> what happens between the wide products and the narrow one
BETWEEN = {
    "swiglu": "silu(gate) · wide",
    "geglu": "gelu(gate) · wide",
    "gelu": "gelu(wide)",
    "gelu_tanh": "gelu(wide)",
    "relu": "max(wide, 0)",
    "relu2": "max(wide, 0)²",
}


@torch.no_grad()
def trace(model: LlmctlForCausalLM, ids: list[int], guesses: int = 10) -> Trace:
    """Run the model on one row of ids and tell what happened; `guesses` next tokens are kept at each place."""
    backbone = model.model
    ctx = plain_context(len(ids), device=model.device)
    watch = Watch(model, ctx)
    try:
        x_1TE = backbone.embed(torch.tensor([ids], device=model.device), ctx)
        logits = model.head(backbone.run(x_1TE, ctx)[:, -1:])[0, 0]
    finally:
        watch.leave()
    for layer in watch.layers:
        assert layer.stream is not None
        layer.guess = _guess(model, layer.stream, guesses)
    entering, every = _last(x_1TE), tables_of("", model)
    told = ("model.layers", "model.norm", "lm_head", "model.positions")
    before = [each for each in every if not each.name.startswith(told)]
    placing = [each for each in every if each.name.startswith("model.positions")]
    return Trace(
        spec=backbone.spec,
        ids=ids,
        window=min(WINDOW, len(ids)),
        embedding=Step("embedding", "model.embed_tokens", before, tuple(x_1TE.shape[1:]), _rms(x_1TE)),
        positions=Step("positions", "model.positions", placing),
        rows=entering[:, :CHANNELS].float().cpu(),
        turns=watch.turns(),
        layers=watch.layers,
        closing=watch.closing,
        lens=_guess(model, entering, guesses),
        logits=logits.float().cpu(),
        parameters=sum(each.parameters for each in every),
        bytes=sum(each.bytes for each in every),
        dtype=_dtypes(every),
    )


def _guess(model: LlmctlForCausalLM, stream_WE: Tensor, guesses: int) -> Guess:
    """The logit lens: final norm and head on a stream that has not gone all the way (nostalgebraist 2020)."""
    norm = model.model.norm
    logits = model.head(stream_WE if norm is None else norm(stream_WE)).float()
    shares, ids = logits.softmax(-1).topk(min(guesses, logits.shape[-1]))
    return Guess(ids.cpu(), shares.cpu())


class Watch:
    """Hooks on a model, and what they see of a pass over one row that `ctx` is about."""

    def __init__(self, model: LlmctlForCausalLM, ctx: Context) -> None:
        self.layers: list[Layer] = []
        self.closing: list[Step] = []
        self.spec, self.ctx = model.model.spec, ctx
        self._notes: dict[int, dict[str, Tensor]] = {}
        # a head that shares the embedding table is told by its name
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        self._tied = tables_of("model.embed_tokens", model.model.embed_tokens) if tied else []
        self._handles: list[Any] = []
        ctx.trace = self._note
        for index, block in enumerate(model.model.layers):
            tables = tables_of(f"model.layers.{index}", block)
            sums = sum(each.parameters for each in tables), sum(each.bytes for each in tables)
            self.layers.append(Layer(index, self.spec.layer_pattern(index), *sums))
            self._watch_block(Sight(self.layers[-1], self), block)
        for name, module in (("model.norm", model.model.norm), ("lm_head", model.lm_head)):
            if module is not None:
                self._after(module, lambda out, n=name, m=module: self._close(n, m, out))

    def leave(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def notes(self, layer: int) -> dict[str, Tensor]:
        """What a layer has noted so far."""
        return self._notes.get(layer, {})

    def turns(self) -> Tensor:
        """See `Trace.turns`."""
        if self.ctx.rotary is None or self.ctx.rotary[0].shape[2] < 2:
            return torch.empty(0)
        cos, sin = (table[0, 0, 1].float().cpu() for table in self.ctx.rotary)
        return torch.atan2(sin, cos)

    def _watch_block(self, sight: Sight, block: nn.Module) -> None:
        self._after(block, sight.end)
        for name, child in block.named_children():
            if not any(True for _ in child.parameters()) and not any(True for _ in child.children()):
                continue
            self._before(child, sight.reads)
            inside = list(units(child, name))
            if [unit for _, unit in inside] != [child]:
                self._before(child, lambda _, n=name, c=child: sight.begin(n, c))
                self._after(child, lambda out, n=name, c=child: sight.mixed(n, c, out), whole=True)
            for inner, unit in inside:
                self._before(unit, lambda x, n=inner: sight.input(n, x))
                self._after(unit, lambda out, n=inner, u=unit: sight.output(n, u, out))

    def _before(self, module: nn.Module, see: Any) -> None:
        self._handles.append(module.register_forward_pre_hook(lambda _, args: see(args[0]) if args else None))

    def _after(self, module: nn.Module, see: Any, whole: bool = False) -> None:
        def hook(_: nn.Module, args: Any, out: Any) -> None:
            see(out if whole or not isinstance(out, tuple) else out[0])

        self._handles.append(module.register_forward_hook(hook))

    def _note(self, layer: int, name: str, tensor: Tensor) -> None:
        self._notes.setdefault(layer, {})[name] = tensor

    def _close(self, name: str, module: nn.Module, out: Tensor) -> None:
        what = "logits" if name == "lm_head" else "norm"
        tables = self._tied if name == "lm_head" and self._tied else tables_of(name, module)
        self.closing.append(Step(what, name, tables, tuple(out.shape[1:]), _rms(out[0])))


class Sight:
    """One block as its hooks see it, in the order of the calls. `x` and `out` are [1, T, …]."""

    def __init__(self, layer: Layer, watch: Watch) -> None:
        self.layer, self.watch = layer, watch
        self.prefix = f"model.layers.{layer.index}"
        self._settings = PLAIN  # of its scores
        self._silent: dict[str, nn.Module] = {}  # its units that have given nothing yet
        self._inside = ""  # the mixer or feed-forward layer that is at work
        self._chosen: Tensor | None = None  # what its router chose
        self._added: Tensor | None = None  # what one of them gave and the stream has not taken up yet

    def reads(self, x: Tensor) -> None:
        """A part of the block reads `x`: the stream, if it is not what the part before gave."""
        if self._added is not None and x is not self._added:
            said = f"stream + {self._inside}"
            self.layer.steps.append(Step("residual", "", [], tuple(x.shape[1:]), _rms(x[0]), said))
            self._added = None

    def begin(self, name: str, module: nn.Module) -> None:
        """A mixer or feed-forward layer begins; parameters that belong to none of its modules come first."""
        self._inside = name
        self._silent = dict(units(module, name))
        settings = vars(module).get("scores")
        self._settings = settings if isinstance(settings, Scores) else PLAIN
        own = tables_of(f"{self.prefix}.{name}", module, recurse=False)
        if own:
            self.layer.steps.append(Step("parameters", name, own))

    def input(self, name: str, x: Tensor) -> None:
        """A unit reads `x`: before the output projection stand the scores, before the last product the gate."""
        last = name.rpartition(".")[2]
        if last == "o_proj":
            self._attend(x)
        elif last == "down_proj" and ".experts." not in name:
            said = BETWEEN.get(self.watch.spec.ffn, self.watch.spec.ffn)
            self.layer.steps.append(Step("activation", "", [], tuple(x.shape[1:]), _rms(x[0]), said))

    def output(self, name: str, unit: nn.Module, out: Tensor) -> None:
        """A unit gave `out`. Experts are told together, when all are done."""
        if ".experts." in name:
            return
        self._silent.pop(name, None)
        what = _what(name, unit)
        tables = tables_of(f"{self.prefix}.{name}", unit)
        if isinstance(out, Choice):
            self._chosen = out.experts
            said = f"{out.experts.shape[1]} experts for each token"
            self.layer.steps.append(Step(what, name, tables, tuple(out.experts.shape), None, said))
            return
        shape = tuple(out.shape[1:]) if out.dim() > 2 else tuple(out.shape)
        self.layer.steps.append(Step(what, name, tables, shape, _rms(out)))

    def mixed(self, name: str, module: nn.Module, out: Any) -> None:
        """A mixer or feed-forward layer is done; experts give what they found of their routing as well."""
        steps, given = self.layer.steps, out[0] if isinstance(out, tuple) else out
        if name.endswith("attn") and not any(each.what == "scores" for each in steps):
            steps.append(Step("scores", said=f"{type(module).__name__} has no attention scores to show"))
        # a unit may be no function but a place for weights, such as the convolution of a state-space layer
        for unit, silent in self._silent.items():
            tables = [] if ".experts." in unit else tables_of(f"{self.prefix}.{unit}", silent)
            if tables:
                steps.append(Step(_what(unit, silent), unit, tables))
        experts = dict(module.named_children()).get("experts")
        if experts is not None:
            above = f"{self.prefix}.{name}.experts"
            each = [t for i, one in experts.named_children() for t in tables_of(f"{above}.{i}", one)]
            shape = tuple(given.shape[1:])
            steps.append(Step("experts", f"{name}.experts", alike(each, above), shape, _rms(given)))
        if isinstance(out, tuple) and isinstance(out[1], routers.Routing):
            self.layer.routing = self._routing(out[1])
        self._added = given

    def _routing(self, found: routers.Routing) -> Routing:
        shares = (found.logits.softmax(-1) if found.shares is None else found.shares).float()
        load = shares.mean(0) if found.load is None else found.load.float() / found.load.sum().clamp(min=1)
        chosen = None if self._chosen is None else self._chosen[-WINDOW:].cpu()
        return Routing(shares[-WINDOW:].cpu(), chosen, load.cpu())

    def end(self, out: Tensor) -> None:
        """The block is done and leaves the stream `out`."""
        self.reads(out)
        self.layer.stream = _last(out)

    def _attend(self, x_BTF: Tensor) -> None:
        """The output projection reads `x`: what came of scores, which are told before it."""
        notes, steps = self.watch.notes(self.layer.index), self.layer.steps
        if not notes.keys() >= {"queries", "keys", "values"}:
            return
        found = attention_in(self._inside, notes, self._settings, self.watch.ctx.bias, x_BTF)
        q, k, v = (notes.pop(name) for name in ("queries", "keys", "values"))
        pairs = self.watch.turns().numel()
        if pairs:
            said = f"queries and keys: {pairs} pairs of channels turned"
            steps.append(Step("positions", "", [], tuple(q.shape[1:]), _rms(q), said))
        if isinstance(found, str):
            steps.append(Step("scores", said=found))
            return
        self.layer.attention.append(found)
        shape = (found.heads, q.shape[2], k.shape[2])
        hidden = f"{found.hidden:,} of {found.pairs:,} pairs hidden"
        shown = found.scores[found.allowed.expand_as(found.scores)]
        bias = " + bias of the distance" if self.watch.ctx.bias is not None else ""
        span = (
            f"queries · keys × {found.scale:.4g}{bias}: {float(shown.min()):.2f} … {float(shown.max()):.2f}"
        )
        steps += [
            Step("scores", "", [], shape, None, span),
            Step("mask", "", [], shape, None, hidden),
            Step("softmax", "", [], shape, None, "weights of a query sum to 1"),
            Step("heads", "", [], (found.heads, q.shape[2], v.shape[-1]), _rms(x_BTF), "weights · values"),
        ]


def units(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a module that are told as one step each, with their dotted names: known ones, and leaves."""
    inside = list(module.named_children())
    if name.rpartition(".")[2] in UNITS or not inside:
        if any(True for _ in module.parameters()) or not inside:
            yield name, module
        return
    for inner, child in inside:
        yield from units(child, f"{name}.{inner}")


def _dtypes(tables: list[Table]) -> str:
    """What most parameters are stored in, then what the others are."""
    counts: Counter[str] = Counter()
    for table in tables:
        counts[table.dtype] += table.parameters
    return " and ".join(name for name, _ in counts.most_common())


def _what(name: str, unit: nn.Module) -> str:
    last = name.rpartition(".")[2]
    return UNITS.get(last, "norm" if "norm" in type(unit).__name__.lower() else last)


def _last(x_BTE: Tensor) -> Tensor:
    return x_BTE[0, -WINDOW:].detach().clone()


def _rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())
