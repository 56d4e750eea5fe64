"""Mamba-2 (Dao and Gu 2024, arXiv:2405.21060): a mixer whose memory is of one size, whatever the length.

Shape legend: B rows, T tokens, E hidden width, I inner width, H heads, P channels of a head (I = H P), G groups,
N channels of the state, C convolved channels (I + 2 G N), K taps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.kernels.ssd import causal_conv, ssd_chunked, ssd_reference
from llmctl.model.context import Context
from llmctl.model.state import RecurrentState
from llmctl.recipe.model import ModelSection


class GatedRMSNorm(nn.Module):
    """RMSNorm of x · silu(gate), each of `groups` parts of the channels by itself; sums in float32."""

    def __init__(self, size: int, eps: float, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.groups = eps, groups

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        gated = (x.to(wide) * F.silu(gate.to(wide))).unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return self.weight * normed.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, groups={self.groups}"


class Mamba2(nn.Module):
    """z, xBC, dt = in_proj(x); x, B, C = silu(conv(xBC)); y = scan(x, dt, A, B, C) + D x; out_proj(norm(y · silu(z))).

    Padding leaves no trace: it is moved behind a row's real tokens, where neither convolution nor scan carries it on.
    Documents of a row do not see each other.
    """

    def __init__(self, model: ModelSection, layer: int) -> None:
        super().__init__()
        ssm = model.ssm
        assert ssm is not None
        self.ssm, self.layer = ssm, layer
        inner = ssm.expand * model.hidden_size
        heads, convolved = inner // ssm.head_dim, inner + 2 * ssm.n_groups * ssm.state_size
        self.inner, self.heads = inner, heads
        self.in_proj = nn.Linear(model.hidden_size, inner + convolved + heads, bias=ssm.use_bias)
        # holds the weights [C, 1, K] under the name they have everywhere
        self.conv1d = nn.Conv1d(
            convolved, convolved, ssm.conv_kernel, groups=convolved, bias=ssm.use_conv_bias
        )
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedRMSNorm(inner, model.norm_eps, ssm.n_groups)
        self.out_proj = nn.Linear(inner, model.hidden_size, bias=ssm.use_bias)

    def forward(self, x_BTE: Tensor, ctx: Context, state: RecurrentState | None) -> Tensor:
        padded, starts = _Padded.of(ctx), ctx.starts()
        if padded is None:
            return self._mixed(x_BTE, starts, None, state)
        starts = None if starts is None else padded.moved(starts)
        return padded.back(self._mixed(padded.moved(x_BTE), starts, padded.real, state))

    def prepare(self, ctx: Context) -> None:
        """Nothing is shared between layers."""

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> RecurrentState:
        """The convolution's last inputs [B, K - 1, C] and the scan's state [B, H, P, N], all zeros."""
        ssm, wide = self.ssm, torch.promote_types(dtype, torch.float32)
        window = torch.zeros(batch, ssm.conv_kernel - 1, self.conv1d.in_channels, dtype=dtype, device=device)
        shape = (batch, self.heads, ssm.head_dim, ssm.state_size)
        return RecurrentState(window, torch.zeros(shape, dtype=wide, device=device))

    def _mixed(
        self, x_BTE: Tensor, starts_BT: Tensor | None, real_BT: Tensor | None, state: RecurrentState | None
    ) -> Tensor:
        """As `forward`; padding, if any, stands behind the real tokens of a row."""
        ssm, (window, h_BHPN) = self.ssm, (None, None) if state is None else state.tensors
        sizes = (self.inner, self.conv1d.in_channels, self.heads)
        z_BTI, u_BTC, dt_BTH = self.in_proj(x_BTE).split(sizes, -1)
        weight_CK, bias_C = self.conv1d.weight[:, 0], self.conv1d.bias
        made, after = causal_conv(u_BTC, weight_CK, bias_C, window, starts_BT, real_BT)
        if window is not None and real_BT is not None:
            after = _last_real(window, u_BTC, starts_BT, real_BT)
        widths = (self.inner, ssm.n_groups * ssm.state_size, ssm.n_groups * ssm.state_size)
        x, B, C = F.silu(made).split(widths, -1)
        x_BTHP = x.unflatten(-1, (self.heads, ssm.head_dim))
        B, C = (part.unflatten(-1, (ssm.n_groups, ssm.state_size)) for part in (B, C))
        wide = torch.promote_types(dt_BTH.dtype, torch.float32)
        dt_BTH = F.softplus(dt_BTH.to(wide) + self.dt_bias)
        if real_BT is not None:
            dt_BTH = dt_BTH * real_BT[..., None]
        given = (x_BTHP, dt_BTH, -self.A_log.to(wide).exp(), B, C, h_BHPN, starts_BT)
        one = x_BTE.shape[1] == 1
        y_BTHP, h_BHPN = ssd_reference(*given) if one else ssd_chunked(*given, chunk=ssm.chunk_size)
        if state is not None:
            state.update(x_BTE.shape[1], after, h_BHPN)
        y_BTHP = y_BTHP + (self.D[:, None] * x_BTHP).to(y_BTHP.dtype)
        return self.out_proj(self.norm(y_BTHP.flatten(2), z_BTI).to(x_BTE.dtype))


@dataclass(frozen=True)
class _Padded:
    """Rows with padding, and the order in which each row's padding comes last."""

    order: Tensor  # [B, T]
    real: Tensor  # [B, T], after moving

    @staticmethod
    def of(ctx: Context) -> _Padded | None:
        padding = ctx.padding()
        if padding is None or not bool(padding.any()):
            return None
        order = padding.long().argsort(dim=1, stable=True)
        return _Padded(order, ~padding.gather(1, order))

    def moved(self, x: Tensor) -> Tensor:
        """[B, T, ...] in the new order."""
        return x.gather(1, self._places(x))

    def back(self, x: Tensor) -> Tensor:
        """[B, T, ...] in the old one."""
        return torch.zeros_like(x).scatter(1, self._places(x), x)

    def _places(self, x: Tensor) -> Tensor:
        return self.order.view(*self.order.shape, *(1,) * (x.dim() - 2)).expand_as(x)


def _last_real(window_BKC: Tensor, u_BTC: Tensor, starts_BT: Tensor | None, real_BT: Tensor) -> Tensor:
    """The convolution's window after tokens behind which padding stands: the last K - 1 real inputs of the document."""
    taps = window_BKC.shape[1]
    past = torch.cat([window_BKC.to(u_BTC.dtype), u_BTC], dim=1)
    place = real_BT.sum(1, keepdim=True) + torch.arange(taps, device=past.device)
    window = past.gather(1, place[..., None].expand(-1, -1, past.shape[2]))
    if starts_BT is None:
        return window
    document = F.pad(starts_BT.cumsum(1), (taps, 0))
    return window * (document.gather(1, place) == document[:, -1:])[..., None]
