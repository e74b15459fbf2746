"""What the recomputing `denoise` is made of: products with what stands around them.

`Steps` is the specification in plain PyTorch, for any device and dtype; backends replace its
methods. `branches` is 2 with guidance (conditional rows, then those of the null condition), else 1.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GELU_GRADIENT, SILU_GRADIENT = torch.ops.aten.gelu_backward, torch.ops.aten.silu_backward


class Rows(NamedTuple):
    """How rows read what they share, and their guidance.

    index: [B] int64 rows in tables of several rows; None where row r uses row r. A table of one
    row serves all. guidance: w, but 0 for rows of `drop` [B] bool.
    """

    index: Tensor | None
    guidance: float
    drop: Tensor | None

    def of(self, table: Tensor) -> Tensor:
        """[B, .] of a table, or [1, .] if it has one row."""
        return table if self.index is None or len(table) == 1 else table[self.index]

    def weights(self, like: Tensor) -> Tensor:
        """w of each row [B, 1], or [1] if all have the same."""
        if self.drop is None:
            return like.new_full((1,), self.guidance)
        return like.new_full((len(self.drop), 1), self.guidance).masked_fill(self.drop[:, None], 0)


class Modulation(NamedTuple):
    """Shift, scale and gate side by side: P W columns, W per part.

    users: [B, P W] of the conditional rows. time: [U, P W] to add, or None. null: [U or 1, P W] of
    the other branch, or None without guidance.
    """

    users: Tensor
    time: Tensor | None
    null: Tensor | None

    def parts(self, rows: Rows, width: int) -> tuple[Tensor, ...]:
        """[branches, B, W] each."""
        whole = self.users[None]
        if self.null is not None:
            whole = torch.stack([self.users, rows.of(self.null).expand_as(self.users)])
        if self.time is not None:
            whole = whole + rows.of(self.time)
        return whole.split(width, dim=-1)


class Steps:
    """The steps in plain PyTorch. Weights are [out, in], gradients are of the loss."""

    by_index = True  # whether tables may be read by an index

    def hidden(self, x, condition, weight, time, null, rows: Rows) -> Tensor:
        """Folded hidden layer of an `MLPDenoiser` [B, H] (`ops.hoisting` has the identity).

        Args:
            x, condition: [B, D]. weight: [H, 3D]. time: [U, H] the time's share with the bias.
            null: [1, H] the null condition's share, or None without guidance.
        """
        _, with_condition, without = self._layer(x, condition, weight, time, null, rows)
        folded = F.gelu(with_condition)
        if null is not None:
            w = rows.weights(x)
            folded = (1 + w) * folded - w * F.gelu(without)
        return folded

    def hidden_gradient(self, x, condition, weight, time, null, rows, grad, output):
        """`hidden` again, and gradients of its pre-activations, given that of the output layer.

        Args:
            grad: [B, D]. output: [D, H], the output layer's weight.

        Returns:
            `hidden` and the gradients with respect to the condition's share and to the sum that
            both branches have in common, [B, H] each.
        """
        grad = grad @ output
        _, with_condition, without = self._layer(x, condition, weight, time, null, rows)
        folded = F.gelu(with_condition)
        if null is None:
            of_shared = GELU_GRADIENT(grad, with_condition)
            return folded, of_shared, of_shared
        w = rows.weights(x)
        folded = (1 + w) * folded - w * F.gelu(without)
        of_condition = GELU_GRADIENT((1 + w) * grad, with_condition)
        return folded, of_condition, of_condition + GELU_GRADIENT(-w * grad, without)

    def _layer(self, x, condition, weight, time, null, rows):
        of_x, of_condition, _ = weight.split(x.shape[1], dim=1)
        shared = x @ of_x.T + rows.of(time)
        return shared, shared + condition @ of_condition.T, None if null is None else shared + null

    def modulate(self, state, norm, modulation, rows: Rows) -> Tensor:
        """Modulated layer norm `norm(state) (1 + scale) + shift` [branches, B, W].

        Args:
            state: [branches, B, W], branches may share memory. norm: weight and bias [W].
        """
        shift, scale, *_ = modulation.parts(rows, state.shape[-1])
        return F.layer_norm(state, state.shape[-1:], *norm, eps=1e-6) * (1 + scale) + shift

    def modulate_gradient(self, state, norm, modulation, rows, grad, after, of_modulation):
        """`modulate` again, and gradients; parts 0 and 1 of `of_modulation` are filled in.

        Args:
            grad: of `modulate`. after: gradient of the state from elsewhere, to be added.
            of_modulation: [branches, B, 3 W].

        Returns:
            `modulate`, gradient of the state, of the norm's weight and of its bias.
        """
        shift, scale, *_ = modulation.parts(rows, width := state.shape[-1])
        value, x, deviation = _normalised(state, norm)
        of_modulation[..., :width], of_modulation[..., width : 2 * width] = grad, grad * value
        of_value = grad * (1 + scale)
        of_state = after + _norm_gradient(of_value * norm[0], x, deviation)
        of_norm = (of_value * x).sum((0, 1)), of_value.sum((0, 1))
        return value * (1 + scale) + shift, of_state, *of_norm

    def fold(self, state, modulation, rows: Rows) -> Tensor:
        """Guided input of an AdaLN head's output layer [B, W]: modulated, without norm weights."""
        shift, scale = modulation.parts(rows, state.shape[-1])
        value = F.layer_norm(state, state.shape[-1:], eps=1e-6) * (1 + scale) + shift
        if len(value) == 1:
            return value[0]
        return torch.lerp(value[1], value[0], 1 + rows.weights(state))

    def fold_gradient(self, state, modulation, rows, grad):
        """`fold` again, gradients of the state and of the modulation [branches, B, 2 W]."""
        _, scale = modulation.parts(rows, state.shape[-1])
        if len(state) == 2:
            w = rows.weights(state)
            grad = torch.stack([(1 + w) * grad, -w * grad])
        else:
            grad = grad[None]
        _, x, deviation = _normalised(state, None)
        of_state = _norm_gradient(grad * (1 + scale), x, deviation)
        return self.fold(state, modulation, rows), of_state, torch.cat([grad, grad * x], dim=-1)

    def expand(self, inner, weight, bias) -> tuple[Tensor, Tensor]:
        """A block's first layer [branches, B, W]: after SiLU and before."""
        before = F.linear(inner, weight, bias)
        return F.silu(before), before

    def expand_gradient(self, grad, weight, before) -> tuple[Tensor, Tensor]:
        """Gradient of `before` and `silu(before)`, given that of the layer behind it.

        Args:
            grad: [branches, B, W]. weight: that layer's.
        """
        return SILU_GRADIENT(grad @ weight, before), F.silu(before)

    def residual(self, state, active, weight, bias, modulation, rows) -> tuple[Tensor, Tensor]:
        """`state + gate * value` and `value = active weight^T + bias`, [branches, B, W]."""
        gate = modulation.parts(rows, state.shape[-1])[2]
        value = F.linear(active, weight, bias)
        return torch.addcmul(state, gate, value), value

    def residual_gradient(self, grad, value, modulation, rows, of_modulation) -> Tensor:
        """Gradient of `value`; part 2 of `of_modulation` is filled in."""
        gate, width = modulation.parts(rows, grad.shape[-1])[2], grad.shape[-1]
        of_modulation[..., 2 * width :] = grad * value
        return grad * gate

    def sum_rows(self, values: Tensor, table: Tensor, rows: Rows) -> Tensor:
        """Gradient of a table, given values [B, C] for the rows that were read from it."""
        if len(table) == 1:
            return values.sum(0, keepdim=True)
        if rows.index is None:
            return values
        return values.new_zeros(len(table), values.shape[1]).index_add_(0, rows.index, values)


def _normalised(state: Tensor, norm) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm with and without its weights, and 1 / standard deviation."""
    x, _, deviation = torch.native_layer_norm(state, state.shape[-1:], None, None, 1e-6)
    return (x if norm is None else x * norm[0] + norm[1]), x, deviation.to(x.dtype)


def _norm_gradient(grad: Tensor, x: Tensor, deviation: Tensor) -> Tensor:
    along = (grad * x).mean(-1, keepdim=True)
    return deviation * (grad - grad.mean(-1, keepdim=True) - x * along)
