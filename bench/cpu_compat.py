"""A checkpoint with the released keys on the CPU: the released way and `compat`, in one run.

    python bench/cpu_compat.py --out RESULT.json

Weights are drawn at random, sizes and arithmetic are the release's (`released_model.py`).

- sample: conditions to vectors by 200 ancestral steps with guidance, every step (`draw="path"`), in
  float32; of the released objects as they are ("released"), of the same objects under
  `accelerate_released` ("accelerated") and by the plan of `load_released` ("plan"). The first two
  draw their noise from torch's generator, the plan counter-based noise of its own.
- whole: prompts to top-K lists through the tiny backbone with adapters, by distance:
  `ReleasedModel.generate` and its ranking, 10 users at a time as the release does, against
  `load_released_checkpoint` and its predictor, all users of a round at once. Users are new in each
  round. With random weights a response is as long as it may be, 64 tokens, and says nothing that a
  draft could foresee. Times are per user.

Variants take turns, so that other work on the machine slows all of them alike; beside the time
stands the processor's, which other work changes less. For equal noise results are compared before
anything is timed. `x torch` is over the released way. Threads: OMP_NUM_THREADS.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from released_model import Network, ReleasedModel, Sampler, write_prompts
from reporting import COLUMNS, environment, line, positive, record, store, timed
from torch import nn
from torch_timing import relative_error

from contrec_fast import native
from contrec_fast.compat import accelerate_released, load_released, load_released_checkpoint
from contrec_fast.config import BackboneConfig
from contrec_fast.data import synthetic_shop
from contrec_fast.models.backbone import make_tiny_backbone

GUIDANCE = 2.0
POSITIONS = 4  # of the condition encoder
AT_ONCE = 10  # users that the release reads at a time
HISTORY = 20  # items that a prompt shows
LIMIT = 1e-4  # relative; the release computes its tables and time embeddings in float32


def scripted(steps: int, shape) -> torch.Tensor:
    """The noise that the release draws next from torch's generator, which is left as it was."""
    with torch.random.fork_rng([]):
        return torch.stack([torch.randn(shape) for _ in range(steps)])


def require(error: float, what: str) -> None:
    if not error < LIMIT:
        raise SystemExit(f"{what}: relative error {error:.2g} to the released way")


def samplers(two_layers: bool, dim: int, args) -> dict:
    """Backend to a call without arguments: conditions [users, dim] to vectors."""
    net = Network(torch.randn(100, dim), POSITIONS, two_layers).eval().requires_grad_(False)
    ddpm = Sampler(args.steps, GUIDANCE)
    other = Sampler(args.steps, GUIDANCE)  # each with its own `sample`
    h = torch.randn(args.users, dim)
    plan = load_released(net.state_dict()).plan(timesteps=args.steps, guidance=GUIDANCE)
    noise = scripted(args.steps, h.shape)
    with torch.random.fork_rng([]):
        expected = ddpm.sample(net.forward, net.forward_uncon, h)
    require(relative_error(plan(h, noise=noise), expected), "plan")
    accelerate_released(net, other)
    with torch.random.fork_rng([]):
        require(
            relative_error(other.sample(net.forward, net.forward_uncon, h), expected), "objects"
        )
    return {
        "released": lambda: ddpm.sample(net.forward, net.forward_uncon, h),
        "accelerated": lambda: other.sample(net.forward, net.forward_uncon, h),
        "plan": lambda: plan(h),
    }


class Whole:
    """A made-up checkpoint, as the release runs it and as `compat` does."""

    def __init__(self, two_layers: bool, args):
        self.args, self.items = args, synthetic_shop().items
        dim = args.whole_dim
        with tempfile.TemporaryDirectory() as folder:
            base, tokenizer = make_tiny_backbone(self.items.titles, BackboneConfig())
            base.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            vectors, users = torch.randn(len(self.items), dim), torch.randn(args.users, dim)
            self.model = ReleasedModel(
                Path(folder), vectors, users, two_layers, timesteps=args.steps, w=GUIDANCE
            ).eval()
            net = self.model.diffusion_net
            for norm in (net.ln_1, net.ln_2, net.ln_3):
                nn.init.normal_(norm.weight, mean=1, std=0.2)
            self.loaded = load_released_checkpoint(self.model.checkpoint(), folder)
        self.predictor = self.loaded.predictor(vectors, users, "mse")
        self.check()

    def asked(self, users: int):
        lengths = torch.randint(5, HISTORY + 1, (users,)).tolist()
        histories = [torch.randperm(len(self.items))[:length].tolist() for length in lengths]
        return write_prompts(self.items.titles, histories), histories, list(range(users))

    def released_round(self):
        prompts, histories, users = self.asked(AT_ONCE)
        found = self.model.generate(prompts, histories, users)
        return self.model.rank(found, histories, "mse")[1][:, : self.args.k]

    def fast_round(self):
        prompts, histories, users = self.asked(self.args.users)
        excluded = [items[:-1] for items in histories]
        return self.predictor.predict(prompts, histories, users, self.args.k, excluded).ids

    def check(self) -> None:
        """Texts, vectors and lists of one batch for equal noise."""
        prompts, histories, users = asked = self.asked(AT_ONCE)
        noise = scripted(self.args.steps, (AT_ONCE, self.args.whole_dim))
        with torch.random.fork_rng([]):
            expected = self.model.generate(*asked)
        excluded = [items[:-1] for items in histories]
        found = self.predictor.predict(
            *asked, self.args.k, excluded, noise=noise, batch_padding=True
        )
        same = [a == b for a, b in zip(found.texts, expected.texts)]
        if not all(same):
            raise SystemExit(f"whole: {sum(same)} of {AT_ONCE} responses like the released ones")
        require(relative_error(found.vectors, expected.vectors), "whole")
        _, order = self.model.rank(expected, histories, "mse")
        self.lists = float((found.ids == order[:, : self.args.k]).all(1).double().mean())


def rounds(calls: dict, users: dict[str, int], args) -> dict[str, list[tuple[float, float]]]:
    """Seconds and the processor's seconds of each call, per user of its; calls take turns."""
    found = defaultdict(list)
    for repeat in range(args.warmup + args.repeats):
        for name, call in calls.items():
            start = time.process_time()
            _, elapsed = timed("cpu", call)
            both = elapsed, time.process_time() - start
            if repeat >= args.warmup:
                found[name].append(tuple(seconds / users.get(name, 1) for seconds in both))
    return found


def cases(operation: str, shape: str, found: dict[str, list[tuple[float, float]]]) -> list[dict]:
    baseline, busy = (statistics.median(times) for times in zip(*found["released"]))
    results = []
    for name, times in found.items():
        seconds, processor = zip(*times)
        own = statistics.median(processor)
        case = record(operation, shape, "float32", name, seconds, torch_s=baseline)
        results.append(case | {"processor_us": 1e6 * own, "x_torch_processor": busy / own})
        print(line(case), f"| processor {1e6 * own:.0f} us, {busy / own:.3g} x", flush=True)
    return results


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in [
        ("users", 64), ("steps", 200), ("k", 10), ("whole-dim", 64), ("repeats", 5), ("warmup", 1),
    ]:  # fmt: skip
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument("--dims", type=positive, nargs="+", default=[64, 512])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if native.build_info() is None:
        parser.exit(1, f"the C++ extension is absent: {native.why_missing()}\n")
    if args.users < AT_ONCE:
        parser.error(f"argument --users: expected at least {AT_ONCE}, got {args.users}")
    torch.manual_seed(0)
    print(COLUMNS)
    results = []
    for dim in args.dims:
        for two_layers, kind in ((False, "mlp1"), (True, "mlp2")):
            shape = f"B{args.users} D{dim} T{args.steps}"
            seconds = rounds(samplers(two_layers, dim, args), {}, args)
            results += cases(f"sample {kind}", shape, seconds)
    users = {"released": AT_ONCE, "compat": args.users}
    for two_layers, kind in ((False, "mlp1"), (True, "mlp2")):
        whole = Whole(two_layers, args)
        calls = {"released": whole.released_round, "compat": whole.fast_round}
        shape = f"a user of {AT_ONCE} (released), {args.users}; D{args.whole_dim} T{args.steps} "
        shape += f"N{len(whole.items)} k{args.k}"
        found = cases(f"whole {kind}", shape, rounds(calls, users, args))
        results += [case | {"lists_equal": whole.lists} for case in found]
    if args.out:
        settings = vars(args) | {"isa": native.sampler_instruction_sets()}
        store(args.out, environment("cpu"), settings, results)


if __name__ == "__main__":
    main()
