"""`denoise` that keeps nothing but its inputs: activations are worked out again for the gradients.

The evaluation of `MLPDenoiser` and `AdaLNDenoiser`, and its gradients, in terms of `Steps`. Against
the reference it saves arithmetic, too (all exact in real numbers):

- both branches of the guidance share the product with x, and the output layer comes once, after
  they are folded;
- what depends on the time alone is computed once per distinct step (on a GPU, where looking for
  equal ones would wait for it, once per row unless t is [1]);
- what depends on the time and the null condition alone needs no rows of the batch.

Gradients of weights and inputs are plain products, `dW = dY^T X` and `dX = dY W`: the library's,
for there is nothing around them to fuse.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from contrec_fast.ops.denoise import embed_time, rebuild
from contrec_fast.ops.denoise_steps import SILU_GRADIENT, Modulation, Rows, Steps
from contrec_fast.ops.dispatch import implements

FEW_ROWS = 64  # below, looking for equal time steps costs more than it saves


def denoise_recomputed(
    steps: Steps, x, condition, t, weights, description, guidance, drop
) -> Tensor:
    """As the reference of `ops.denoise`, by the given steps; differentiable once."""
    return _Recomputed.apply((steps, description, guidance), x, condition, t, drop, *weights)


def obstacle(x: Tensor, condition, t, weights, description, *rest) -> str | None:
    """What keeps the recomputing versions from serving a call, whatever their steps."""
    if description.startswith("linear "):
        return "an mlp or adaln denoiser (a linear one is a single product of the library)"
    if any(weight.dtype != x.dtype for weight in weights):
        return "weights of one dtype"
    if torch.is_autocast_enabled(x.device.type):
        return "no autocast, under which products have another dtype"
    if torch.compiler.is_compiling():
        return "an eager call, got one that is being compiled"
    return None


_plain = Steps()


@implements("denoise", "recompute", obstacle=obstacle)
def _recompute(*arguments) -> Tensor:
    return denoise_recomputed(_plain, *arguments)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, *arguments):
        ctx.settings = settings
        ctx.save_for_backward(*arguments)
        return _evaluation(settings, *arguments).output()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # The products of the forward pass, whatever the caller is inside of now.
        with torch.autocast(grad.device.type, enabled=False):
            evaluation = _evaluation(ctx.settings, *ctx.saved_tensors)
            return None, *evaluation.gradients(grad.contiguous(), ctx.needs_input_grad[1])


def _evaluation(settings, x, condition, t, drop, *weights) -> "_Evaluation":
    kind = _MLP if settings[1].startswith("mlp ") else _AdaLN
    return kind(settings, x, condition, t, drop, weights)


class _Evaluation:
    """What both networks have in common.

    A network has `tables(weights)`: what depends on the time, [U, .], and on the null condition
    (None if that is not asked for), in plain PyTorch; `output()`; and `backward(grad, tables)`,
    which fills `self.of` by name and returns gradients of what x and the condition were multiplied
    with, these weights, and gradients of the tables.
    """

    def __init__(self, settings, x, condition, t, drop, weights):
        self.steps, self.description, guidance = settings
        self.names = rebuild(self.description)[1]
        self.weights = {name: w.contiguous() for name, w in zip(self.names, weights)}
        drop = None if drop is None else drop.contiguous()
        self.null, self.x, self.drop = self.weights["null_condition"], x.contiguous(), drop
        self.conditional = condition is not None
        if not self.conditional:
            condition, drop, guidance = self.null.expand_as(x), None, 0.0
        elif drop is not None:
            condition = torch.where(drop[:, None], self.null, condition)
        self.condition, self.guided, index = condition.contiguous(), guidance != 0, None
        if self.steps.by_index and t.device.type == "cpu" and len(t) >= FEW_ROWS:
            t, index = t.unique(return_inverse=True)
        self.t, self.rows = t, Rows(index, guidance, drop)

    def embed_time(self, weights: dict[str, Tensor]) -> Tensor:
        return embed_time(self.description, [weights[name] for name in self.names], self.t)

    def add(self, name: str, grad: Tensor):
        """To the gradient of a weight."""
        self.of[name] = self.of[name].add_(grad) if name in self.of else grad

    def gradients(self, grad: Tensor, of_x_wanted: bool) -> list[Tensor | None]:
        """With respect to x, the condition, t, drop and the weights."""
        self.of: dict[str, Tensor] = {}
        with torch.enable_grad():
            leaves = {name: w.detach().requires_grad_() for name, w in self.weights.items()}
            tables = self.tables(leaves)
        of_tables, (of_first, of_x), (of_second, of_condition) = self.backward(
            grad, *(None if table is None else table.detach() for table in tables)
        )
        outputs, grads = zip(*(pair for pair in zip(tables, of_tables) if pair[0] is not None))
        found = torch.autograd.grad(outputs, leaves.values(), grads, allow_unused=True)
        for name, one in zip(leaves, found):
            if one is not None:
                self.add(name, one)
        of_x = of_first @ of_x if of_x_wanted else None
        of_condition = of_second @ of_condition
        if not self.conditional:
            self.add("null_condition", of_condition.sum(0))
            of_condition = None
        elif self.drop is not None:
            self.add("null_condition", self.drop.to(grad.dtype) @ of_condition)
            of_condition = of_condition.masked_fill_(self.drop[:, None], 0)
        return [of_x, of_condition, None, None, *(self.of.get(name) for name in self.names)]


class _MLP(_Evaluation):
    def tables(self, weights):
        _, of_condition, of_time = weights["hidden.weight"].split(self.x.shape[1], dim=1)
        time = F.linear(self.embed_time(weights), of_time, weights["hidden.bias"])
        null = weights["null_condition"][None]
        return time, F.linear(null, of_condition) if self.guided else None

    def inputs(self, tables) -> tuple:
        return self.x, self.condition, self.weights["hidden.weight"], *tables, self.rows

    def output(self) -> Tensor:
        hidden = self.steps.hidden(*self.inputs(self.tables(self.weights)))
        return F.linear(hidden, self.weights["output.weight"], self.weights["output.bias"])

    def backward(self, grad, time, null):
        weight = self.weights["hidden.weight"]
        hidden, of_condition, of_shared = self.steps.hidden_gradient(
            *self.inputs((time, null)), grad, self.weights["output.weight"]
        )
        self.of |= {"output.weight": grad.T @ hidden, "output.bias": grad.sum(0)}
        width = self.x.shape[1]
        of_weight = torch.zeros_like(weight)
        of_weight[:, :width] = of_shared.T @ self.x
        of_weight[:, width : 2 * width] = of_condition.T @ self.condition
        self.of["hidden.weight"] = of_weight
        of_time = self.steps.sum_rows(of_shared, time, self.rows)
        of_null = (of_shared - of_condition).sum(0, keepdim=True) if self.guided else None
        of_x, of_c, _ = weight.split(width, dim=1)
        return (of_time, of_null), (of_shared, of_x), (of_condition, of_c)


class _AdaLN(_Evaluation):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.separable = "modulation.time.weight" in self.weights
        self.blocks = sum(name.endswith("norm.weight") for name in self.names)

    def tables(self, weights):
        """Their projections, through SiLU where they go into modulations as they are: the null
        condition's [1, W], or with that of the time [U, W] unless separable."""
        time = self.linear("time_input", self.embed_time(weights), weights)
        null = None
        if self.guided:
            null = self.linear("condition_input", weights["null_condition"][None], weights)
            null = F.silu(null if self.separable else time + null)
        return F.silu(time) if self.separable else time, null

    def linear(self, name: str, x: Tensor, weights=None) -> Tensor:
        weights = weights or self.weights
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def layer(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def embed(self, time: Tensor) -> Tensor:
        """The condition's projection [B, W], joined with the time's unless separable."""
        embedded = self.linear("condition_input", self.condition)
        return embedded if self.separable else embedded + self.rows.of(time)

    def modulation(self, name: str, users: Tensor, time: Tensor, null) -> Modulation:
        """Of a block or the output, from what goes into modulations."""
        of_time = F.linear(time, self.weights[f"{name}.time.weight"]) if self.separable else None
        of_null = self.linear(f"{name}.condition", null) if self.guided else None
        return Modulation(self.linear(f"{name}.condition", users), of_time, of_null)

    def run(self, time, null, users, keep: list | None = None):
        """The state behind the blocks and the output's modulation; `keep` gets, of each block,
        state, modulation, first layer before SiLU and second layer."""
        state = self.linear("input", self.x).expand(2 if self.guided else 1, -1, -1)
        for i in range(self.blocks):
            name = f"blocks.{i}"
            modulation = self.modulation(f"{name}.modulation", users, time, null)
            norm, second = self.layer(f"{name}.norm"), self.layer(f"{name}.contract")
            inner = self.steps.modulate(state, norm, modulation, self.rows)
            active, before = self.steps.expand(inner, *self.layer(f"{name}.expand"))
            after, value = self.steps.residual(state, active, *second, modulation, self.rows)
            if keep is not None:
                keep.append((state, modulation, before, value))
            state = after
        return state, self.modulation("modulation", users, time, null)

    def output(self) -> Tensor:
        time, null = self.tables(self.weights)
        state, modulation = self.run(time, null, F.silu(self.embed(time)))
        return self.linear("output", self.steps.fold(state, modulation, self.rows))

    def backward(self, grad, time, null):
        kept: list = []
        embedded = self.embed(time)
        users = F.silu(embedded)
        inputs = users, time, null
        of_inputs = [None if tensor is None else torch.zeros_like(tensor) for tensor in inputs]
        state, modulation = self.run(time, null, users, kept)

        folded, of_state, of_modulation = self.steps.fold_gradient(
            state, modulation, self.rows, self.through("output", grad)
        )
        self.of_linear("output", grad, folded)
        self.of_modulations("modulation", of_modulation, inputs, of_inputs)
        for i in reversed(range(self.blocks)):
            name, (state, modulation, before, value) = f"blocks.{i}", kept.pop()
            of_modulation = value.new_empty(*value.shape[:2], modulation.users.shape[1])
            of_value = self.steps.residual_gradient(
                of_state, value, modulation, self.rows, of_modulation
            )
            of_before, active = self.steps.expand_gradient(
                of_value, self.weights[f"{name}.contract.weight"], before
            )
            self.of_linear(f"{name}.contract", of_value, active)
            inner, of_state, *of_norm = self.steps.modulate_gradient(
                state, self.layer(f"{name}.norm"), modulation, self.rows,
                self.through(f"{name}.expand", of_before), of_state, of_modulation,
            )  # fmt: skip
            self.of_linear(f"{name}.expand", of_before, inner)
            self.of[f"{name}.norm.weight"], self.of[f"{name}.norm.bias"] = of_norm
            self.of_modulations(f"{name}.modulation", of_modulation, inputs, of_inputs)
        of_state = of_state.sum(0) if self.guided else of_state[0]
        self.of_linear("input", of_state, self.x)
        of_users, of_time, of_null = of_inputs
        of_embedded = SILU_GRADIENT(of_users, embedded)
        self.of_linear("condition_input", of_embedded, self.condition)
        if not self.separable:
            of_time = self.steps.sum_rows(of_embedded, time, self.rows)
        of_x, of_condition = (self.weights[f"{n}.weight"] for n in ("input", "condition_input"))
        return (of_time, of_null), (of_state, of_x), (of_embedded, of_condition)

    def through(self, name: str, grad: Tensor) -> Tensor:
        """Gradient of a layer's input."""
        return grad @ self.weights[f"{name}.weight"]

    def of_linear(self, name: str, grad: Tensor, x: Tensor):
        """Gradients of a layer's weight and bias."""
        grad, x = grad.flatten(0, -2), x.flatten(0, -2)
        self.add(f"{name}.weight", grad.T @ x)
        self.add(f"{name}.bias", grad.sum(0))

    def of_modulations(self, name: str, grad: Tensor, inputs, of_inputs):
        """Gradients of a modulation's weights, and of what goes into it, which add up."""
        (users, time, null), (of_users, of_time, of_null) = inputs, of_inputs
        weight = self.weights[f"{name}.condition.weight"]
        self.of_linear(f"{name}.condition", grad[0], users)
        of_users.addmm_(grad[0], weight)
        if self.guided:
            summed = self.steps.sum_rows(grad[1], null, self.rows)
            self.of_linear(f"{name}.condition", summed, null)
            of_null.addmm_(summed, weight)
        if self.separable:
            both = grad.sum(0) if self.guided else grad[0]
            summed = self.steps.sum_rows(both, time, self.rows)
            self.add(f"{name}.time.weight", summed.T @ time)
            of_time.addmm_(summed, self.weights[f"{name}.time.weight"])
