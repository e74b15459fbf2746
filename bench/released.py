"""The released ContRec code's inference arithmetic: the "before" of every comparison.

Restated in our own words, operation by operation, from the public repository Quhaoh233/ContRec
(MIT; DreamRec.py, model_interface.py, utils.py and vae.py under its code/). The order of the
operations, the loops, the default dtype and the traffic between host and device are the
release's. Nothing was added to slow it down.

Restated here:

- `ReleasedDenoiser`, `schedule`, `step`, `sample`: ancestral sampling. Every step makes a [B]
  tensor of its index on the device, calls the network twice (conditional and null), embeds the
  time once per row in each call, brings the index to the host once per coefficient, looks the
  coefficient up there and sends it back.
- `pad_prompts`, `TokenEncoder`, `insert_tokens`: prompts padded to 1,024 tokens on the left, one
  embedding lookup, then for each user the tokenizer's encoders over that user's history and one
  indexed write per token of an item.
- `rank`: for each user the cosine with every item, norms of the items included; items of the
  history get score 0; the stacked [users, items] scores are sorted in full.
- `metrics`: hit rate and NDCG, each one loop over users, NDCG with an inner loop over ranks.

Kept as it is: excluded items score 0 rather than minus infinity, so they rank above items of
negative cosine. The text bonus is inert: its pattern matches the empty string only, and cosine
scores are never multiplied by it.

Left out, though the release spends time on it: the language model (its attention over the padded
prompt, its text generation), tokenization, parsing of histories from strings, the condition
encoder, the copy of the item vectors and the inner products after each batch (unused when ranking
by cosine), the users x items text similarities behind the inert bonus, and the optional user
token. The release samples 10 users at a time; here one batch holds all. Its default measure is
the Euclidean distance, with the same loop and sort; cosine, another of its settings, is restated
because the fast engine ranks by it.

    python bench/released.py --users 64 --items 10000 --dim 512 --steps 200 --denoiser mlp
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from reporting import COLUMNS, environment, line, positive, record, store, timed
from torch import Tensor, nn

from contrec_fast.models import LinearDenoiser, MLPDenoiser

PROMPT_TOKENS = 1024  # every prompt is padded to this
HISTORY_ITEMS = 20  # a prompt shows the last 20 items
WAYS = 2  # continuous tokens per item
VOCABULARY = 128_256  # of Llama 3.2, the release's language model
GUIDANCE = 2.0


class Sinusoid(nn.Module):
    """Step indices [B] -> [B, dim]: sines then cosines, frequencies made anew at each call."""

    def __init__(self, dim: int):
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"dim: expected an even width of at least 4, got {dim}")
        self.half = dim // 2

    def forward(self, t: Tensor) -> Tensor:
        decay = math.log(10000) / (self.half - 1)
        frequencies = torch.exp(torch.arange(self.half, device=t.device) * -decay)
        angles = t[:, None] * frequencies[None, :]
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class ReleasedDenoiser(nn.Module):
    """The part of the released diffusion module that sampling calls, with its state-dict keys:
    `none_embedding.weight`, `step_mlp.{1,3}`, `diffuser.0` (and `diffuser.2` when two-layered).

    Args:
        dim: item-space width D, even and at least 4.
        two_layers: `Linear(3D, 2D)`, GELU, `Linear(2D, D)` ("mlp2"), not `Linear(3D, D)` ("mlp1").
    """

    def __init__(self, dim: int, two_layers: bool):
        super().__init__()
        self.none_embedding = nn.Embedding(1, dim)
        self.step_mlp = nn.Sequential(
            Sinusoid(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )
        self.diffuser = nn.Sequential(nn.Linear(3 * dim, 2 * dim if two_layers else dim))
        if two_layers:
            self.diffuser.extend([nn.GELU(), nn.Linear(2 * dim, dim)])

    @classmethod
    def from_model(cls, denoiser: LinearDenoiser | MLPDenoiser) -> "ReleasedDenoiser":
        """The same function with this denoiser's weights, on its device and in its dtype.

        Raises:
            TypeError: the release has no counterpart of this denoiser.
        """
        weights = {
            "none_embedding.weight": denoiser.null_condition[None],
            **_linear("step_mlp.1", denoiser.time_embedding.expand),
            **_linear("step_mlp.3", denoiser.time_embedding.contract),
        }
        if isinstance(denoiser, LinearDenoiser):
            weights |= _linear("diffuser.0", denoiser.output)
        elif isinstance(denoiser, MLPDenoiser):
            weights |= _linear("diffuser.0", denoiser.hidden)
            weights |= _linear("diffuser.2", denoiser.output)
        else:
            kind = type(denoiser).__name__
            raise TypeError(f"denoiser: expected LinearDenoiser or MLPDenoiser, got {kind}")
        released = cls(denoiser.dim, isinstance(denoiser, MLPDenoiser))
        released.to(denoiser.null_condition).load_state_dict(weights)
        return released

    def forward(self, x: Tensor, condition: Tensor, t: Tensor) -> Tensor:
        """x [B, D], condition [B, D], t [B] int64 -> predicted clean vectors [B, D]."""
        return self.diffuser(torch.cat((x, condition, self.step_mlp(t)), dim=1))

    def unconditional(self, x: Tensor, t: Tensor) -> Tensor:
        """`forward` with the null vector, looked up and copied once per row, as condition."""
        null = self.none_embedding(torch.tensor([0]).to(x.device))
        condition = torch.cat([null.view(1, null.shape[1])] * x.shape[0], dim=0)
        return self.forward(x, condition, t)


def _linear(name: str, layer: nn.Linear) -> dict[str, Tensor]:
    return {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}


class Schedule(NamedTuple):
    """Posterior coefficients of every step, [T] each, on the host."""

    mean_x0: Tensor
    mean_x: Tensor
    variance: Tensor


def schedule(timesteps: int) -> Schedule:
    """The release's default ("exp") schedule, in torch's default dtype."""
    beta_min, beta_max = 0.1, 10
    x = torch.linspace(1, 2 * timesteps + 1, timesteps)
    betas = 1 - torch.exp(-beta_min / timesteps - x * 0.5 * (beta_max - beta_min) / timesteps**2)
    alphas = 1.0 - betas
    product = torch.cumprod(alphas, dim=0)
    before = F.pad(product[:-1], (1, 0), value=1.0)
    return Schedule(
        mean_x0=betas * torch.sqrt(before) / (1.0 - product),
        mean_x=(1.0 - before) * torch.sqrt(alphas) / (1.0 - product),
        variance=betas * (1.0 - before) / (1.0 - product),
    )


def look_up(table: Tensor, t: Tensor) -> Tensor:
    """Coefficients [B, 1] of steps t [B]: to the host, gathered there, and back."""
    return table.gather(-1, t.cpu()).reshape(t.shape[0], 1).to(t.device)


@torch.no_grad()
def step(
    denoiser: ReleasedDenoiser, table: Schedule, x: Tensor, condition: Tensor, index: int,
    guidance: float = GUIDANCE, noise: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One ancestral step from x [B, D] at step `index`; `noise` [B, D] is drawn when not given."""
    t = torch.full((condition.shape[0],), index, device=condition.device, dtype=torch.long)
    guided = (1 + guidance) * denoiser(x, condition, t) - guidance * denoiser.unconditional(x, t)
    mean = look_up(table.mean_x0, t) * guided + look_up(table.mean_x, t) * x
    if index == 0:
        return mean
    variance = look_up(table.variance, t)
    return mean + torch.sqrt(variance) * (torch.randn_like(x) if noise is None else noise)


@torch.no_grad()
def sample(
    denoiser: ReleasedDenoiser, table: Schedule, condition: Tensor,
    guidance: float = GUIDANCE, noise: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """All T ancestral steps.

    Args:
        condition: [B, D]. noise: scripted noise [T, B, D], entry 0 the starting point and entry
            i + 1 what is added after the i-th executed step; drawn when not given.

    Returns:
        vectors [B, D].
    """
    timesteps = table.mean_x0.shape[0]
    x = torch.randn_like(condition) if noise is None else noise[0]
    for index in reversed(range(timesteps)):
        added = None if noise is None or index == 0 else noise[timesteps - index]
        x = step(denoiser, table, x, condition, index, guidance, added)
    return x


class TokenEncoder(nn.Module):
    """The released tokenizer's encoders, one per token of an item, with their state-dict keys
    `encoders.{k}.{0,1,4,5,8}`. Its noise is a constant kept on the host, outside the state dict.

    Args: dim: width of the item vectors. hidden: width H of the language model's embeddings.
    """

    def __init__(self, dim: int, hidden: int, ways: int = WAYS):
        super().__init__()
        self.epsilon = torch.randn(1, hidden)
        self.sigma = torch.normal(0, 0.1, size=(1,))
        self.encoders = nn.ModuleList(
            nn.Sequential(
                *(nn.Linear(dim, 128), nn.BatchNorm1d(128), nn.Dropout(0.5), nn.ReLU()),
                *(nn.Linear(128, 256), nn.BatchNorm1d(256), nn.Dropout(0.2), nn.ReLU()),
                nn.Linear(256, hidden),
            )
            for _ in range(ways)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Item vectors x [n, dim] -> tokens [ways, n, hidden]."""
        tokens = []
        for encoder in self.encoders:
            mean = encoder(x)
            tokens.append(mean + self.sigma.to(x.device) * self.epsilon.to(x.device))
        return torch.stack(tokens, dim=0)


def pad_prompts(prompts: Sequence[Sequence[int]], pad: int, length: int = PROMPT_TOKENS) -> Tensor:
    """Prompts as [B, length] int64 on the host: cut on the right, padded on the left."""
    cut = [list(prompt[:length]) for prompt in prompts]
    padded = [[pad] * (length - len(prompt)) + prompt for prompt in cut]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(cut), length)


@torch.no_grad()
def insert_tokens(
    token_ids: Tensor, histories: Sequence[Sequence[int]], item_vectors: Tensor,
    encoder: Callable[[Tensor], Tensor], text_table: Tensor, first_token: int,
) -> Tensor:  # fmt: skip
    """Input embeddings of padded prompts with the items' continuous tokens written in.

    Args:
        token_ids: [B, L] int64 on the host. histories: item ids shown to each of the B users, one
            per occurrence of `first_token` in that user's prompt, in order. item_vectors: [N, D].
        encoder: vectors [n, D] -> tokens [ways, n, H]; token k of an item is written k places
            after its `first_token`. text_table: [V, H], whose dtype the result has.

    Returns:
        [B, L, H] on the text table's device.
    """
    embeddings = F.embedding(token_ids.to(text_table.device), text_table)
    for user in range(token_ids.shape[0]):
        tokens = encoder(item_vectors[list(histories[user])])
        places = torch.nonzero(token_ids[user] == first_token).squeeze()
        for way in range(tokens.shape[0]):
            embeddings[user, places + way, :] = tokens[way].to(embeddings.dtype)
    return embeddings


@torch.no_grad()
def rank(
    vectors: Tensor, item_vectors: Tensor, excluded: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Cosine with every item, user by user, excluded items at 0, then a full (unstable) sort.

    Score 0 is the release's defect: an excluded item outranks every item of negative cosine.

    Args:
        vectors: [B, D]. item_vectors: [N, D]. excluded: item ids per user, possibly none.

    Returns:
        scores [B, N] in item order, and item ids [B, N] by falling score.

    Raises:
        ValueError: no user.
    """
    if not vectors.shape[0]:
        raise ValueError("vectors: expected at least one user, got none")
    cosine = nn.CosineSimilarity(dim=1, eps=1e-6)
    rows = []
    for user in range(vectors.shape[0]):
        scores = cosine(vectors[user, :].unsqueeze(0), item_vectors)
        scores[list(excluded[user])] = 0
        rows.append(scores)
    stacked = torch.stack(rows, dim=0)
    return stacked, torch.argsort(stacked, dim=1, descending=True)


def metrics(targets: Sequence[int], ranking: Tensor, k: int) -> tuple[float, float]:
    """Hit rate and NDCG at k with one target a user (so that the ideal gain is 1).

    Args:
        targets: B item ids. ranking: [B, N] item ids, best first.

    Raises:
        ValueError: no user.
    """
    users = ranking.shape[0]
    if not users:
        raise ValueError("ranking: expected at least one user, got none")
    hits, gain = 0.0, 0.0
    for user in range(users):
        if targets[user] in ranking[user, :k]:
            hits += 1
    for user in range(users):
        relevant = torch.where(ranking[user, :k] == targets[user], 1, 0)
        user_gain = 0.0
        for place in range(len(relevant)):
            user_gain += relevant[place] / math.log(place + 2, 2)
        gain += user_gain
    return hits / users, float(gain) / users


# The command line: each stage timed on random inputs.


def random_prompts(histories: Sequence[Sequence[int]], first_token: int) -> list[list[int]]:
    """Prompts of about 460 tokens: an instruction, then title and tokens of each item."""

    def text(length: int) -> list[int]:
        return torch.randint(VOCABULARY, (length,)).tolist()

    ways = range(first_token, first_token + WAYS)
    marked = [first_token + WAYS, *ways, first_token + WAYS + 1]  # in its two brackets
    titled = [[part for _ in history for part in (*text(12), *marked)] for history in histories]
    return [text(100) + items + text(40) for items in titled]


def run(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every repeat of every stage; each repeat has new random inputs."""
    torch.manual_seed(args.seed)
    kind = MLPDenoiser if args.denoiser == "mlp" else LinearDenoiser
    denoiser = ReleasedDenoiser.from_model(kind(args.dim).to(args.device)).eval()
    table = schedule(args.steps)
    item_vectors = torch.randn(args.items, args.dim, device=args.device)
    encoder = TokenEncoder(args.dim, args.hidden).to(args.device).eval()
    # New rows of the vocabulary: the tokens of an item, their two brackets, padding.
    first_token, pad = VOCABULARY, VOCABULARY + WAYS + 2
    text_table = torch.randn(pad + 1, args.hidden, device=args.device, dtype=torch.float16)
    seconds = {"insert": [], "sample": [], "rank": [], "metrics": []}
    for repeat in range(args.warmup + args.repeats):
        histories = torch.randint(args.items, (args.users, HISTORY_ITEMS)).tolist()
        targets = torch.randint(args.items, (args.users,)).tolist()
        condition = torch.randn(args.users, args.dim, device=args.device)
        token_ids = pad_prompts(random_prompts(histories, first_token), pad)
        prompts = (token_ids, histories, item_vectors, encoder, text_table, first_token)
        took = {}
        _, took["insert"] = timed(args.device, insert_tokens, *prompts)
        vectors, took["sample"] = timed(args.device, sample, denoiser, table, condition)
        ranked, took["rank"] = timed(args.device, rank, vectors, item_vectors, histories)
        _, took["metrics"] = timed(args.device, metrics, targets, ranked[1], args.k)
        for name in seconds if repeat >= args.warmup else ():
            seconds[name].append(took[name])
    return seconds


def cases(args: argparse.Namespace, seconds: dict[str, list[float]]) -> list[dict]:
    """One record per stage, counting products as executed and bytes that must move."""
    users, items, dim, hidden = args.users, args.items, args.dim, args.hidden
    prompts = f"{users} users x {PROMPT_TOKENS} tokens x {hidden}, {HISTORY_ITEMS} items each"
    encoded = users * HISTORY_ITEMS * WAYS * (dim * 128 + 128 * 256 + 256 * hidden)
    embeddings = 2 * users * PROMPT_TOKENS * hidden  # bytes; each is read and written
    steps = f"{users} users x {args.steps} steps x {dim}, {args.denoiser}"
    blocks = (8 if args.denoiser == "mlp" else 3) + 4  # D x D products; 4 embed the time
    sampled = 2 * args.steps * users * blocks * dim * dim  # two calls a step
    scored = users * items * dim  # every user reads every item vector
    stages = [
        ("insert", prompts, "float16", 2 * encoded, 2 * embeddings),
        ("sample", steps, "float32", 2 * sampled, None),
        ("rank", f"{users} users x {items} items x {dim}", "float32", 2 * scored, 4 * scored),
        ("metrics", f"{users} users x {items} items, k {args.k}", "int64", None, None),
    ]
    backend = f"released, {args.device}"
    return [record(*stage[:3], backend, seconds[stage[0]], *stage[3:]) for stage in stages]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time the released code's inference arithmetic.")
    sizes = {"users": 64, "items": 10_000, "dim": 512, "hidden": 2048, "steps": 200, "k": 10}
    counts = {"repeats": 5, "warmup": 1, "threads": torch.get_num_threads()}
    for name, default in (sizes | counts).items():
        parser.add_argument(f"--{name}", type=positive, default=default, help=str(default))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--denoiser", choices=("linear", "mlp"), default="linear")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args(arguments)
    if args.dim < 4 or args.dim % 2:
        parser.error(f"argument --dim: expected an even width of at least 4, got {args.dim}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: expected a CUDA device, found none")
    torch.set_num_threads(args.threads)
    found = environment(args.device)
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    print(COLUMNS)
    results = cases(args, run(args))
    print(*map(line, results), sep="\n")
    if args.out:
        store(args.out, found, vars(args), results)


if __name__ == "__main__":
    main()
