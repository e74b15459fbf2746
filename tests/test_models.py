"""LightGCN, the sigma-VAE, the diffusion head and the losses against restatements."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_cases import one_thread  # noqa: F401
from ops_cases import make_denoiser, relative_error

from contrec_fast import ops
from contrec_fast.config import HeadConfig, TrainingConfig
from contrec_fast.models.diffusion import DISPERSIVE_ROWS, DiffusionHead
from contrec_fast.models.lightgcn import LightGCN, whiten
from contrec_fast.models.losses import dispersive_loss
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
    for got, want in zip(model(), expected):
        assert got.shape == want.shape
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


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


def naive_dispersive(z, tau):
    terms = [
        math.exp(-float((z[i] - z[j]).square().sum()) / (z.shape[1] * tau))
        for i in range(len(z))
        for j in range(len(z))
        if i != j
    ]
    return math.log(sum(terms) / len(terms))


@pytest.mark.parametrize("count, dim", [(2, 1), (3, 7), (17, 5)])
@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_dispersive_loss_equals_the_double_loop(count, dim, tau):
    z = torch.randn(count, dim, dtype=torch.float64)
    assert float(dispersive_loss(z, tau)) == pytest.approx(naive_dispersive(z, tau), rel=1e-9)


def test_dispersive_loss_of_fewer_than_two_rows_is_zero():
    for count in (0, 1):
        assert float(dispersive_loss(torch.randn(count, 3), 0.5)) == 0


def test_descending_the_dispersive_loss_spreads_the_rows():
    z = (0.1 * torch.randn(12, 6)).requires_grad_()
    before = torch.pdist(z.detach()).mean()
    for _ in range(20):
        (gradient,) = torch.autograd.grad(dispersive_loss(z, 0.5), z)
        z.data -= gradient
    assert torch.pdist(z.detach()).mean() > 1.5 * before


HEADS = [
    {"denoiser": "linear"},
    {"denoiser": "mlp"},
    {"denoiser": "adaln", "width": 12, "depth": 2},
    {"denoiser": "adaln", "width": 12, "depth": 1, "separable": True},
]


def make_head(dim=6, **options):
    """A head of which every parameter is random (modulations start at zero)."""
    head = DiffusionHead(dim, HeadConfig(**{"timesteps": 20, "steps": 4, **options})).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.7 * parameter.shape[-1] ** -0.5)
    return head


@pytest.mark.parametrize("options", HEADS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps, guidance", [(1, 0.0), (3, 0.0), (20, 1.5)])
def test_training_unrolls_the_chain_that_inference_samples(
    options, method, steps, guidance, monkeypatch
):
    head = make_head(**options, method=method, steps=steps, guidance=guidance)
    c = head.config
    plan = ops.plan_sampling(head.denoiser, c.schedule, c.timesteps, c.method, c.steps, c.guidance)
    condition = torch.randn(5, 6, dtype=torch.float64)
    noise = torch.randn(steps, 5, 6, dtype=torch.float64)
    script = iter(noise)
    monkeypatch.setattr(torch, "randn_like", lambda _: next(script))
    y = head.unroll(condition)
    assert y.requires_grad
    assert len(list(script)) == (0 if method == "ddpm" else steps - 1)
    assert relative_error(y, plan(condition, noise=noise)) < 1e-10


def head_losses(head, condition, items, vectors, **training):
    return head.losses(condition, items, vectors, TrainingConfig(**training))


@pytest.mark.parametrize("options", HEADS, ids=lambda o: "-".join(map(str, o.values())))
def test_losses_reach_every_parameter_of_the_head(options):
    head = make_head(**options, condition_dropout=0.5)
    condition = torch.randn(64, 6, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    items = torch.randint(9, (64,))
    losses = head_losses(head, condition, items, vectors)
    assert set(losses) == {"diffusion", "dispersive", "ranking"}
    for loss in losses.values():
        assert loss.shape == () and loss.isfinite()
    sum(losses.values()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad.norm() > 0, name
    assert (condition.grad.norm(dim=1) > 0).all()


def test_only_ranking_trains_the_item_table():
    head = make_head(**HEADS[1])
    condition, items = torch.randn(7, 6, dtype=torch.float64), torch.randint(9, (7,))
    vectors = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    losses = head_losses(head, condition, items, vectors)
    for name in ("diffusion", "dispersive"):
        (gradient,) = torch.autograd.grad(
            losses[name], vectors, allow_unused=True, retain_graph=True
        )
        assert gradient is None or not gradient.any(), name
    (gradient,) = torch.autograd.grad(losses["ranking"], vectors)
    assert (gradient.norm(dim=1) > 0).all()


def test_head_losses_equal_their_formulas(monkeypatch):
    head = make_head(**HEADS[1], condition_dropout=0.3, method="ddim")
    condition = torch.randn(6, 6, dtype=torch.float64)
    vectors, items = torch.randn(9, 6, dtype=torch.float64), torch.randint(9, (6,))
    t, uniform = torch.tensor([0, 1, 5, 10, 18, 19]), torch.rand(6, 1)
    noise = [torch.randn(6, 6, dtype=torch.float64) for _ in range(2)]
    script = iter(noise)
    monkeypatch.setattr(torch, "randint", lambda high, *_, **__: t if high == 20 else None)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: uniform)
    monkeypatch.setattr(torch, "randn_like", lambda _: next(script))
    losses = head_losses(
        head, condition, items, vectors, dispersive_tau=0.7, ranking_temperature=0.2
    )
    rows = []
    for row in range(6):
        share = float(head.alpha_bar[t[row]])
        noisy = math.sqrt(share) * vectors[items[row]] + math.sqrt(1 - share) * noise[0][row]
        null = head.denoiser.null_condition
        condition_row = null if uniform[row] < 0.3 else condition[row]
        rows.append(head.denoiser(noisy[None], condition_row[None], t[row : row + 1])[0])
    prediction = torch.stack(rows).detach()
    error = (prediction - vectors[items]).square().mean()
    assert losses["diffusion"].item() == pytest.approx(float(error))
    assert losses["dispersive"].item() == pytest.approx(naive_dispersive(prediction, 0.7))
    c = head.config
    plan = ops.plan_sampling(head.denoiser, c.schedule, 20, "ddim", 4, c.guidance)
    y = plan(condition, noise=noise[1][None])
    cosine = F.cosine_similarity(y[:, None], vectors[None], dim=-1)
    expected = F.cross_entropy(cosine / 0.2, items)
    assert losses["ranking"].item() == pytest.approx(float(expected))


def test_conditions_are_dropped_at_their_rate():
    head = make_head(**HEADS[0], condition_dropout=0.25)
    condition = torch.randn(4000, 6, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(3, 6, dtype=torch.float64)
    losses = head_losses(head, condition, torch.randint(3, (4000,)), vectors)
    (gradient,) = torch.autograd.grad(losses["diffusion"], condition)
    dropped = (gradient == 0).all(1).double().mean()
    assert float(dropped) == pytest.approx(0.25, abs=0.04)


def test_the_dispersive_loss_is_bounded_to_some_rows():
    count = DISPERSIVE_ROWS + 40
    head = make_head(**HEADS[0])
    condition = torch.randn(count, 6, dtype=torch.float64, requires_grad=True)
    losses = head_losses(
        head, condition, torch.zeros(count, dtype=torch.int64), torch.ones(1, 6).double()
    )
    (gradient,) = torch.autograd.grad(losses["dispersive"], condition)
    assert gradient[:DISPERSIVE_ROWS].any() and not gradient[DISPERSIVE_ROWS:].any()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"denoiser": "unet"}, ["head.denoiser", "linear, mlp, adaln", "'unet'"]),
        ({"schedule": "cubic"}, ["schedule", "exp", "'cubic'"]),
        ({"method": "euler"}, ["method", "ddpm, ddim", "'euler'"]),
        ({"timesteps": 0}, ["1", "0"]),
        ({"steps": 21}, ["steps", "20", "21"]),
        ({"steps": 0}, ["steps", "0"]),
        ({"width": 0}, ["width", "0"]),
        ({"depth": 0}, ["depth", "0"]),
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
