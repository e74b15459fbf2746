"""LightGCN, the sigma-VAE and the diffusion head against restatements."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ops_cases import make_denoiser, relative_error

from contrec_fast import ops
from contrec_fast.config import HeadConfig, TrainingConfig
from contrec_fast.models.diffusion import DISPERSIVE_ROWS, DiffusionHead
from contrec_fast.models.lightgcn import LightGCN, whiten
from contrec_fast.models.losses import contrastive_denoising_loss, dispersive_loss
from contrec_fast.models.schedules import METHODS, PREDICTIONS, SCHEDULES, training_target
from contrec_fast.models.tokenizer import SigmaVAE


def random_pairs(users, items, count):
    pairs = np.stack([np.random.randint(users, size=count), np.random.randint(items, size=count)])
    return np.unique(pairs.T, axis=0)


def dense_propagation(model, pairs, users, items, layers):
    adjacency = torch.zeros(users + items, users + items, dtype=torch.float64)
    for user, item in pairs.tolist():
        adjacency[user, users + item] = adjacency[users + item, user] = 1
    scale = adjacency.sum(1).clamp(min=1).rsqrt().diag()
    step = scale @ adjacency @ scale
    layer = model.embedding.detach().double()
    total = layer.clone()
    for _ in range(layers):
        layer = step @ layer
        total += layer
    return (total / (layers + 1)).split([users, items])


@pytest.mark.parametrize("users, items, count", [(1, 1, 1), (7, 127, 3), (40, 9, 200)])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_lightgcn_equals_the_dense_computation(users, items, count, layers):
    pairs = random_pairs(users, items, count)
    model = LightGCN(pairs, users, items, 5, layers)
    expected = dense_propagation(model, pairs, users, items, layers)
    found = model()
    for got, want in zip(found, expected):
        assert got.shape == want.shape
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    cotangent = [torch.randn_like(got) for got in found]
    (gradient,) = torch.autograd.grad(found, model.embedding, cotangent)
    model.embedding.data = torch.cat(cotangent)  # the map is linear and symmetric
    expected = torch.cat(dense_propagation(model, pairs, users, items, layers))
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)


def test_bpr_loss_equals_its_formula():
    pairs = random_pairs(6, 8, 20)
    model = LightGCN(pairs, 6, 8, 4, 2)
    users, items = dense_propagation(model, pairs, 6, 8, 2)
    triples = [(int(u), int(i), int(n)) for (u, i), n in zip(pairs, np.random.randint(8, size=20))]
    raw = model.embedding.detach().double()
    total = 0.0
    for user, item, negative in triples:
        margin = float(users[user] @ items[item] - users[user] @ items[negative])
        total += -math.log(1 / (1 + math.exp(-margin)))
        for row in (user, 6 + item, 6 + negative):
            total += 0.3 * float(raw[row] @ raw[row]) / 2
    loss = model.bpr_loss(*torch.tensor(triples).T, decay=0.3)
    assert loss.item() == pytest.approx(total / len(triples), rel=1e-5)
    loss.backward()
    assert model.embedding.grad.norm() > 0


@pytest.mark.parametrize("count, dim", [(129, 16), (40, 16), (300, 1)])
def test_whiten_gives_the_identity_as_covariance(count, dim):
    turns = [torch.linalg.qr(torch.randn(dim, dim)).Q for _ in range(2)]
    mixing = turns[0] * torch.linspace(0.3, 3, dim) @ turns[1]
    vectors = torch.randn(count, dim) @ mixing + 5 * torch.randn(dim)
    white = whiten(vectors)
    assert white.shape == vectors.shape and white.dtype == vectors.dtype
    torch.testing.assert_close(white.mean(0), torch.zeros(dim), rtol=0, atol=1e-4)
    covariance = white.double().T @ white.double() / (count - 1)
    torch.testing.assert_close(covariance, torch.eye(dim).double(), rtol=0, atol=1e-3)
    # ZCA, not just any whitening: the map is symmetric with positive eigenvalues.
    centred = (vectors - vectors.mean(0)).double()
    mapping = torch.linalg.lstsq(centred, white.double()).solution
    torch.testing.assert_close(mapping, mapping.T, rtol=1e-3, atol=1e-3)
    assert torch.linalg.eigvalsh(mapping + mapping.T).min() > 0


@pytest.mark.parametrize("count", [2, 3, 9])
def test_whiten_with_fewer_items_than_dimensions(count):
    white = whiten(torch.randn(count, 32)).double()
    assert white.isfinite().all()
    values = torch.linalg.eigvalsh(white.T @ white / (count - 1)).flip(0)
    torch.testing.assert_close(
        values[: count - 1], torch.ones(count - 1).double(), atol=1e-3, rtol=0
    )
    assert values[count - 1 :].abs().max() < 1e-6


def test_whiten_of_equal_vectors_is_zero():
    assert not whiten(torch.ones(5, 3)).any()
    assert not whiten(torch.randn(1, 3)).any()


def make_vae(dim=5, hidden=6, tokens=2, sigma=0.5, mask_ratio=0.1, dropout=0.0):
    return SigmaVAE(dim, hidden, tokens, sigma, mask_ratio, dropout)


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 3, 129])
def test_tokenizer_shapes(tokens, count):
    vae = make_vae(tokens=tokens).eval()
    x = torch.randn(count, 5)
    z = vae.encode(x)
    assert z.shape == (count, tokens, 6)
    assert vae.decode(z).shape == (count, 5)
    torch.testing.assert_close(vae.decode(z), vae.decode(z.flip(1)))  # the mean is decoded
    for k in range(tokens):
        torch.testing.assert_close(z[:, k], vae.encoders[k](x + vae.position[k]))
    if tokens > 1:
        assert relative_error(z[:, 0], z[:, 1]) > 1e-3  # codes of their own


def test_sigma_is_drawn_and_not_learned():
    for tokens in (1, 2):
        vae = make_vae(tokens=tokens)
        assert not any("sigma" in name for name, _ in vae.named_parameters())
        assert isinstance(vae.sigma, float)
        shapes = {name: tuple(p.shape) for name, p in vae.named_parameters() if "." not in name}
        assert shapes == {"fill": (5,), "position": (tokens, 5)}


def test_the_deviation_is_half_normal_per_sample(monkeypatch):
    vae = make_vae(dim=1, hidden=64, tokens=2, sigma=0.7, mask_ratio=0.0).eval()
    seen = []
    monkeypatch.setattr(vae, "decode", lambda z: seen.append(z) or torch.zeros(len(z), 1))
    x = torch.randn(4000, 1)
    with torch.no_grad():
        vae.losses(x)
        noise = seen[0] - vae.encode(x)
    deviation = noise.flatten(1).std(1)  # of the 128 elements that share a sample's sigma
    assert float(deviation.square().mean()) == pytest.approx(0.7**2, rel=0.1)
    assert float(deviation.mean()) == pytest.approx(0.7 * math.sqrt(2 / math.pi), rel=0.07)
    assert float((deviation < 0.07).float().mean()) == pytest.approx(0.0797, abs=0.025)


def test_masking_is_for_training_losses_only():
    vae = make_vae(mask_ratio=1.0, sigma=0.0).eval()
    with torch.no_grad():
        vae.fill.fill_(3.0)
    x = torch.randn(9, 5)
    filled = vae.decode(vae.encode(torch.full_like(x, 3.0)))
    assert vae.losses(x)["reconstruction"].item() == pytest.approx(F.mse_loss(filled, x).item())
    assert not torch.equal(vae.encode(x)[0], vae.encode(x)[1])  # encode reads x, not the fill
    vae.losses(x)["reconstruction"].backward()
    assert vae.fill.grad.norm() > 0
    vae.mask_ratio = 0.0
    plain = vae.decode(vae.encode(x))
    assert vae.losses(x)["reconstruction"].item() == pytest.approx(F.mse_loss(plain, x).item())


def test_masking_takes_its_share_of_elements(monkeypatch):
    vae = make_vae(dim=64, mask_ratio=0.1).eval()
    seen = []
    monkeypatch.setattr(vae, "encode", lambda x: seen.append(x) or torch.zeros(len(x), 2, 6))
    x = torch.randn(500, 64)
    vae.losses(x)
    masked = seen[0] != x
    assert (seen[0][masked] == 0).all()  # the fill vector's start
    assert float(masked.float().mean()) == pytest.approx(0.1, abs=0.01)
    assert masked.any(1).float().mean() > 0.9  # elements, not rows


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_tokenizer_losses_equal_their_formulas(tokens):
    vae = make_vae(dim=5, hidden=4, tokens=tokens, sigma=0.0, mask_ratio=0.0).eval().double()
    x = torch.randn(11, 5, dtype=torch.float64)
    losses = vae.losses(x)
    mu = vae.encode(x).detach()
    assert losses["mean"].item() == pytest.approx(float((mu**2).sum()) / mu.numel())
    expected = 0.0
    for i in range(tokens):
        for j in range(i):
            both = torch.cat([mu[:, i], mu[:, j]], dim=1)
            correlation = torch.corrcoef(both.T)[:4, 4:] * 10 / 11  # over N, deviations over N-1
            for a in range(4):
                for b in range(4):
                    c = float(correlation[a, b])
                    expected += ((c - 1) ** 2 if a == b else 0.005 * c**2) / 4
    expected /= max(tokens * (tokens - 1) / 2, 1)
    assert losses["redundancy"].item() == pytest.approx(expected, rel=1e-9)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in vae.parameters() if p.grad is not None)


HEADS = [
    {"denoiser": "linear"},
    {"denoiser": "mlp"},
    {"denoiser": "adaln", "width": 12, "depth": 2},
    {"denoiser": "adaln", "width": 12, "depth": 1, "separable": True},
]
ALL_WEIGHTS = {"diffusion_weight": 1.0, "dispersive_weight": 1.0, "contrastive_weight": 1.0}


def make_head(dim=6, **options):
    """A head of which every parameter is random (modulations start at zero)."""
    head = DiffusionHead(dim, HeadConfig(**{"timesteps": 20, "steps": 4, **options})).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.7 * parameter.shape[-1] ** -0.5)
    return head


@pytest.mark.parametrize("options", HEADS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps, guidance", [(1, 0.0), (3, 0.0), (20, 1.5)])
def test_training_unrolls_the_chain_that_inference_samples(
    options, method, prediction, steps, guidance, monkeypatch
):
    chain = {"method": method, "steps": steps, "guidance": guidance, "prediction": prediction}
    head = make_head(**options, **chain)
    plan = ops.plan_sampling(head.denoiser, head.config.schedule, timesteps=20, **chain)
    condition = torch.randn(5, 6, dtype=torch.float64)
    noise = torch.randn(steps, 5, 6, dtype=torch.float64)
    script = iter(noise)
    monkeypatch.setattr(torch, "randn_like", lambda _: next(script))
    y = head.unroll(condition)
    assert y.requires_grad
    assert len(list(script)) == (0 if method == "ddpm" else steps - 1)
    assert relative_error(y, plan(condition, noise=noise)) < 1e-10


def head_losses(head, condition, x0, negatives, **training):
    return head.losses(condition, x0, negatives, TrainingConfig(**{**ALL_WEIGHTS, **training}))


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("options", HEADS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_losses_reach_the_condition_and_the_head_but_no_target(options, prediction):
    head = make_head(**options, prediction=prediction, condition_dropout=0.5)
    condition, x0, negatives = (doubles(64, 6) for _ in range(3))
    losses = head_losses(head, condition, x0, negatives)
    assert set(losses) == {"diffusion", "dispersive", "contrastive"}
    for loss in losses.values():
        assert loss.shape == () and loss.isfinite()
    sum(losses.values()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad.norm() > 0, name
    reached = condition.grad.any(1)
    assert reached.any() and not reached.all()  # half of them were dropped
    assert x0.grad is None and negatives.grad is None


@pytest.mark.parametrize("name", ["diffusion", "dispersive", "contrastive"])
def test_losses_of_weight_0_are_left_out(name):
    weights = dict.fromkeys(ALL_WEIGHTS, 0.0) | {f"{name}_weight": 0.1}
    losses = head_losses(make_head(), *(doubles(3, 6) for _ in range(3)), **weights)
    assert list(losses) == [name]


def test_without_diffusion_the_condition_is_the_vector():
    condition = doubles(3, 6)
    assert make_head(diffusion=False).unroll(condition) is condition
    none = dict.fromkeys(ALL_WEIGHTS, 0.0)
    assert head_losses(make_head(), condition, condition, condition, **none) == {}


def denoised_alone(head, clean, noise, condition, t):
    """What the network should predict of one row [D], what it predicts, and x0 from that."""
    signal, rest = math.sqrt(head.alpha_bar[t]), math.sqrt(1 - head.alpha_bar[t])
    noisy = signal * clean + rest * noise
    with torch.no_grad():
        output = head.denoiser(noisy[None], condition[None], torch.tensor([t]))[0]
    return {
        "x0": (clean, output, output),
        "eps": (noise, output, (noisy - rest * output) / signal),
        "v": (signal * noise - rest * clean, output, signal * noisy - rest * output),
    }[head.config.prediction]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_head_losses_equal_their_formulas(prediction, monkeypatch):
    head = make_head(**HEADS[1], condition_dropout=0.3, prediction=prediction)
    condition, x0, negatives, noise = (doubles(6, 6).detach() for _ in range(4))
    t, uniform = torch.tensor([0, 1, 5, 10, 18, 19]), torch.rand(6)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: t)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: uniform)
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    losses = head_losses(head, condition, x0, negatives, dispersive_tau=0.7)
    errors, predicted = [], []
    for clean in (x0, negatives):
        for row in range(6):
            dropped = uniform[row] < 0.3
            given = head.denoiser.null_condition.detach() if dropped else condition[row]
            target, output, estimate = denoised_alone(head, clean[row], noise[row], given, t[row])
            errors.append((output - target).square().mean())
            predicted.append(estimate)
    positive, negative = torch.stack(errors).split(6)
    expected = {
        "diffusion": positive.mean(),
        "dispersive": dispersive_loss(torch.stack(predicted[:6]), 0.7),
        "contrastive": contrastive_denoising_loss(positive, negative),
    }
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-6), name


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_a_perfect_network_has_no_loss_and_gives_x0(schedule, prediction, method, monkeypatch):
    options = {"schedule": schedule, "prediction": prediction, "method": method}
    head = make_head(**HEADS[0], **options, steps=7)
    x0 = doubles(5, 6).detach()

    def perfect(denoiser, x, condition, t, guidance, drop=None):
        signal = head.alpha_bar[t][:, None]
        noise = (x - signal.sqrt() * x0) / (1 - signal).sqrt()
        return training_target(prediction, x0, noise, signal)

    monkeypatch.setattr(ops, "denoise", perfect)
    losses = head_losses(head, x0, x0, doubles(5, 6).detach(), contrastive_weight=0.0)
    assert losses["diffusion"] < 1e-16
    assert losses["dispersive"].item() == pytest.approx(dispersive_loss(x0, 0.5).item(), rel=1e-6)
    torch.testing.assert_close(head.unroll(x0), x0, rtol=0, atol=1e-7)


def test_conditions_are_dropped_at_their_rate():
    head = make_head(**HEADS[0], condition_dropout=0.25)
    condition, x0 = doubles(4000, 6), doubles(4000, 6)
    losses = head_losses(head, condition, x0, x0)
    (gradient,) = torch.autograd.grad(losses["diffusion"], condition)
    dropped = (gradient == 0).all(1).double().mean()
    assert float(dropped) == pytest.approx(0.25, abs=0.04)


def test_the_dispersive_loss_is_bounded_to_some_rows():
    condition, x0 = doubles(DISPERSIVE_ROWS + 40, 6), doubles(DISPERSIVE_ROWS + 40, 6)
    losses = head_losses(make_head(**HEADS[0], condition_dropout=0.0), condition, x0, x0)
    (gradient,) = torch.autograd.grad(losses["dispersive"], condition)
    assert gradient[:DISPERSIVE_ROWS].any() and not gradient[DISPERSIVE_ROWS:].any()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"denoiser": "unet"}, ["head.denoiser", "linear, mlp, adaln", "'unet'"]),
        ({"schedule": "cubic"}, ["schedule", "exp", "'cubic'"]),
        ({"method": "euler"}, ["method", "ddpm, ddim, dpm++", "'euler'"]),
        ({"prediction": "noise"}, ["prediction", "x0, eps, v", "'noise'"]),
        ({"timesteps": 0}, ["1", "0"]),
        ({"steps": 21}, ["steps", "20", "21"]),
        ({"steps": 0}, ["steps", "0"]),
        ({"denoiser": "adaln", "width": 0}, ["width", "0"]),
        ({"denoiser": "adaln", "depth": 0}, ["depth", "0"]),
    ],
)
def test_head_refuses(options, words):
    with pytest.raises(ValueError) as caught:
        make_head(**options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_head_holds_no_more_than_its_denoiser():
    head = make_head(**HEADS[2])
    expected = {f"denoiser.{name}" for name in make_denoiser("adaln", 6).state_dict()}
    assert set(head.state_dict()) == expected


@pytest.mark.parametrize("loss", ["bpr", "dispersive"])
def test_gradients_are_the_same_bits_with_several_threads(loss):
    """Many rows share a gradient row: an accumulation in the order of threads would show."""
    threads = torch.get_num_threads()
    pairs = np.stack([np.arange(4000) % 200, np.arange(4000) % 37], axis=1)
    model = LightGCN(np.unique(pairs, axis=0), 200, 37, 64, 2)
    user, item, negative = torch.randint(37, (3, 4096))
    z = torch.randn(256, 64, requires_grad=True)
    torch.set_num_threads(2)
    try:
        found = []
        for _ in range(20):
            if loss == "bpr":
                value, leaf = model.bpr_loss(user, item, negative, 1e-4), model.embedding
            else:
                value, leaf = dispersive_loss(z, 0.5), z
            found.append(torch.autograd.grad(value, leaf)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, found[0]) for gradient in found)
