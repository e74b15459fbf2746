"""`sample`: a plan made once, then conditions to vectors by the reverse diffusion.

The plan holds everything that does not depend on the users. `SamplingPlan.__call__` with
`draw="path"` follows the chain step by step; with `draw="law"` it samples the chain's exact
distribution, which is Gaussian for a linear denoiser (all of its steps are affine).
"""

import torch
from torch import Tensor, nn

import contrec_fast.ops.sampling_cpp  # noqa: F401, registers itself
import contrec_fast.ops.triton_sampling  # noqa: F401, likewise
from contrec_fast.models.denoisers import Denoiser, LinearDenoiser
from contrec_fast.models.schedules import (
    alpha_bars,
    count_noises,
    is_multistep,
    respaced_indices,
    run_sampler,
    sampler_coefficients,
)
from contrec_fast.ops.checks import check
from contrec_fast.ops.denoise import describe, guided
from contrec_fast.ops.dispatch import implements, resolve
from contrec_fast.ops.hoisting import linear_law, version
from contrec_fast.ops.noise import MAX_STEPS, philox_normal

# Matrix products of few rows take other code paths in CPU libraries and round differently;
# a whole number of these blocks keeps a row's bits independent of its batch, as long as the
# layers' widths are whole numbers of them too.
ROW_BLOCK = 16


def step_noise(
    condition: Tensor, seed: Tensor, user_ids: Tensor, samples: int, noise: Tensor | None, step: int
) -> Tensor:
    """Noise [S, B, D] of one step: scripted if given, else counter-based."""
    if noise is not None:
        return noise[:, step]
    dim = condition.shape[1]
    draws = [philox_normal(seed, user_ids, dim, step, draw) for draw in range(samples)]
    return torch.stack(draws).to(condition.dtype)


@implements("sample")
def _sample(
    condition: Tensor,
    seed: Tensor,
    user_ids: Tensor,
    samples: int,
    noise: Tensor | None,
    weights: list[Tensor],
    times: Tensor,
    coefficients: Tensor,
    noises: int,
    multistep: bool,
    description: str,
    guidance: float,
) -> Tensor:
    """Step by step, all draws of all users as rows of one batch.

    Args:
        condition: [B, D]. seed: int64 scalar. user_ids: [B] int64. noise: [S, steps, B, D].
        weights, description: the denoiser. times: [steps, D] time embeddings.
        coefficients: [steps, 6] of `schedules.sampler_coefficients`. noises: how many the
        chain takes. multistep: whether a step uses the prediction of the one before.

    Returns:
        [S, B, D].
    """
    batch, dim = condition.shape
    if batch == 0:
        return condition.new_empty(samples, 0, dim)
    rows = samples * batch
    padded = -(-rows // ROW_BLOCK) * ROW_BLOCK

    def as_rows(tensor: Tensor) -> Tensor:
        return nn.functional.pad(tensor.reshape(rows, dim), (0, 0, 0, padded - rows))

    def noise_of(step: int) -> Tensor:
        return as_rows(step_noise(condition, seed, user_ids, samples, noise, step))

    condition_rows = as_rows(condition.expand(samples, batch, dim))

    def network(x: Tensor, step: int) -> Tensor:
        return guided(description, weights, x, condition_rows, times[step], guidance)

    x = run_sampler(network, coefficients, noises, noise_of, multistep)
    return x[:rows].reshape(samples, batch, dim)


@torch.library.custom_op("contrec::sample", mutates_args=())
def _registered(
    condition: Tensor,
    seed: Tensor,
    user_ids: Tensor,
    samples: int,
    noise: Tensor | None,
    weights: list[Tensor],
    times: Tensor,
    coefficients: Tensor,
    noises: int,
    multistep: bool,
    description: str,
    guidance: float,
    backend: str,
) -> Tensor:
    arguments = (
        condition, seed, user_ids, samples, noise, weights, times, coefficients, noises,
        multistep, description, guidance,
    )  # fmt: skip
    return resolve("sample", backend, *arguments)(*arguments)


@_registered.register_fake
def _(condition, seed, user_ids, samples, *rest):
    return condition.new_empty(samples, *condition.shape)


class SamplingPlan(nn.Module):
    """What a sampler needs besides the users: frozen weights, time embeddings, coefficients.

    Made by `plan_sampling`. Buffers: `coefficients` [steps, 6] float64, `timestep_indices`
    [steps] int64 and `times` [steps, D], all in the order in which steps are executed.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: str,
        timesteps: int,
        method: str,
        steps: int | None,
        guidance: float,
        prediction: str,
    ):
        super().__init__()
        self.description, self.guidance, self.dim = describe(denoiser), guidance, denoiser.dim
        self.linear = isinstance(denoiser, LinearDenoiser)
        # Not registered: only watched, to notice that the plan has grown stale.
        self._sources = tuple((p, version(p)) for p in denoiser.parameters())
        device = denoiser.null_condition.device
        indices = respaced_indices(timesteps, steps)
        alpha_bar = alpha_bars(schedule, timesteps)
        coefficients = sampler_coefficients(alpha_bar, indices, method, prediction)
        with torch.no_grad():
            times = denoiser.time_embedding(indices.to(device))
        self.steps = len(indices)
        self.noises, self.multistep = count_noises(coefficients), is_multistep(coefficients)
        self.register_buffer("timestep_indices", indices.to(device), persistent=False)
        self.register_buffer("coefficients", coefficients.to(device), persistent=False)
        self.register_buffer("times", times, persistent=False)
        self._names = []
        for name, parameter in denoiser.named_parameters():
            self._names.append("weight_" + name.replace(".", "_"))
            self.register_buffer(self._names[-1], parameter.detach().clone(), persistent=False)
        self._law = None

    @property
    def weights(self) -> list[Tensor]:
        """Frozen copies of the denoiser's parameters, in its order."""
        return [getattr(self, name) for name in self._names]

    def forward(
        self,
        condition: Tensor,
        seed: int | Tensor = 0,
        user_ids: Tensor | None = None,
        samples: int = 1,
        noise: Tensor | None = None,
        draw: str = "path",
        backend: str = "auto",
    ) -> Tensor:
        """Sample item-space vectors. Nothing here waits for a GPU (but see `draw`).

        Args:
            condition: [B, D] in the denoiser's dtype, on the plan's device.
            seed: key of the noise, an int or an int64 scalar tensor; one on the plan's device
                lets a captured CUDA graph replay with other seeds.
            user_ids: [B] int64 stable ids that key the noise; 0..B-1 if not given. A user's
                vector depends on its id and the seed, not on its place in the batch: bitwise
                for "path" on the CPU in float32 and bfloat16 when the widths are multiples of
                16, else up to rounding.
            samples: draws per user, S.
            noise: scripted noise instead: [steps, B, D], entry 0 is x_T, then one entry per
                ancestral step except the last ([1, B, D] is enough for a deterministic method
                and for `draw="law"`); with several draws [S, steps, B, D].
            draw: "path" follows the chain; "law" draws from its distribution in closed form
                (linear denoisers only), using the noise of entry 0; the first such call works
                the law out, and must not be in compiled code.
            backend: "auto" or a name from `ops.backends()`.

        Returns:
            [B, D], or [S, B, D] for several draws.

        Raises:
            RuntimeError: the denoiser's parameters changed since the plan was made (in
                compiled code this is checked when tracing).
            TypeError, ValueError: wrong dtype, shape, device, draw or backend, in one line.
        """
        if not torch.compiler.is_compiling():
            self.check_fresh()
        check("condition", condition, ("B", self.dim), (self.times.dtype,), like=self.times)
        if not isinstance(samples, int) or samples < 1 or samples >= MAX_STEPS:
            raise ValueError(f"samples: expected 1 to {MAX_STEPS - 1}, got {samples!r}")
        batch, device = len(condition), condition.device
        if draw not in ("path", "law"):
            raise ValueError(f"draw: expected 'path' or 'law', got {draw!r}")
        if draw == "law" and not self.linear:
            raise ValueError("draw: 'law' needs a LinearDenoiser; other chains are not Gaussian")
        if user_ids is None:
            user_ids = torch.arange(batch, device=device)
        check("user_ids", user_ids, (batch,), (torch.int64,), like=condition)
        if isinstance(seed, Tensor):
            check("seed", seed, (), (torch.int64,))
        elif not isinstance(seed, int):
            raise TypeError(f"seed: expected an int or a tensor, got {type(seed).__name__}")
        elif not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed: expected a 64-bit integer, got {seed}")
        else:  # a fill, where a copy to a GPU would wait for it
            seed = torch.full((), seed, dtype=torch.int64, device=device)
        seed = seed.to(device)
        if noise is not None:
            noise = self._check_noise(noise, condition, samples, draw)
        chain = self._chain() if draw == "path" else self._law_chain()
        arguments = condition, seed, user_ids, samples, noise, *chain
        if torch.compiler.is_compiling():
            y = torch.ops.contrec.sample(*arguments, backend)
        else:
            with torch.no_grad():
                y = resolve("sample", backend, *arguments)(*arguments)
        return y if samples > 1 else y[0]

    def check_fresh(self):
        """Raise RuntimeError if the denoiser has changed since the plan was made."""
        if any(version(parameter) != made for parameter, made in self._sources):
            raise RuntimeError(
                "plan: the denoiser's parameters changed after plan_sampling; make a new plan"
            )

    def _check_noise(self, noise: Tensor, condition: Tensor, samples: int, draw: str) -> Tensor:
        """Scripted noise as [S, steps, B, D]."""
        needed = 1 if draw == "law" else self.noises
        lead = (samples, "steps") if samples > 1 else ("steps",)
        check("noise", noise, (*lead, *condition.shape), (condition.dtype,), like=condition)
        entries = noise.shape[-3]
        if entries not in (needed, self.steps):
            raise ValueError(f"noise: expected {needed} or {self.steps} steps, got {entries}")
        return noise if samples > 1 else noise[None]

    def _chain(self) -> tuple:
        """The operator's arguments from `weights` on."""
        return (
            self.weights, self.times, self.coefficients, self.noises, self.multistep,
            self.description, float(self.guidance),
        )  # fmt: skip

    @torch.no_grad()
    def _law_chain(self) -> tuple:
        """The chain's law as a chain of one step, whose prediction is `L x_T + M h + m`."""
        if self._law is None or self._law[1].device != self.times.device:
            weight, null = self.weight_output_weight, self.weight_null_condition
            matrix, offset, factor = linear_law(
                weight, self.weight_output_bias, null, self.times, self.coefficients, self.guidance
            )
            law = {
                "weight_null_condition": torch.zeros_like(null),
                "weight_output_weight": torch.cat([factor, matrix, torch.zeros_like(matrix)], 1),
                "weight_output_bias": offset,
            }
            weights = [law.get(name, own) for name, own in zip(self._names, self.weights)]
            last = self.coefficients.new_tensor([[1, 0, 0, 0, 0, 1]])
            times = torch.zeros_like(self.times[:1])
            self._law = weights, times, last, 1, False, self.description, 0.0
        return self._law


def plan_sampling(
    denoiser: Denoiser,
    schedule: str = "exp",
    timesteps: int = 200,
    method: str = "ddpm",
    steps: int | None = None,
    guidance: float = 2.0,
    prediction: str = "x0",
) -> SamplingPlan:
    """Prepare a sampler; call the plan with conditions to draw vectors.

    Args:
        denoiser: LinearDenoiser, MLPDenoiser or AdaLNDenoiser.
        schedule: "exp", "linear", "cosine" or "sqrt" (`models.schedules.alpha_bars`).
        timesteps: T, the steps of the training schedule.
        method: "ddpm" (ancestral), "ddim" or "dpm++" (deterministic; the latter of order 2).
        steps: how many of the T steps to visit, evenly spaced; all of them if not given.
        guidance: w in `(1 + w) f(x, h, t) - w f(x, null, t)`; 0 switches it off.
        prediction: what the denoiser was trained to predict, "x0", "eps" or "v".

    Raises:
        TypeError, ValueError: an argument is unknown or out of range, in one line.
    """
    if not isinstance(timesteps, int) or not 1 <= timesteps < MAX_STEPS:
        raise ValueError(f"timesteps: expected 1 to {MAX_STEPS - 1}, got {timesteps!r}")
    if steps is not None and not isinstance(steps, int):
        raise ValueError(f"steps: expected a whole number, got {steps!r}")
    if not isinstance(guidance, (int, float)) or not abs(guidance) < float("inf"):
        raise ValueError(f"guidance: expected a finite number, got {guidance!r}")
    return SamplingPlan(denoiser, schedule, timesteps, method, steps, guidance, prediction)
