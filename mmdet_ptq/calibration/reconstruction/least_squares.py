"""Closed-form weights of one layer: least squares against the float outputs, rounding errors compensated by the rest.

Rounding weight by weight, each error moved onto the weights not rounded yet, is optimal brain quantization (Frantar and
Alistarh, NeurIPS 2022) in the fixed order of GPTQ (Frantar et al., ICLR 2023). Two things are added: the target is what
the float layer returned on float inputs, so errors of the layers before are taken back, too; and the bias, which is not
rounded, takes what is left of the mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import SUM_LIMIT, Neighbours, Quantizer
from mmdet_ptq.wrapping.watching.layers import is_transposed

# columns whose errors move together, and passes of coordinate descent after them
BLOCK, SWEEPS = 128, 2


def patches(layer: nn.Module, x: Tensor, picked: Tensor | None = None) -> Tensor | None:
    """What output positions read.

    Args:
        layer: A linear layer or a 2d convolution.
        x: Its input.
        picked: Which positions, (P,), counted image by image and row by row. Defaults to None, all of them.

    Returns:
        (G, K, P): groups, weights per output channel, positions; None for layers this does not cover.
    """
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return (rows if picked is None else rows[picked]).T[None]
    if (
        not isinstance(layer, nn.Conv2d)
        or is_transposed(layer)
        or layer.padding_mode != 'zeros'
        or isinstance(layer.padding, str)
    ):
        return None
    (pad_y, pad_x), (dilation_y, dilation_x), (stride_y, stride_x) = layer.padding, layer.dilation, layer.stride
    x = F.pad(x, (pad_x, pad_x, pad_y, pad_y))
    images, channels, height, width = x.shape
    rows, columns = (
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, dilation, kernel, stride in zip(
            (height, width), layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    )
    if picked is None:
        picked = torch.arange(images * rows * columns, device=x.device)
    line, image = picked // columns, picked // (rows * columns)
    column, row = picked - line * columns, line - image * rows
    corner = (image * height + row * stride_y) * width + column * stride_x
    # unfold would copy every position of large maps, of which few are picked
    inside = [y * dilation_y * width + x * dilation_x for y, x in itertools.product(*map(range, layer.kernel_size))]
    index = corner + corner.new_tensor(inside)[:, None]
    read = x.transpose(0, 1).reshape(channels, -1).index_select(1, index.flatten())
    return read.view(layer.groups, -1, len(picked))


def by_group(layer: nn.Module, y: Tensor) -> Tensor:
    """A layer's output as (G, R, P): groups, output channels of a group, positions."""
    groups = getattr(layer, 'groups', 1)
    if isinstance(layer, nn.Linear):
        return y.reshape(1, -1, y.shape[-1]).transpose(1, 2)
    channels = y.transpose(0, 1).reshape(y.shape[1], -1)
    return channels.view(groups, -1, channels.shape[1])


def why_unexplained(layer: nn.Module, rows: Tensor, reads: Tensor | None, outputs: Tensor) -> str:
    """Why what a layer returned is not its weight times what it read; '' where it is.

    Args:
        layer: The layer, for its bias.
        rows: The weight, (output channels, K).
        reads: What positions read, see :func:`patches`.
        outputs: What they returned, see :func:`by_group`.
    """
    if reads is None:
        return f'a {type(layer).__name__.removeprefix("Parametrized")} of this kind is not covered'
    again = rows.view(len(reads), -1, reads.shape[1]) @ reads
    if layer.bias is not None:
        again = again + layer.bias.detach().view(len(reads), -1, 1)
    if again.shape != outputs.shape or (again - outputs).abs().max() > 1e-3 * outputs.abs().max():
        return 'its forward does more than its weight tells'
    return ''


def why_astray(quantizer: Quantizer) -> str:
    """Why values of a grid cannot be chosen one by one; '' where they can."""
    shifted = getattr(quantizer, 'mode', '') == 'shift'
    return "values of the published grid are not rounded to themselves (mode 'shift')" if shifted else ''


class LayerEquations:
    """The normal equations of a layer, summed over batches: inputs with a constant 1 for the bias.

    Args:
        groups: Groups of the layer.
        rows: Output channels of a group.
        fan_in: Weights per output channel.
        has_bias: Without a bias the constant is 0 and takes part in nothing.
        device: Where the sums are.
    """

    def __init__(self, groups: int, rows: int, fan_in: int, has_bias: bool, device: torch.device) -> None:
        self.inputs = torch.zeros(groups, fan_in + 1, fan_in + 1, dtype=torch.float64, device=device)
        self.targets = torch.zeros(groups, rows, fan_in + 1, dtype=torch.float64, device=device)
        self.constant = float(has_bias)
        self.count = 0.0

    def add(self, x: Tensor, y: Tensor, counts: Tensor | None = None) -> None:
        """Adds positions.

        Args:
            x: Quantized inputs, (G, K, P).
            y: Float outputs, (G, R, P).
            counts: How much each position counts, (P,). Defaults to None, all alike.
        """
        x = torch.cat([x, x.new_full((x.shape[0], 1, x.shape[2]), self.constant)], 1)
        weighted = x if counts is None else x * counts
        self.inputs += (x @ weighted.transpose(1, 2)).double()
        self.targets += (y @ weighted.transpose(1, 2)).double()
        self.count += x.shape[2] if counts is None else float(counts.sum())

    def solve(self, weight: Tensor, bias: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """The weights of least squared error, drawn towards the given ones.

        Args:
            weight: (G, R, K).
            bias: (G, R).
            damping: Strength of the pull, as a share of the inputs' mean square.

        Returns:
            The weight and the bias.
        """
        start = torch.cat([weight, bias[..., None]], 2).double()
        lhs, pull = self._damped(damping)
        # relative to the start, so that the pull alone gives exactly the start
        change = torch.linalg.solve(lhs, (self.targets - start @ self.inputs).transpose(1, 2)).transpose(1, 2)
        solved = start + change
        return solved[..., :-1].to(weight.dtype), solved[..., -1].to(weight.dtype)

    def importance(self) -> Tensor:
        """Mean square of each input, (G, K): what an error of its weight costs."""
        return (self.inputs.diagonal(dim1=1, dim2=2)[:, :-1] / max(self.count, 1e-12)).float()

    def rounding(self, weight: Tensor, damping: float) -> CompensatedRounding:
        """How to round a weight on whichever grid.

        Args:
            weight: (G, R, K).
            damping: As for :meth:`solve`.
        """
        return CompensatedRounding(self._hessian(damping), weight)

    def _hessian(self, damping: float) -> Tensor:
        lhs, _ = self._damped(damping)
        # the mean that the bias takes up is no error: it is projected out
        mean = lhs[:, :-1, -1:]
        return lhs[:, :-1, :-1] - mean @ mean.transpose(1, 2) / lhs[:, -1:, -1:]

    def best_bias(self, weight: Tensor) -> Tensor:
        """The bias that leaves no mean error, (G, R)."""
        return (
            (self.targets[..., -1] - (weight.double() @ self.inputs[:, :-1, -1:])[..., 0]) / max(self.count, 1e-12)
        ).to(weight.dtype)

    def mean_change(self, change: Tensor) -> Tensor:
        """What a change of the weights, (G, R, K), adds to the mean of the outputs, (G, R)."""
        mean = self.inputs[:, :-1, -1:] / max(self.count, 1e-12)
        return (change.double() @ mean)[..., 0].to(change.dtype)

    def error(self, change: Tensor, bias: Tensor) -> Tensor:
        """Mean squared change of the outputs, (G, R), for one of the weights, (G, R, K), and of the biases, (G, R)."""
        whole = torch.cat([change, bias[..., None]], 2).double()
        return ((whole @ self.inputs) * whole).sum(2) / max(self.count, 1e-12)

    def _damped(self, damping: float) -> tuple[Tensor, Tensor]:
        diagonal = self.inputs.diagonal(dim1=1, dim2=2)
        pull = damping * diagonal.mean(1, keepdim=True) + 1e-8 * max(self.count, 1e-12)
        return self.inputs + torch.diag_embed(pull.expand_as(diagonal)), pull


def levels_of(quantizer: Quantizer, rows: int) -> Tensor:
    """The values of a weight's grid, rising, (rows, levels).

    Values that the quantizer itself rounds to others are left out, for the weight could not be stored: another stands
    in their place.

    Args:
        quantizer: The weight's quantizer, its parameters set.
        rows: Output channels of all groups.
    """
    low, high = quantizer.code_range
    codes = torch.arange(low, high + 1, dtype=torch.int32, device=quantizer.any_param().device)
    levels = quantizer.decode(codes.expand(rows, -1)).sort(1).values
    kept = quantizer.nearest(levels) == levels
    if not kept.any(1).all():
        raise PTQError(
            f'{type(quantizer).__name__} rounds none of its values to itself; choose another weight '
            'quantizer, or `ptq.reconstruct=None`.'
        )
    # one that is left out repeats the one below, or at the start the first that is kept
    place = torch.arange(len(codes), device=codes.device).expand_as(kept)
    place = torch.where(kept, place, kept.int().argmax(1, keepdim=True)).cummax(1).values
    return levels.gather(1, place)


class NearestLevel:
    """Rounds columns of a weight to the nearest value of its grid.

    The bins of a log-affine grid meet elsewhere than half-way between its values, and an error is least at the nearest
    value.

    Args:
        levels: The values, see :func:`levels_of`.
    """

    def __init__(self, levels: Tensor) -> None:
        self._levels = levels
        self._middles = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()

    def __call__(self, column: Tensor) -> Tensor:
        """Rounds a column, (G, R)."""
        index = torch.searchsorted(self._middles, column.reshape(-1, 1).contiguous())
        return self._levels.gather(1, index).view(column.shape)


class NeighbourSums:
    """How large a weight may be beside its neighbours, see :class:`mmdet_ptq.quantizers.Neighbours`.

    Args:
        neighbours: Which weights of a row are neighbours.
        scale: What their limit is counted in, one per row, (G, R).
    """

    def __init__(self, neighbours: Neighbours, scale: Tensor) -> None:
        self.partners, self.limit = neighbours.partners(), SUM_LIMIT * scale.double()

    def of(self, order: Tensor, start: Tensor) -> ColumnBounds:
        """The same for columns in another order.

        Args:
            order: Place in a row of each column, (G, K).
            start: What is to be rounded, in this order, (G, R, K).
        """
        column_of = torch.empty_like(order)
        column_of.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
        partners = self.partners.to(order.device)[:, order]
        columns = column_of[torch.arange(len(order), device=order.device)[:, None], partners.clamp_min(0)]
        return ColumnBounds(torch.where(partners >= 0, columns, order.shape[1]), self.limit, start.movedim(2, 0))


class ColumnBounds:
    """What the neighbours of a column leave it.

    One that is rounded already leaves the rest of the limit. With one that is not, both go half of the way.

    Args:
        partners: Columns of the neighbours of each column, (N, G, K); K where there is none.
        limit: Largest sum of two, (G, R).
        start: What is to be rounded, column by column, (K, G, R).
    """

    def __init__(self, partners: Tensor, limit: Tensor, start: Tensor) -> None:
        self._partners, self._limit = partners, limit
        # one more, of zeros, for those without a neighbour
        self._values = torch.cat([start, torch.zeros_like(limit)[None]])
        self._groups = torch.arange(len(limit), device=limit.device)
        self._complete = False

    def clip(self, column: int, values: Tensor) -> Tensor:
        """Values, (G, R), as far as the neighbours let them."""
        low, high = -self._limit, self._limit
        for partners in self._partners:
            place = partners[:, column]
            beside = self._values[place, self._groups]
            above, below = self._limit - beside.clamp_min(0), -self._limit - beside.clamp_max(0)
            if not self._complete:
                later = (place > column)[:, None]
                # a later one that is itself beyond the limit leaves nothing, and pushes nothing through zero
                above = torch.where(later, torch.maximum((values + above) / 2, above).clamp_min(0), above)
                below = torch.where(later, torch.minimum((values + below) / 2, below).clamp_max(0), below)
            high, low = torch.minimum(high, above), torch.maximum(low, below)
        return torch.maximum(torch.minimum(values, high), low)

    def put(self, column: int, values: Tensor) -> None:
        """Says what a column was rounded to, (G, R)."""
        self._values[column] = values

    def complete(self) -> None:
        """Says that all columns are rounded."""
        self._complete = True


class CompensatedRounding:
    """Rounds column by column, moving each error onto the columns that follow; then improves code by code.

    What does not depend on the grid is computed once. Columns go by falling mean square of their inputs.

    Args:
        hessian: Second derivatives of the squared error, (G, K, K).
        weight: What is rounded, (G, R, K).
    """

    def __init__(self, hessian: Tensor, weight: Tensor) -> None:
        order = hessian.diagonal(dim1=1, dim2=2).argsort(1, descending=True)
        take = torch.arange(len(order), device=order.device)[:, None]
        self._order = order[:, None, :]
        self._dtype = weight.dtype
        self._hessian = hessian[take[..., None], order[:, :, None], order[:, None, :]]
        self._target = weight.double().gather(2, self._order.expand_as(weight))
        self._upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(self._hessian)), upper=True)

    def __call__(
        self,
        quantize: Callable[[Tensor], Tensor],
        sums: NeighbourSums | None = None,
        times: int = 1,
        sweeps: int = SWEEPS,
    ) -> tuple[Tensor, Tensor]:
        """Rounds.

        Args:
            quantize: Rounds a column, (G, times * R).
            sums: Bounds that the weights beside a column leave it. Defaults to None: none.
            times: How often the rows of a group are rounded, side by side, each time on a grid of its own. Defaults
                to 1.
            sweeps: Passes of coordinate descent after the first one. Defaults to 2.

        Returns:
            The rounded weight, (G, times * R, K), and the squared error of each row with the best bias.
        """
        target = self._target.repeat(1, times, 1)
        beside = None if sums is None else sums.of(self._order[:, 0], target)
        found = self._compensate(target, quantize, beside)
        if beside is not None:
            beside.complete()
        for _ in range(sweeps):
            self._descend(found, target, quantize, beside)
        change = found - target
        error = ((change @ self._hessian) * change).sum(2)
        result = torch.empty_like(found)
        result.scatter_(2, self._order.expand_as(found), found)
        return result.to(self._dtype), error

    def _blocks(self) -> Iterator[tuple[int, int]]:
        # later columns hear of a block's changes in one product: column by column they would all be rewritten
        fan_in = self._target.shape[2]
        return ((start, min(start + BLOCK, fan_in)) for start in range(0, fan_in, BLOCK))

    def _compensate(self, target: Tensor, quantize: Callable[[Tensor], Tensor], beside: ColumnBounds | None) -> Tensor:
        """One pass of optimal brain quantization."""
        upper, rest, found = self._upper, target.clone(), torch.empty_like(target)
        for start, end in self._blocks():
            left = _columns(rest[..., start:end])
            rounded, errors = torch.empty_like(left), torch.empty_like(left)
            for column in range(end - start):
                place, value = start + column, left[:, column]
                within = value if beside is None else beside.clip(place, value)
                rounded[:, column] = quantize(within.float())
                if beside is not None:
                    beside.put(place, rounded[:, column])
                errors[:, column] = error = (value - rounded[:, column]) / upper[:, place, place, None]
                left[:, column + 1 :] -= upper[:, place, place + 1 : end, None] * error[:, None]
            found[..., start:end] = _columns(rounded)
            rest[..., end:] -= _columns(errors) @ upper[:, start:end, end:]
        return found

    def _descend(
        self, found: Tensor, target: Tensor, quantize: Callable[[Tensor], Tensor], beside: ColumnBounds | None
    ) -> None:
        """One sweep of coordinate descent, in place: each column takes its best values given all others."""
        hessian, gradient = self._hessian, (found - target) @ self._hessian
        for start, end in self._blocks():
            slopes, values = _columns(gradient[..., start:end]), _columns(found[..., start:end])
            changes = torch.empty_like(slopes)
            for column in range(end - start):
                place = start + column
                scale, slope, before = hessian[:, place, place, None], slopes[:, column], values[:, column]
                wanted = before - slope / scale
                wanted = wanted if beside is None else beside.clip(place, wanted)
                change = quantize(wanted.float()).double() - before
                # the nearest value minimises the parabola; ties and float32 may not raise the error
                changes[:, column] = change = torch.where(change * (2 * slope + change * scale) < 0, change, 0.0)
                if beside is not None:
                    beside.put(place, before + change)
                slopes[:, column + 1 :] += hessian[:, place, place + 1 : end, None] * change[:, None]
            found[..., start:end] += _columns(changes)
            gradient[..., end:] += _columns(changes) @ hessian[:, start:end, end:]


def _columns(block: Tensor) -> Tensor:
    """A copy with the last two dimensions exchanged: what is read and written column by column lies in one piece."""
    return block.transpose(1, 2).contiguous()
