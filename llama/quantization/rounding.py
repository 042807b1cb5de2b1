"""Rounding weights: the nearest int8 of a row, and the 4-bit groups of least squared error."""

import itertools

import torch
from torch import Tensor

GROUPS = (64, 32)  # inputs that share a scale and a zero: the first that divides in_features
CLIPS = (1.0, 0.9)  # fractions of a group's range, tried for its low and its high end
ROUNDING_SIZE = 2**17  # weights rounded at a time: some ten fp32 temporaries stay in the caches


def row_scales(x: Tensor, largest: int = 127) -> Tensor:
    """The scale of each row, (n, 1), that maps it to -largest to largest."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return torch.maximum(-low, high).clamp_(min=1e-12).div_(largest)


def int4_group_size(in_features: int) -> int:
    """Inputs that share an int4 scale; 0 if int4 is not possible."""
    return next((group for group in GROUPS if in_features % group == 0), 0)


def quantize_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Round a matrix to W = scale * (q - 8) + zero, in groups of neighbouring inputs.

    Returns:
        uint8 q from 0 to 15, (out_features, in_features), and scale and zero, bf16
        (in_features / group, out_features, 2).
    """
    q = torch.empty(weight.shape, dtype=torch.uint8)
    groups = torch.empty(weight.shape[1] // group, len(weight), 2, dtype=torch.bfloat16)
    n_rows = max(ROUNDING_SIZE // weight.shape[1], 1)
    for rows, q_rows, pairs in zip(weight.split(n_rows), q.split(n_rows), groups.split(n_rows, 1)):
        w = rows.float().unflatten(1, (-1, group))
        scale_and_zero = torch.cat(fit_groups(w), -1).bfloat16()
        pairs.copy_(scale_and_zero.transpose(0, 1))
        scale, zero = scale_and_zero.float().split(1, -1)
        q_rows.copy_(to_levels(w, scale, zero).flatten(1))
    return q, groups


def to_levels(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (w - zero).div_(scale).add_(8).round_().clamp_(0, 15)


def fit_groups(w: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero, (n_rows, n_groups, 1), for w (n_rows, n_groups, group).

    Each of four clipped ranges is refined once by least squares; the best of them, once more.
    """
    mean = w.mean(-1, keepdim=True)
    centred = w - mean

    def refine(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Least-squares scale and zero for the rounded q, and the variance that they explain."""
        q = to_levels(w, scale, zero)
        q_mean = q.mean(-1, keepdim=True)
        q -= q_mean
        variance = q.square().sum(-1, keepdim=True)
        covariance = q.mul_(centred).sum(-1, keepdim=True)
        better = covariance / variance
        scale = torch.where((variance > 1e-6) & (better > 0), better, scale)
        return scale, mean - scale * (q_mean - 8), covariance * scale

    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    middle, half = (low + high) / 2, ((high - low) / 2).clamp_min_(1e-8)
    fits = []
    for below, above in itertools.product(CLIPS, CLIPS):
        scale = half * ((below + above) / 15)
        fits.append(refine(scale, middle - half * below + 8 * scale))
    best = torch.cat([fit[2] for fit in fits], -1).argmax(-1, keepdim=True)
    scale, zero = (torch.cat([f[i] for f in fits], -1).gather(-1, best) for i in (0, 1))
    return refine(scale, zero)[:2]
