"""The released modules in plain numbers: random state dicts, and what they compute."""

import math

import torch

FLOAT = torch.float64


def layers(sizes, dtype=FLOAT):
    """Random weights and biases: {layer: shape of its weight} to a state dict."""
    state = {}
    for name, shape in sizes.items():
        state[f"{name}.weight"] = torch.randn(shape, dtype=dtype) * 0.7 * shape[-1] ** -0.5
        state[f"{name}.bias"] = torch.randn(shape[0], dtype=dtype)
    return state


def diffusion_state(dim=6, positions=3, two_layers=False, dtype=FLOAT):
    """A state dict of the released `Tenc`, what it never uses included."""
    sizes = {"step_mlp.1": (2 * dim, dim), "step_mlp.3": (dim, 2 * dim)}
    sizes |= {"emb_mlp.1": (2 * dim, dim)}
    sizes |= {"diff_mlp.0": (2 * dim, 3 * dim), "diff_mlp.2": (dim, 2 * dim)}
    sizes |= {"diffuser.0": ((2 if two_layers else 1) * dim, 3 * dim)}
    sizes |= {"diffuser.2": (dim, 2 * dim)} if two_layers else {}
    sizes |= {f"ln_{i}": (dim,) for i in (1, 2, 3)} | {"feed_forward.layer_norm": (dim,)}
    sizes |= {f"mh_attn.linear_{name}": (dim, dim) for name in "qkv"}
    sizes |= {f"feed_forward.w_{i}": (dim, dim, 1) for i in (1, 2)}
    state = layers(sizes, dtype) | {"none_embedding.weight": torch.randn(1, dim, dtype=dtype)}
    return state | {"positional_embeddings.weight": torch.randn(positions, dim, dtype=dtype)}


def tokenizer_state(dim=6, hidden=5, ways=2, position=True, dtype=FLOAT):
    state = {"pos.weight": torch.randn(1, dim, dtype=dtype)} if position else {}
    stacks = {f"encoders.{k}": (dim, 128, 256, hidden) for k in range(ways)}
    for stack, widths in (stacks | {"decoder": (hidden, 256, 128, dim)}).items():
        for place, index in enumerate((0, 4, 8)):
            size = (widths[place + 1], widths[place])
            state |= layers({f"{stack}.{index}": size}, dtype)
            if index < 8:
                norm = f"{stack}.{index + 1}"
                state |= layers({norm: size[:1]}, dtype)
                state[f"{norm}.running_mean"] = torch.randn(size[0], dtype=dtype)
                state[f"{norm}.running_var"] = torch.rand(size[0], dtype=dtype) + 0.1
                state[f"{norm}.num_batches_tracked"] = torch.tensor(7)
    return state


def lightning(dim=6, dtype=FLOAT, **hyper_parameters):
    """A Lightning checkpoint, with a piece of a language model."""
    parts = {"diffusion_net": diffusion_state(dim, two_layers=True, dtype=dtype)}
    parts |= {"item_encoder": tokenizer_state(dim, 5, 2, dtype=dtype)}
    parts |= {"user_encoder": tokenizer_state(dim, 5, 3, dtype=dtype)}
    sizes = {"dim_block.2": (dim, 5), "length_block.0.layers.2": (7, 7), "length_block.3": (3, 7)}
    parts |= {"output_decoder": layers(sizes, dtype)}
    parts["output_decoder"]["length_block.3.bias"].abs_()  # or all states may be zero
    parts |= {"model": {"base_model.lm_head.weight": torch.randint(9, (4, 1)).byte()}}
    state = {f"{part}.{name}": t for part, own in parts.items() for name, t in own.items()}
    return {"epoch": 3, "state_dict": state, "hyper_parameters": hyper_parameters}


def randomize_language_model(model):
    """Weights with which what a language model writes depends on what it reads."""
    for name, parameter in model.named_parameters():
        if "norm" in name:  # not around 0, or there would be next to no logits
            torch.nn.init.uniform_(parameter, 0.2, 0.4)
        else:
            torch.nn.init.normal_(parameter, std=0.3 if "lora" in name else 0.1)


def linear(state, name, x):
    return (
        state[f"{name}.weight"].reshape(len(state[f"{name}.bias"]), -1) @ x + state[f"{name}.bias"]
    )


def norm(state, name, x):
    centred = x - x.mean()
    unit = centred / (centred.square().mean() + 1e-5).sqrt()
    return unit * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def naive_denoiser(state, x, condition, n):
    """One vector: x, condition [D], step index n -> x0_hat [D]."""
    half = len(x) // 2
    angles = [n * math.exp(-i * math.log(10000) / (half - 1)) for i in range(half)]
    waves = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    time = gelu(linear(state, "step_mlp.1", torch.tensor(waves, dtype=x.dtype)))
    out = linear(state, "diffuser.0", torch.cat([x, condition, linear(state, "step_mlp.3", time)]))
    return linear(state, "diffuser.2", gelu(out)) if "diffuser.2.weight" in state else out


def naive_sample(state, condition, noise, guidance=2.0):
    """One vector: condition [D], noise [T, D] (x_T first) -> [D]."""
    steps, alphas = len(noise), []
    for n in range(steps):
        place = 1 + n * 2 * steps / (steps - 1)
        alphas.append(math.exp(-0.1 / steps - place * (10 - 0.1) / (2 * steps**2)))
    x = noise[0]
    for n in reversed(range(steps)):
        bar, before, beta = math.prod(alphas[: n + 1]), math.prod(alphas[:n]), 1 - alphas[n]
        null = state["none_embedding.weight"][0]
        x0 = (1 + guidance) * naive_denoiser(state, x, condition, n)
        x0 = x0 - guidance * naive_denoiser(state, x, null, n)
        x = beta * math.sqrt(before) * x0 + (1 - before) * math.sqrt(alphas[n]) * x
        x = x / (1 - bar)
        if n > 0:
            x = x + math.sqrt(beta * (1 - before) / (1 - bar)) * noise[steps - n]
    return x


def naive_condition(state, states):
    """One user: states [S, D] -> [D]; every position, of which the last is returned."""
    x = states + state["positional_embeddings.weight"]
    count, dim = x.shape
    for t in range(count):
        query = norm(state, "ln_1", x[t])
        scores = []
        for s in range(count):
            keys = linear(state, "mh_attn.linear_q", query) @ linear(
                state, "mh_attn.linear_k", x[s]
            )
            hidden = s > t or float(x[s].sum()) == 0
            scores.append(-(2.0**32) + 1 if hidden else float(keys) / math.sqrt(dim))
        weights = [math.exp(score - max(scores)) for score in scores]
        mixed = torch.zeros(dim, dtype=x.dtype)
        for s in range(count):
            mixed += weights[s] / sum(weights) * linear(state, "mh_attn.linear_v", x[s])
        if float(query.sum()) == 0:
            mixed = torch.zeros_like(mixed)
        y = norm(state, "ln_2", mixed + query)
        inner = linear(state, "feed_forward.w_1", y).clamp(min=0)
        y = norm(state, "feed_forward.layer_norm", linear(state, "feed_forward.w_2", inner) + y)
        last = norm(state, "ln_3", y)
    return last


def naive_perceptron(state, stack, x):
    for index in (0, 4):
        x = linear(state, f"{stack}.{index}", x)
        own = f"{stack}.{index + 1}"
        x = (x - state[f"{own}.running_mean"]) / (state[f"{own}.running_var"] + 1e-5).sqrt()
        x = (x * state[f"{own}.weight"] + state[f"{own}.bias"]).clamp(min=0)
    return linear(state, f"{stack}.8", x)


def part(checkpoint, name):
    state = checkpoint["state_dict"].items()
    return {key.removeprefix(f"{name}."): t for key, t in state if key.startswith(f"{name}.")}
