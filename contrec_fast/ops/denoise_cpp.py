"""`denoise` on the CPU: the library's products, and C++ for what stands around them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from contrec_fast import native
from contrec_fast.ops.denoise_gradients import denoise_recomputed, obstacle
from contrec_fast.ops.denoise_steps import Rows, Steps
from contrec_fast.ops.dispatch import CPP, implements

DTYPES = (torch.float32, torch.bfloat16)
CHUNK = 32  # kChunk of csrc/cpu/denoise.h


def _table(table: Tensor | None) -> tuple:
    """Address and stride, as a `Table` of csrc/cpu/denoise.h."""
    return (None, 0) if table is None else (table, 0 if len(table) == 1 else table.stride(0))


class CppSteps(Steps):
    """As `Steps`, whose docstrings hold; intermediate sums are float32."""

    def hidden(self, x, condition, weight, time, null, rows: Rows) -> Tensor:
        return self._hidden(x, condition, weight, time, null, rows, None)[0]

    def hidden_gradient(self, x, condition, weight, time, null, rows, grad, output):
        return self._hidden(x, condition, weight, time, null, rows, grad @ output)

    def _hidden(self, x, condition, weight, time, null, rows, grad):
        dim, of_condition = x.shape[1], None
        if null is None:
            shared = torch.cat([x, condition], dim=1) @ weight[:, : 2 * dim].T
        else:
            shared, of_condition = x @ weight[:, :dim].T, condition @ weight[:, dim : 2 * dim].T
        outputs = [torch.empty_like(shared), None, None]
        if grad is not None:
            outputs[2] = torch.empty_like(shared)
            outputs[1] = outputs[2] if null is None else torch.empty_like(shared)
        members = [shared, of_condition, *_table(time), *_table(null), grad, *outputs]
        native.denoise_pass("hidden", members, shared.shape[1], len(x), *rows)
        return outputs

    def modulate(self, state, norm, modulation, rows):
        inner = torch.empty_like(state, memory_format=torch.contiguous_format)
        _norm(state, norm, modulation, rows, inner)
        return inner

    def modulate_gradient(self, state, norm, modulation, rows, grad, after, of_modulation):
        branches, count, width = state.shape
        inner, of_state = torch.empty_like(grad), torch.empty_like(grad)
        sums = native.empty(branches * -(-count // CHUNK), 2, width)
        _norm(state, norm, modulation, rows, inner, grad, after, of_state, of_modulation, sums)
        return inner, of_state, *sums.sum(0).to(state.dtype)

    def fold(self, state, modulation, rows):
        folded = state.new_empty(state.shape[1:])
        _norm(state, (None, None), modulation, rows, folded)
        return folded

    def fold_gradient(self, state, modulation, rows, grad):
        branches, count, width = state.shape
        folded, of_state = torch.empty_like(grad), torch.empty_like(state)
        of_modulation = state.new_empty(branches, count, 2 * width)
        _norm(state, (None, None), modulation, rows, folded, grad, None, of_state, of_modulation)
        return folded, of_state, of_modulation

    def expand_gradient(self, grad, weight, before):
        grad, active = grad @ weight, torch.empty_like(before)
        width = grad.shape[-1]
        native.denoise_pass("silu_gradient", [before, grad, active], width, grad.numel() // width)
        return grad, active

    def residual(self, state, active, weight, bias, modulation, rows):
        value = F.linear(active, weight, bias)
        after = torch.empty_like(value)
        _residual(state, value, modulation, rows, None, after)
        return after, value

    def residual_gradient(self, grad, value, modulation, rows, of_modulation):
        of_value = torch.empty_like(grad)
        _residual(value, value, modulation, rows, grad, of_value, of_modulation)
        return of_value

    def sum_rows(self, values, table, rows):
        if len(table) == 1 or rows.index is None:
            return super().sum_rows(values, table, rows)
        count, width = values.shape
        out = native.empty(len(table), width)
        members = [values, out, len(table)]
        native.denoise_pass("sum_by_index", members, width, count, rows.index)
        return out.to(values.dtype)


def _norm(
    state, norm, modulation, rows, inner, grad=None, after=None, of_state=None,
    of_modulation=None, sums=None,
):  # fmt: skip
    branches, count, width = state.shape
    members = [
        state, branches, int(inner.dim() == 2), state.stride(0), *norm, *_table(modulation.users),
        *_table(modulation.time), *_table(modulation.null), inner, grad, after, of_state,
        of_modulation, 0 if of_modulation is None else of_modulation.stride(1), sums,
    ]  # fmt: skip
    native.denoise_pass("norm", members, width, count, *rows)


def _residual(state, value, modulation, rows, grad, out, of_modulation=None):
    branches, count, width = value.shape
    members = [
        state, branches, state.stride(0), value, *_table(modulation.users),
        *_table(modulation.time), *_table(modulation.null), grad, out, of_modulation,
        0 if of_modulation is None else of_modulation.stride(1),
    ]  # fmt: skip
    native.denoise_pass("residual", members, width, count, *rows)


def _obstacle(x: Tensor, condition, t, weights, description, *rest) -> str | None:
    if x.device.type != "cpu":
        return f"CPU tensors, got {x.device}"
    if x.dtype not in DTYPES:
        return f"float32 or bfloat16, got {str(x.dtype).removeprefix('torch.')}"
    if reason := obstacle(x, condition, t, weights, description):
        return reason
    return None if native.serves(x) else f"the extension: {native.why_missing()}"


def _slower(x, condition, t, weights, description, guidance, drop) -> bool:
    """With gradients, working activations out again costs about a third more than keeping them
    (measured: 0.6 to 0.9 times the reference's speed), unless other savings outweigh it: those of
    guidance from 256 rows on (MLP: 1.1 to 1.7 times; AdaLN: 1.0 to 1.3 times in float32, 0.9 to
    1.3 in bfloat16), and in an MLP, those of time steps that many rows share (1.0 to 1.6 times
    from 1,024 rows on). Without gradients it is 1.0 to 3 times as fast.
    """
    tensors = (x, *weights) if condition is None else (x, condition, *weights)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return False
    mlp = description.startswith("mlp ")
    if guidance and condition is not None:
        return len(x) < 256 or not (mlp or x.dtype == torch.float32)
    return not (mlp and len(t) >= 1024)


_steps = CppSteps()


@implements("denoise", CPP, obstacle=_obstacle, slower=_slower)
def _denoise(*arguments) -> Tensor:
    return denoise_recomputed(_steps, *arguments)
