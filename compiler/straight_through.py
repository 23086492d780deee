"""Quantizers with gradients: what linear layers see of activations and weights once they are quantized.

Forward they compute what `schemes` computes; gradients pass through rounding as if it were not there, and stop at a clamp.

torch is an optional package: import this module only where something is to be learned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import Tensor

from scalefold.compiler.saturation import pair_limit
from scalefold.compiler.schemes import SMALLEST_SCALE, largest_weight_code
from scalefold.compiler.torch_graph import Entries, Operands


class _RoundTrip(torch.autograd.Function):
    """y = s clamp(round(x / s), low, high), gradients as if rounding were not there.

    With u = x / s and codes c: dy/dx is 1 within the clamp and 0 beyond; dy/ds is c - u within, and c beyond (Esser et
    al. 2020, eq. 3).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
        units = x / scale
        rounded = torch.round(units)
        codes = torch.clamp(rounded, low, high)
        inside = codes == rounded
        ctx.save_for_backward(inside, torch.where(inside, codes - units, codes))
        ctx.shape = scale.shape
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        inside, slope = ctx.saved_tensors
        to_x = gradients[0] * inside if ctx.needs_input_grad[0] else None
        to_scale = (gradients[0] * slope).sum_to_size(ctx.shape) if ctx.needs_input_grad[1] else None
        return to_x, to_scale, None, None


def _round_trip(x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    return cast(Tensor, _RoundTrip.apply(x, scale, low, high))  # type: ignore[no-untyped-call]


def fake_activation(x: Tensor, low: Tensor, high: Tensor, bits: int, *, free: bool = False) -> Tensor:
    """`x` as the quantized graph sees it: `schemes.activation_grid(low, high).round_trip(x)`, with gradients.

    Args:
        x: any shape.
        low: smallest value to represent, one number.
        high: largest value to represent, one number.
        bits: 2 to 8.
        free: let gradients pass through the rounding of the zero point as well. Each end then has the gradient of what
            lies beyond it alone; otherwise the two have one, that of the scale, which keeps their ratio.
    """
    codes = (1 << bits) - 1
    low, high = torch.clamp(low, max=0.0), torch.clamp(high, min=0.0)
    scale = torch.clamp((high - low) / codes, min=SMALLEST_SCALE)
    unrounded = float(-low.detach() / scale.detach())
    # a range that has grown without bounds makes a loss of the same kind, which training knows
    zero = min(max(round(unrounded), 0), codes) if math.isfinite(unrounded) else 0
    bounds = -float(zero), float(codes - zero)
    if not free:
        return _round_trip(x, scale, *bounds)
    # 0 forward. Backward, what is beyond the clamp moves with the zero point, and what is within does not.
    exact = -low / scale
    drift = (exact - exact.detach()) * scale.detach()
    return _round_trip(x + drift, scale, *bounds) - drift


def fake_weight(weight: Tensor, bits: int, activation_bits: int) -> Tensor:
    """`weight` [K, N] as the quantized graph sees it: `schemes.weight_round_trip`, with gradients."""
    largest = largest_weight_code(bits)
    scales = _column_scales(weight, largest, pair_limit(activation_bits))
    return _round_trip(weight, torch.where(scales > SMALLEST_SCALE, scales, 1.0), -float(largest), float(largest))


def _column_scales(weight: Tensor, largest: int, limit: int) -> Tensor:
    """`schemes.column_scales`; the entries that decide are found without gradients, then read with them."""
    columns = torch.arange(weight.shape[1])
    peak = weight.detach().abs().argmax(0)
    scales = weight[peak, columns].abs() / largest
    if 2 * largest <= limit or weight.shape[0] < 2:
        return scales
    count = weight.shape[0] // 2
    with torch.no_grad():
        even, odd = weight[0 : 2 * count : 2], weight[1 : 2 * count : 2]
        sums = torch.maximum(even.clamp(min=0) + odd.clamp(min=0), -(even.clamp(max=0) + odd.clamp(max=0)))
        pair = sums.argmax(0)
    first, second = weight[2 * pair, columns], weight[2 * pair + 1, columns]
    # of a pair of two signs only the larger counts, which the peak covers
    joint = torch.where(first * second > 0, (first + second).abs(), torch.maximum(first.abs(), second.abs()))
    return torch.maximum(scales, joint / (limit - 1))


@dataclass(frozen=True)
class Observed:
    """An activation that quantized linear layers read, while its channels' scales or the ends of its range are learned.

    Its range is [exp(speed rho_0) min(a low), exp(speed rho_1) max(a high)]: with rho = 0 that of min-max.

    Attributes:
        readers: the MatMul nodes.
        low: smallest value of each channel [C] in calibration; None takes the extremes of the tensor at hand.
        high: largest value of each channel [C].
        theta: logarithms of the scales, one for each column that makes a channel; None where nothing is scaled.
        columns: for each channel the entry of theta [C]; None when they are one to one.
        rho: what moves the two ends of the range [2]; None leaves them to min-max.
        speed: how much faster the logarithm of an end learns than other parameters: their sizes differ so.
    """

    readers: tuple[ir.Node, ...]
    low: Tensor | None = None
    high: Tensor | None = None
    theta: Tensor | None = None
    columns: Tensor | None = None
    rho: Tensor | None = None
    speed: float = 1.0

    def scale(self) -> Tensor | None:
        """The scale a of each channel [C]."""
        if self.theta is None:
            return None
        return torch.exp(self.theta if self.columns is None else self.theta[self.columns])

    def ends(self, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """The static range of a x, one number each, for a channel range that is known."""
        low, high = self.low, self.high
        assert low is not None and high is not None
        if scale is not None:
            low, high = low * scale, high * scale
        if self.rho is None:
            return low.amin(), high.amax()
        factors = torch.exp(self.speed * self.rho)
        return low.amin() * factors[0], high.amax() * factors[1]


def operands(observed: Sequence[Observed], weight_bits: int, activation_bits: int) -> dict[ir.Node, Operands]:
    """What the readers compute with: Q(a x) and Q(W / a) in place of x and W, for the scales as they are now."""
    found: dict[ir.Node, Operands] = {}
    for entry in observed:
        scale = entry.scale()
        rounded: list[Tensor] = []  # readers of one activation share its quantizer
        for reader in entry.readers:
            found[reader] = partial(_see, entry, scale, rounded, weight_bits, activation_bits)
    return found


def _see(
    entry: Observed, scale: Tensor | None, rounded: list[Tensor], weight_bits: int, activation_bits: int, read: Entries
) -> Entries:
    x, weight = read
    if not rounded:
        scaled = x if scale is None else x * scale
        low, high = (scaled.amin(), scaled.amax()) if entry.low is None else entry.ends(scale)
        rounded.append(fake_activation(scaled, low, high, activation_bits, free=entry.rho is not None))
    divided = weight if scale is None else weight / scale[:, None]
    return rounded[0], fake_weight(divided, weight_bits, activation_bits)
