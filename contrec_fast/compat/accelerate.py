"""The released code's own objects, made to sample by a plan, in place."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from contrec_fast.compat.checkpoint import UNUSED, diffusion_modules
from contrec_fast.compat.modules import ReleasedConditionEncoder
from contrec_fast.compat.state import Weights
from contrec_fast.models.denoisers import Denoiser, MLPDenoiser
from contrec_fast.ops.sampling import SamplingPlan, plan_sampling

NETWORK = (
    "none_embedding", "positional_embeddings", "step_mlp", "diffuser", "item_embeddings",
    "forward", "forward_uncon", "predict",
)  # fmt: skip
TABLES = ("posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance")
SAMPLER = ("timesteps", "w", *TABLES, "sample")
NOT_USED = (*UNUSED, "item_embeddings")  # by the plan
TOLERANCE = 1e-2  # of the check that both compute the same, above what TF32 rounds off


def accelerate_released(diffusion_net: nn.Module, ddpm) -> "Acceleration":
    """Let the released code's objects sample by a plan, and encode conditions at one position.

    `ddpm.sample` and `diffusion_net.predict` are replaced in place; their arguments and results
    stay what they are. In `ModelInterface`, these objects are `model.diffusion_net` and
    `model.ddpm`.

    What is equal: noise is drawn by the same calls in the same order, from torch's global
    generator of the conditions' device, which is left in the same state. With this noise the
    network's time embeddings, the weights and the sampler's tables are the objects' own, so
    vectors differ by rounding only, and scores with them: sums are taken in another order, and
    conditions are not computed by convolutions, for which GPUs use TF32 by default. What is not
    equal: nothing returned carries gradients, and all noise is held at once, [timesteps, B, D].

    A call that is not the released one goes to the original method: `predict` in training mode
    (dropout) or with another sampler, `sample` with other networks or conditions of another shape,
    layout or dtype. The plan is made anew when weights, tables or `w` have changed.

    Args:
        diffusion_net: a `Tenc` of type "mlp1" or "mlp2". ddpm: a `diffusion`, of any schedule.

    Returns:
        What undoes it: `restore()`, or the end of a `with` block around it.

    Raises:
        TypeError, ValueError: other objects, in one line that names what is missing or different.
    """
    return Acceleration(diffusion_net, ddpm)


class _Parts(NamedTuple):
    """What was made of the objects, and copies of what it was made of."""

    made_of: list
    denoiser: Denoiser
    encoder: ReleasedConditionEncoder
    plan: SamplingPlan
    scale: Tensor  # of the last step's prediction, 1 up to the rounding of the tables

    def sample(self, h: Tensor) -> Tensor:
        noise = torch.empty((self.plan.steps, *h.shape), dtype=h.dtype, device=h.device)
        for entry in noise:
            entry.normal_()  # one by one, as `randn_like` there
        return self.plan(h, noise=noise) * self.scale


class Acceleration:
    """Two released objects while `sample` and `predict` are replaced; see `accelerate_released`.

    The replacements are this object's methods, so that a deep copy of the objects is one of all.
    """

    def __init__(self, diffusion_net: nn.Module, ddpm):
        _require("diffusion_net", diffusion_net, NETWORK, "Tenc")
        _require("ddpm", ddpm, SAMPLER, "diffusion")
        self.diffusion_net, self.ddpm = diffusion_net, ddpm
        self._parts = None
        self._original_sample, self._original_predict = ddpm.sample, diffusion_net.predict
        self._check_same()
        self._before = [
            (owner, name, vars(owner).get(name))
            for owner, name in ((ddpm, "sample"), (diffusion_net, "predict"))
        ]
        ddpm.sample, diffusion_net.predict = self.sample, self.predict

    def restore(self) -> None:
        """Put the original methods back; a second time does nothing."""
        for owner, name, before in self._before:
            if before is None:
                delattr(owner, name)  # so that the class's method shows again
            else:
                setattr(owner, name, before)
        self._before = []

    def __enter__(self) -> "Acceleration":
        return self

    def __exit__(self, *error) -> None:
        self.restore()

    def __getstate__(self) -> dict:
        return vars(self) | {"_parts": None}  # a copy makes its own

    def __repr__(self) -> str:
        kind = "mlp2" if isinstance(self._current().denoiser, MLPDenoiser) else "mlp1"
        plan = self._current().plan
        return f"Acceleration({kind}, D {plan.dim}, {plan.steps} steps, guidance {plan.guidance:g})"

    @torch.no_grad()
    def sample(self, model_forward, model_forward_uncon, h: Tensor) -> Tensor:
        """Conditions [B, D] to vectors [B, D], as the released `diffusion.sample`."""
        net, parts = self.diffusion_net, self._current()
        ours = model_forward == net.forward and model_forward_uncon == net.forward_uncon
        # Noise for conditions that are not contiguous is drawn in their layout, not the network's.
        plain = h.dim() == 2 and h.dtype == parts.plan.times.dtype and h.is_contiguous()
        if not ours or not plain:
            return self._original_sample(model_forward, model_forward_uncon, h)
        return parts.sample(h)

    @torch.no_grad()
    def predict(self, states: Tensor, len_states, diff) -> tuple[Tensor, Tensor]:
        """States [B, S, D] to vectors [B, D] and their products with all items [B, N]."""
        net, parts = self.diffusion_net, self._current()
        if net.training or diff is not self.ddpm or states.dtype != parts.plan.times.dtype:
            return self._original_predict(states, len_states, diff)
        x = parts.sample(parts.encoder(states))
        return x, x @ net.item_embeddings.T

    def _current(self) -> _Parts:
        """Plan and encoder of the objects as they are now."""
        net, ddpm = self.diffusion_net, self.ddpm
        tables = [getattr(ddpm, name) for name in TABLES]
        for name, table in zip(TABLES, tables):
            if not isinstance(table, Tensor) or table.shape != (ddpm.timesteps,):
                got = list(table.shape) if isinstance(table, Tensor) else type(table).__name__
                raise ValueError(f"ddpm: expected {ddpm.timesteps} numbers as {name}, got {got}")
        state = net.state_dict()
        used = [tensor for name, tensor in state.items() if not name.startswith(NOT_USED)]
        made_of = [ddpm.w, ddpm.timesteps, *tables, *used]
        if self._parts is None or not _same(self._parts.made_of, made_of):
            weights = Weights("diffusion_net", state)
            denoiser, encoder = diffusion_modules(weights)
            weights.close(*NOT_USED)
            weights.problems.finish()
            plan = plan_sampling(denoiser, timesteps=ddpm.timesteps, guidance=ddpm.w)
            scale = _tabulate(plan, *tables)
            with torch.no_grad():
                plan.times.copy_(net.step_mlp(plan.timestep_indices))
            copies = copy.deepcopy([getattr(value, "data", value) for value in made_of])
            self._parts = _Parts(copies, denoiser, encoder.eval(), plan, scale)
        return self._parts

    @torch.no_grad()
    def _check_same(self) -> None:
        """Refuse networks that compute something else in spite of the same attributes."""
        net, (_, denoiser, encoder, plan, _) = self.diffusion_net, self._current()
        positions = encoder.positional_embeddings.weight
        generator = torch.Generator().manual_seed(0)  # not torch's own, which is the caller's
        x, h = torch.randn(2, 2, plan.dim, generator=generator).to(positions)
        states = torch.randn(2, *positions.shape, generator=generator).to(positions)
        t = torch.tensor([0, plan.steps - 1], device=x.device)
        time = plan.times.flip(0)[t]
        modes = {module: module.training for module in net.modules()}
        try:
            net.eval()
            pairs = [
                ("forward", net.forward(x, h, t), denoiser.predict(x, h, time)),
                ("forward_uncon", net.forward_uncon(x, t),
                 denoiser.predict(x, denoiser.null_condition.expand_as(x), time)),
                ("predict", self._original_predict(states, [len(positions)] * 2, _Echo())[0],
                 encoder(states)),
            ]  # fmt: skip
        except Exception as error:  # of any kind: it is unknown code
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"diffusion_net: expected a released Tenc, got {reason}") from None
        finally:
            for module, mode in modes.items():
                module.training = mode
        for name, found, expected in pairs:
            if not (found - expected).norm() <= TOLERANCE * expected.norm():
                raise ValueError(
                    f"diffusion_net: expected the released {name}, got one with other results"
                )


class _Echo:
    """A sampler whose result is the condition."""

    def sample(self, model_forward, model_forward_uncon, h: Tensor) -> Tensor:
        return h


def _same(made_of: list, now: list) -> bool:
    """By content: the steps of a fused optimizer change no version counter."""
    return len(made_of) == len(now) and all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
        if isinstance(a, Tensor)
        else a == b
        for a, b in zip(made_of, now)
    )


def _tabulate(plan: SamplingPlan, of_x0: Tensor, of_x: Tensor, variance: Tensor) -> Tensor:
    """Put a sampler's own tables [T] into a plan of T steps; return what scales its result.

    A plan ends on its prediction; so does the release, but for the rounding of its tables.
    """
    if of_x[0] != 0:
        raise ValueError(f"ddpm: expected posterior_mean_coef2[0] to be 0, got {float(of_x[0])}")
    rows = torch.zeros_like(plan.coefficients)
    columns = of_x0.double(), of_x.double(), variance.sqrt().double()
    rows[:, :3] = torch.stack(columns, dim=1).flip(0)
    rows[:, 5] = 1
    rows[-1, :3] = rows.new_tensor([1, 0, 0])
    plan.coefficients.copy_(rows)
    return of_x0[0].to(plan.times)


def _require(name: str, owner, attributes: tuple[str, ...], kind: str) -> None:
    missing = [attribute for attribute in attributes if not hasattr(owner, attribute)]
    if missing:
        got = type(owner).__name__
        raise TypeError(f"{name}: expected a released {kind}, got {got} without {missing[0]}")
    method = vars(owner).get("sample", vars(owner).get("predict"))
    if isinstance(getattr(method, "__self__", None), Acceleration):
        raise ValueError(f"{name}: expected one that is not accelerated yet, got one that is")
