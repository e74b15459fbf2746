"""The `mlp` denoiser's guided sampler as well-written PyTorch, timed as a replayed CUDA graph.

    python bench/torch_sampler.py             # eager kernels, captured
    python bench/torch_sampler.py --compile   # torch.compile of the step, captured

This is the baseline a fused sampler has to beat. Everything independent of x leaves the loop (the
condition's and the time's share of the first layer), guidance is folded into the hidden layer,
(1+w) W2 g(a_c) - w W2 g(a_0) = W2 ((1+w) g(a_c) - w g(a_0)), and the noise is drawn and scaled in
bulk. The state stays in fp32 when the weights are bf16. Beside it stands the package's own plan,
which does none of this and draws its counter-based noise with plain integer arithmetic.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_timing import arguments, capture, measure, relative_error, report

from contrec_fast.models import MLPDenoiser
from contrec_fast.ops import plan_sampling


class TorchSampler(nn.Module):
    """Sampler of an `MLPDenoiser` along a plan's steps.

    Args:
        denoiser: MLPDenoiser of width D; its parameters are copied.
        timestep_indices: [steps] int64, in execution order.
        coefficients: [steps, 6] float64 of each executed step; none may use the prediction of
        the step before (ValueError).
        guidance: w of classifier-free guidance.
        dtype: of weights and products; the state is fp32, or float64 with float64 weights.
        compiled: torch.compile the step.
    """

    def __init__(
        self,
        denoiser: MLPDenoiser,
        timestep_indices: Tensor,
        coefficients: Tensor,
        guidance: float,
        dtype: torch.dtype,
        compiled: bool = False,
    ):
        super().__init__()
        self.guidance = guidance
        self.dtype = dtype
        self.state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        c_x0, c_x, sigma, c_previous, p_x, p_f = coefficients.unbind(1)
        if c_previous.any():
            raise ValueError("coefficients: expected a solver of one step, got a multistep one")
        # In terms of the network's output: its coefficient, the state's, the noise's.
        coefficients = torch.stack([c_x0 * p_f, c_x0 * p_x + c_x, sigma], dim=1)
        self.scalars = coefficients.tolist()
        # [steps, 4]: with a fourth column every row is aligned, as compiled kernels want it.
        self.coefficients = F.pad(coefficients, (0, 1)).to(denoiser.null_condition.device)
        self.coefficients = self.coefficients.to(self.state_dtype)
        with torch.no_grad():
            of_x, of_condition, of_time = denoiser.hidden.weight.double().chunk(3, dim=1)
            bias = denoiser.hidden.bias.double()
            times = denoiser.time_embedding(timestep_indices).double() @ of_time.T + bias
            null = denoiser.null_condition.double() @ of_condition.T
            self.times = times.to(dtype)  # [steps, 2D]
            self.null = null.to(dtype)  # [2D]
            self.of_x = of_x.T.to(dtype).contiguous()  # [D, 2D]
            self.of_condition = of_condition.T.to(dtype).contiguous()
            self.output = denoiser.output.weight.T.to(dtype).contiguous()  # [2D, D]
            self.output_bias = denoiser.output.bias.to(self.state_dtype)
        self.compiled = compiled
        self.step = torch.compile(self._fused_step, dynamic=False) if compiled else self._step

    @classmethod
    def from_plan(cls, denoiser, plan, guidance, dtype, compiled=False):
        """The sampler of a `contrec_fast.ops.plan_sampling` plan."""
        return cls(denoiser, plan.timestep_indices, plan.coefficients, guidance, dtype, compiled)

    def _hidden(self, x: Tensor, branches: Tensor, time: Tensor) -> Tensor:
        shared = torch.addmm(time, x.to(self.dtype), self.of_x)
        conditioned, null = F.gelu(shared + branches)
        return torch.lerp(null, conditioned, 1 + self.guidance)

    def _step(self, x, branches, time, noise, scalars):
        hidden = self._hidden(x, branches, time)
        kept = torch.add(noise, x, alpha=scalars[1])
        if self.dtype == self.state_dtype:
            return torch.addmm(kept, hidden, self.output, alpha=scalars[0])
        return kept.add_(hidden @ self.output, alpha=scalars[0])

    def _fused_step(self, x, branches, time, noise, coefficients):
        # The same for the compiler, which fuses it: the coefficients are tensors, because numbers
        # would be compiled in, once per step.
        f = self._hidden(x, branches, time) @ self.output
        return noise + coefficients[1] * x + coefficients[0] * f

    def forward(self, condition: Tensor, noise: Tensor | None = None) -> Tensor:
        """Sample.

        Args:
            condition: [B, D]. noise: [steps, B, D] standard normals (entry 0 is x_T, entry i + 1
                is added after step i); drawn here if None.

        Returns:
            vectors [B, D] in the state's dtype.
        """
        steps, batch, dim = len(self.scalars), *condition.shape
        if noise is None:
            noise = torch.randn(steps, batch, dim, device=condition.device, dtype=self.state_dtype)
        noise = noise.to(self.state_dtype)
        c_f, _, sigma, _ = self.coefficients.T[:, :, None, None]  # [steps, 1, 1] each
        # What a step adds whatever x is: its scaled noise and its share of the output bias.
        added = torch.addcmul(c_f[:-1] * self.output_bias, sigma[:-1], noise[1:])
        last = (c_f[-1] * self.output_bias).expand(batch, dim).contiguous()
        projected = condition.to(self.dtype) @ self.of_condition
        branches = torch.stack([projected, self.null.expand_as(projected)])  # [2, B, 2D]
        numbers = self.coefficients if self.compiled else self.scalars
        x = noise[0]
        for i in range(steps):
            x = self.step(
                x, branches, self.times[i], added[i] if i < steps - 1 else last, numbers[i]
            )
        return x


def main() -> bool:
    asked = arguments(
        __doc__.splitlines()[0],
        batches=[1, 64, 1024, 4096],
        dim=512,
        steps=200,
        guidance=2.0,
        compile=False,
    )
    device = asked.device
    torch.backends.cuda.matmul.allow_tf32 = False
    denoiser = MLPDenoiser(asked.dim).to(device).eval().requires_grad_(False)
    plan = plan_sampling(denoiser, timesteps=asked.steps, guidance=asked.guidance)

    def sampler(dtype, compiled=False):
        return TorchSampler.from_plan(denoiser, plan, asked.guidance, dtype, compiled)

    exact = sampler(torch.float64)
    samplers = {("torch", "bf16"): sampler(torch.bfloat16, asked.compile)}
    if not asked.compile:
        samplers["torch", "fp32"] = sampler(torch.float32)
        samplers["plan", "fp32"] = plan
    right = True
    for batch in asked.batches:
        condition = torch.randn(batch, asked.dim, device=device)
        given = torch.randn(asked.steps, batch, asked.dim, device=device)
        with torch.no_grad():  # rows are independent: a few stand for all
            reference = exact(condition[:8].double(), given[:, :8].double())
        for (name, dtype), run in samplers.items():
            for source in ("given", "drawn"):
                noise = given if source == "given" else None

                def call(run=run, noise=noise, condition=condition):
                    return run(condition, noise=noise)

                replay, output = capture(call, device)
                timing = measure(replay, device)
                figures = {"us_per_step": timing["median"] / asked.steps}
                figures["users_per_s"] = 1e6 * batch / timing["median"]
                if source == "given":
                    with torch.no_grad():
                        output = call() if output is None else output
                        error = relative_error(output[:8], reference)
                    figures["relative_error"] = error
                    figures["verified"] = error < (1e-4 if dtype == "fp32" else 5e-2)
                    right &= figures["verified"]
                report(
                    "torch_sampler",
                    sampler=name,
                    mode="compile" if asked.compile else "eager",
                    batch=batch,
                    dim=asked.dim,
                    steps=asked.steps,
                    dtype=dtype,
                    noise=source,
                    **timing,
                    **figures,
                )
                del replay, output
        del given
    return right


if __name__ == "__main__":
    sys.exit(not main())
