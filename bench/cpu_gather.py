"""`gather_tokens` on the CPU beside the released loop and plain PyTorch, interleaved in one run.

    python bench/cpu_gather.py --threads 2 --out bench/results/cpu-gather.json

Every user's prompt of L tokens shows `--items` items of K = 2 continuous tokens each. Forward,
into a tensor that is there already where nothing else is said:

- released: `released.insert_tokens` with its tokenizer, which encodes every user's items anew;
- loop: the same with tokens looked up in a table, the insertion alone: the base of `x torch`;
- torch: one embedding and one indexed write of all continuous tokens, as fast as we could;
- copy: `out.copy_` of as many numbers: `% of floor` is its time over a variant's;
- cpp; cpp new: as most callers get it, in memory that is new to the process.

Factored: the tokens are products of 256-wide hidden rows; torch makes those of all positions by one
product for each k. Backward: gradients of the token table alone (the language model is frozen, or
has adapters) and of both; the table holds the batch's items, as in training, and torch is the
gradient of `F.embedding`.

Results are compared before they are timed. Threads: `--threads`.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from released import TokenEncoder, insert_tokens
from reporting import COLUMNS, environment, line, positive, record, store, timed
from torch import Tensor

from contrec_fast import native, ops

WAYS, DIM, INNER = 2, 512, 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Prompts:
    """Random prompts: ids and rows [B, L] int64, and the histories [B, items] they show."""

    def __init__(self, args: argparse.Namespace):
        self.first = args.words - WAYS  # token ids that the released loop looks for
        self.ids = torch.randint(self.first, (args.users, args.length))
        self.rows = torch.full_like(self.ids, -1)
        self.histories = torch.randint(args.catalog, (args.users, args.items))
        slots = args.length // args.items
        starts = torch.arange(args.items) * slots + torch.randint(slots - WAYS + 1, (args.items,))
        for way in range(WAYS):
            self.ids[:, starts + way] = self.first + way
            self.rows[:, starts + way] = self.histories * WAYS + way


def forward(prompts: Prompts, args: argparse.Namespace, dtype: torch.dtype) -> dict[str, dict]:
    """Per operation, backend to a call without arguments."""
    width = args.width
    text, encoder = torch.randn(args.words, width).to(dtype), TokenEncoder(DIM, width, WAYS).eval()
    vectors = torch.randn(args.catalog, DIM)
    tokens = torch.randn(args.catalog * WAYS, width).to(dtype)
    by_way = tokens.view(-1, WAYS, width).transpose(0, 1)
    shapes = (len(tokens), INNER), (WAYS, width, INNER), (WAYS, width)
    factored = ops.FactoredTable(*(torch.randn(shape).mul_(0.1).to(dtype) for shape in shapes))
    out, source = (torch.zeros(*prompts.ids.shape, width, dtype=dtype) for _ in range(2))
    histories = prompts.histories.tolist()
    numbers = torch.arange(args.catalog)

    def gather(table, **options):
        return lambda: ops.gather_tokens(
            prompts.ids, prompts.rows, text, table, backend="cpp", **options
        )

    def plain() -> Tensor:
        torch.index_select(text, 0, prompts.ids.flatten(), out=out.view(-1, width))
        continuous = prompts.rows != -1
        out[continuous] = tokens[prompts.rows[continuous]]
        return out

    def plain_factored() -> Tensor:
        torch.index_select(text, 0, prompts.ids.flatten(), out=out.view(-1, width))
        hidden, weight, bias = factored
        for way in range(WAYS):
            here = (prompts.rows != -1) & (prompts.rows % WAYS == way)
            out[here] = F.linear(hidden[prompts.rows[here]], weight[way], bias[way])
        return out

    def loop(look_up: Callable, table: Tensor):
        given = (prompts.ids, histories, table, look_up, text, prompts.first)
        return lambda: insert_tokens(*given)

    copied = {"copy": lambda: out.copy_(source)}
    whole = {
        "loop": loop(lambda items: by_way[:, items], numbers),
        "released": loop(encoder, vectors),
        "torch": plain,
        "cpp": gather(tokens, out=out),
        "cpp new": gather(tokens),
    }
    made = {"torch": plain_factored, "cpp": gather(factored, out=out)}
    expected = whole["loop"]()
    for name in ("torch", "cpp", "cpp new"):
        if not torch.equal(whole[name](), expected):
            raise SystemExit(f"gather {name}: expected the released loop's numbers, got others")
    expected = made["torch"]().clone()
    torch.testing.assert_close(made["cpp"](), expected, rtol=2e-2, atol=2e-2)
    return {"gather": whole | copied, "gather factored": made | copied}


def backward(prompts: Prompts, args: argparse.Namespace, dtype: torch.dtype) -> dict[str, dict]:
    """The same for gradients; the baseline comes first."""
    items, rows = prompts.rows.unique(return_inverse=True)
    rows -= 1  # -1, which is the least, stays what it is
    gradient = torch.randn(*prompts.ids.shape, args.width).to(dtype)
    found = {}
    for label, of_text in (("tokens", False), ("text and tokens", True)):
        calls = {}
        for name, backend in (("torch", "reference"), ("cpp", "cpp")):
            given = gradient, prompts.ids, rows, args.words, len(items) - 1
            calls[name] = lambda given=given, backend=backend, of_text=of_text: (
                torch.ops.contrec.gather_tokens_backward(*given, of_text, True, backend)
            )
        torch.testing.assert_close(calls["cpp"]()[1], calls["torch"]()[1], rtol=2e-2, atol=2e-2)
        found[f"gather backward, {label}"] = calls
    return found


@torch.no_grad()
def measure(prompts: Prompts, args: argparse.Namespace, name: str) -> list[dict]:
    dtype, cases = DTYPES[name], []
    shape = f"B{args.users} L{args.length} H{args.width} {args.items} items"
    moved = 2 * prompts.ids.numel() * args.width * torch.finfo(dtype).bits // 8
    for make in (forward, backward):
        for operation, calls in make(prompts, args, dtype).items():
            seconds = {backend: [] for backend in calls}
            for repeat in range(args.warmup + args.repeats):
                for backend, call in calls.items():
                    _, elapsed = timed("cpu", call)
                    if repeat >= args.warmup:
                        seconds[backend].append(elapsed)
            median = {backend: statistics.median(times) for backend, times in seconds.items()}
            base, floor = next(iter(median.values())), median.get("copy")
            for backend, times in seconds.items():
                cases.append(
                    record(
                        operation, shape, name, backend, times,
                        moved=None if floor is None else moved, floor_s=floor, torch_s=base,
                    )
                )  # fmt: skip
                print(line(cases[-1]), flush=True)
    return cases


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time gather_tokens on the CPU.")
    sizes = {"users": 64, "length": 512, "width": 2048, "items": 20, "words": 32_000}
    sizes |= {"catalog": 10_000, "repeats": 9, "warmup": 1, "threads": torch.get_num_threads()}
    for option, default in sizes.items():
        parser.add_argument(f"--{option}", type=positive, default=default, help=str(default))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if native.build_info() is None:
        parser.exit(1, f"the C++ extension is absent: {native.why_missing()}\n")
    if args.length < WAYS * args.items:
        parser.error(
            f"argument --length: expected at least {WAYS * args.items} for {args.items} items, "
            f"got {args.length}"
        )
    if args.words <= WAYS:
        parser.error(f"argument --words: expected more than {WAYS}, got {args.words}")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    found = environment("cpu") | {"isa": native.gather_instruction_sets()[0]}
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    print(COLUMNS)
    prompts = Prompts(args)
    cases = [case for name in args.dtypes for case in measure(prompts, args, name)]
    if args.out:
        store(args.out, found, vars(args), cases)


if __name__ == "__main__":
    main()
