"""State-space duality: the scan of Mamba-2 (Dao and Gu 2024, arXiv:2405.21060), and its causal convolution.

Shape legend: B rows, T tokens, H heads, P channels of a head, G groups that share B and C (head h reads group
h // (H / G)), N channels of the state, Q tokens of a chunk, Z chunks, R heads of a group, C convolved channels,
K taps.

Paths, equal to each other:

    ssd_reference   token by token: the definition, and what decodes one token
    ssd_chunked     products of matrices within chunks, a short recurrence between them: what trains

Sums are in float32, under autocast too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_reference(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    state_BHPN: Tensor | None = None,
    starts_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t and y_t = C_t h_t, one token after another.

    Args:
        dt_BTH: step sizes, ready for use (after softplus); 0 for padding, which then leaves no trace.
        A_H: negative.
        state_BHPN: h before the first token; None is zeros.
        starts_BT: True at the first token of each document, which finds an empty state; None is one document.

    Returns:
        y [B, T, H, P] in the dtype of `x`, and the state after the last token, in float32 (float64 for such x).
    """
    wide = torch.promote_types(x_BTHP.dtype, torch.float32)
    heads, state = A_H.shape[0], _first_state(x_BTHP, B_BTGN, state_BHPN, wide)
    x, dt = x_BTHP.to(wide), dt_BTH.to(wide)
    B, C = (g.to(wide).repeat_interleave(heads // g.shape[2], dim=2) for g in (B_BTGN, C_BTGN))
    decay = (dt * A_H.to(wide)).exp()
    if starts_BT is not None:
        decay = decay.masked_fill(starts_BT[..., None], 0)
    ys = []
    for t in range(x.shape[1]):
        step_BHPN = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = decay[:, t, :, None, None] * state + step_BHPN
        ys.append((state * C[:, t, :, None]).sum(-1))
    return torch.stack(ys, dim=1).to(x_BTHP.dtype), state


def ssd_chunked(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    state_BHPN: Tensor | None = None,
    starts_BT: Tensor | None = None,
    chunk: int = 256,
) -> tuple[Tensor, Tensor]:
    """What `ssd_reference` computes, from the same arguments, `chunk` tokens at a time.

    T need not be a multiple of `chunk`. Within a chunk, y is an attention without softmax whose weights
    C_l · B_s exp(sum of dt A over s+1 … l) dt_s are a product of matrices; a chunk hands on only its last state.
    """
    with torch.autocast(x_BTHP.device.type, enabled=False):
        wide = torch.promote_types(x_BTHP.dtype, torch.float32)
        state = _first_state(x_BTHP, B_BTGN, state_BHPN, wide)
        length, chunk = x_BTHP.shape[1], min(chunk, x_BTHP.shape[1])
        x, dt, B, C = (_chunks(t.to(wide), chunk) for t in (x_BTHP, dt_BTH, B_BTGN, C_BTGN))
        starts = None if starts_BT is None else _chunks(starts_BT, chunk)
        y, state = _chunked(x, dt, A_H.to(wide), B, C, state, starts)
    return y.flatten(1, 2)[:, :length].to(x_BTHP.dtype), state


def _chunked(
    x_BZQHP: Tensor,
    dt_BZQH: Tensor,
    A_H: Tensor,
    B_BZQGN: Tensor,
    C_BZQGN: Tensor,
    state_BHPN: Tensor,
    starts_BZQ: Tensor | None,
) -> tuple[Tensor, Tensor]:
    groups, heads = B_BZQGN.shape[3], A_H.shape[0]
    grouped = (groups, heads // groups)
    within, to_end, from_start = _decays((dt_BZQH * A_H).cumsum(2), starts_BZQ)
    dx = (dt_BZQH[..., None] * x_BZQHP).unflatten(3, grouped)  # [B, Z, Q, G, R, P]
    scores_BZGQS = torch.einsum("bzqgn,bzsgn->bzgqs", C_BZQGN, B_BZQGN)
    weights = scores_BZGQS[:, :, :, None] * within.unflatten(2, grouped)
    y = torch.einsum("bzgrqs,bzsgrp->bzqgrp", weights, dx)

    left = torch.einsum("bzsgrp,bzsgn->bzgrpn", dx * to_end.unflatten(3, grouped)[..., None], B_BZQGN)
    left, through = left.flatten(2, 3), from_start[:, :, -1, :, None, None]
    before = []
    for own, kept in zip(left.unbind(1), through.unbind(1), strict=True):
        before.append(state_BHPN)
        state_BHPN = kept * state_BHPN + own
    found = torch.stack(before, dim=1).unflatten(2, grouped)
    carried = torch.einsum("bzqgn,bzgrpn->bzqgrp", C_BZQGN, found)
    y = y + carried * from_start.unflatten(3, grouped)[..., None]
    return y.flatten(3, 4), state_BHPN


def _decays(total_BZQH: Tensor, starts_BZQ: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What is left of a state on its way: [B, Z, H, Q, Q] from token to token (0 backwards), [B, Z, Q, H] from a token
    to the chunk's end, and the same from before the chunk to a token. `total`: running sums of dt A."""
    size = total_BZQH.shape[2]
    total = total_BZQH.transpose(2, 3)
    seen = torch.ones(size, size, dtype=torch.bool, device=total.device).tril()
    to_end, from_start = total_BZQH[:, :, -1:] - total_BZQH, total_BZQH
    if starts_BZQ is not None:
        document = starts_BZQ.cumsum(2)
        seen = seen & (document[..., :, None] == document[..., None, :])[:, :, None]
        to_end = to_end.masked_fill((document != document[..., -1:])[..., None], -torch.inf)
        from_start = from_start.masked_fill((document > 0)[..., None], -torch.inf)
    # masked before exp: backwards the exponents are positive, and inf · 0 would be the gradient
    within = (total[..., :, None] - total[..., None, :]).masked_fill(~seen, -torch.inf)
    return within.exp(), to_end.exp(), from_start.exp()


def _chunks(t: Tensor, chunk: int) -> Tensor:
    """[B, T, ...] -> [B, Z, Q, ...], filled up with zeros: dt = 0 there changes nothing."""
    fill = -t.shape[1] % chunk
    if fill:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, fill))
    return t.unflatten(1, (-1, chunk))


def _first_state(x_BTHP: Tensor, B_BTGN: Tensor, state_BHPN: Tensor | None, dtype: torch.dtype) -> Tensor:
    if state_BHPN is not None:
        return state_BHPN.to(dtype)
    rows, _, heads, channels = x_BTHP.shape
    return x_BTHP.new_zeros(rows, heads, channels, B_BTGN.shape[-1], dtype=dtype)


def causal_conv(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None = None,
    window_BKC: Tensor | None = None,
    starts_BT: Tensor | None = None,
    mask_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y[t] = bias + sum over j < K of weight[:, K - 1 - j] · x[t - j], within the document of t.

    Args:
        window_BKC: the K - 1 inputs before the first, as the last call returned them; None is zeros.
        starts_BT: True at the first token of each document; None is one document, that of the window.
        mask_BT: False for padding, which counts as zeros; None is no padding.

    Returns:
        y [B, T, C] in the dtype of `x`, and the window [B, K - 1, C] for the tokens that follow.
    """
    taps, length = weight_CK.shape[1], x_BTC.shape[1]
    if mask_BT is not None:
        x_BTC = x_BTC * mask_BT[..., None].to(x_BTC.dtype)
    if window_BKC is None:
        window_BKC = x_BTC.new_zeros(x_BTC.shape[0], taps - 1, x_BTC.shape[2])
    past = torch.cat([window_BKC.to(x_BTC.dtype), x_BTC], dim=1)
    document = None if starts_BT is None else F.pad(starts_BT.cumsum(1), (taps - 1, 0))
    y = past[:, taps - 1 :] * weight_CK[:, -1]
    for lag in range(1, taps):
        source = slice(taps - 1 - lag, taps - 1 - lag + length)
        term = past[:, source] * weight_CK[:, -1 - lag]
        if document is not None:
            term = term * (document[:, source] == document[:, taps - 1 :])[..., None]
        y = y + term
    if bias_C is not None:
        y = y + bias_C
    window = past[:, length:]
    if document is not None:
        window = window * (document[:, length:] == document[:, -1:])[..., None]
    return y.to(x_BTC.dtype), window
