"""The released code's arithmetic, restated in bench/released.py, against our operations."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from contrec_fast import ops
from contrec_fast.models import AdaLNDenoiser, LinearDenoiser, MLPDenoiser

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))  # where its scripts find each other
import released  # noqa: E402
import reporting  # noqa: E402

FIRST_TOKEN, PAD = 40, 42  # tokens 40 and 41 stand for an item; 42 pads


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def dtype(request):
    """Runs the test in this default dtype: the released arithmetic always uses the default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def relative_error(value, reference):
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize("kind", [LinearDenoiser, MLPDenoiser])
@pytest.mark.parametrize(
    ("users", "dim", "timesteps", "guidance"),
    [(1, 4, 1, 2.0), (3, 6, 3, 0.0), (127, 10, 29, 2.0), (3, 128, 200, 2.0)],
)
def test_sampling_follows_the_plan_step_by_step(dtype, kind, users, dim, timesteps, guidance):
    denoiser = kind(dim)
    condition, noise = torch.randn(users, dim), torch.randn(timesteps, users, dim)
    plan = ops.plan_sampling(denoiser, timesteps=timesteps, guidance=guidance)
    old, table = released.ReleasedDenoiser.from_model(denoiser), released.schedule(timesteps)
    # float32: the release computes 1 - alpha_bar and the sinusoid's angles in float32.
    tolerance = 1e-10 if dtype == torch.float64 else 5e-5
    x = expected = noise[0]
    null = denoiser.null_condition.detach().expand_as(condition)
    for place, index in enumerate(plan.timestep_indices.tolist()):
        c_x0, c_x, sigma = plan.coefficients[place, :3].tolist()
        t = torch.full((users,), index)
        added = noise[place + 1] if index else None
        with torch.no_grad():
            x0 = (1 + guidance) * denoiser(expected, condition, t)
            x0 -= guidance * denoiser(expected, null, t)
        expected = c_x0 * x0 + c_x * expected + (0 if added is None else sigma * added)
        x = released.step(old, table, x, condition, index, guidance, added)
        assert relative_error(x, expected) < tolerance, f"step {index}"
    sampled = released.sample(old, table, condition, guidance, noise)
    assert torch.equal(sampled, x)
    assert relative_error(sampled, plan(condition, noise=noise)) < tolerance


def test_fresh_noise_is_new_at_every_call_and_repeats_with_the_seed():
    old = released.ReleasedDenoiser.from_model(LinearDenoiser(4))
    table, condition = released.schedule(5), torch.randn(3, 4)
    torch.manual_seed(7)
    first, second = (released.sample(old, table, condition) for _ in range(2))
    torch.manual_seed(7)
    assert torch.equal(released.sample(old, table, condition), first)
    assert not torch.equal(first, second)


def test_state_dict_has_the_released_keys():
    time = {f"step_mlp.{layer}.{part}" for layer in (1, 3) for part in ("weight", "bias")}
    first, last = ({f"diffuser.{layer}.{part}" for part in ("weight", "bias")} for layer in (0, 2))
    one = released.ReleasedDenoiser.from_model(LinearDenoiser(6)).state_dict()
    two = released.ReleasedDenoiser.from_model(MLPDenoiser(6)).state_dict()
    assert set(one) == {"none_embedding.weight"} | time | first
    assert set(two) == set(one) | last
    assert one["none_embedding.weight"].shape == (1, 6)
    tokens = set(released.TokenEncoder(6, 8).state_dict())
    assert {name.split(".")[2] for name in tokens} == set("01458")
    assert {name.split(".")[1] for name in tokens} == set("01")


def test_denoisers_without_a_released_counterpart_are_refused():
    with pytest.raises(TypeError, match="^denoiser: expected .* got AdaLNDenoiser$"):
        released.ReleasedDenoiser.from_model(AdaLNDenoiser(4, 8, 1))
    for dim in (1, 2, 7):  # the released frequencies divide by dim / 2 - 1, its halves are equal
        with pytest.raises(ValueError, match=f"^dim: expected an even width .* got {dim}$"):
            released.ReleasedDenoiser.from_model(LinearDenoiser(dim))


def test_prompts_are_padded_on_the_left_and_cut_on_the_right():
    padded = released.pad_prompts([[5, 6], [], [1, 2, 3, 4]], PAD, length=3)
    assert padded.tolist() == [[PAD, 5, 6], [PAD, PAD, PAD], [1, 2, 3]]
    assert released.pad_prompts([], PAD, length=3).shape == (0, 3)
    assert released.pad_prompts([[5]], PAD).shape == (1, 1024)


def prompts_with_items(histories, length):
    """Padded random prompts that show these items, and the token-table row of each position."""
    prompts, rows = [], []
    for history in histories:
        prompt, row = [], []
        for item in history:
            text = torch.randint(FIRST_TOKEN, (int(torch.randint(4, ())),)).tolist()
            prompt += [*text, FIRST_TOKEN, FIRST_TOKEN + 1]
            row += [-1] * len(text) + [2 * item, 2 * item + 1]
        prompts.append(prompt)
        rows.append(row)
    return released.pad_prompts(prompts, PAD, length), released.pad_prompts(rows, -1, length)


def insert_both_ways(histories, vectors, encoder, text_table, length):
    token_ids, rows = prompts_with_items(histories, length)
    arguments = (token_ids, histories, vectors, encoder, text_table, FIRST_TOKEN)
    inserted = released.insert_tokens(*arguments)
    with torch.no_grad():
        tokens = encoder(vectors).transpose(0, 1).reshape(-1, text_table.shape[1])
    gathered = ops.gather_tokens(token_ids, rows, text_table, tokens.to(text_table.dtype))
    return inserted, gathered


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "items", "width", "length"),
    [([1], 1, 1, 5), ([0, 1, 3], 3, 3, 17), ([20, 0, 7], 129, 127, 129), ([], 3, 5, 4)],
)
def test_insertion_equals_the_gather(stored, lengths, items, width, length):
    histories = [torch.randint(items, (count,)).tolist() for count in lengths]
    vectors, text_table = torch.randn(items, width), torch.randn(PAD + 1, width, dtype=stored)

    def encoder(x):  # element-wise, so that the bits do not depend on how many items go in
        return torch.stack([2 * x + 1, -3 * x])

    inserted, gathered = insert_both_ways(histories, vectors, encoder, text_table, length)
    assert inserted.shape == (len(lengths), length, width)
    assert inserted.dtype == stored
    assert torch.equal(inserted, gathered)


def test_insertion_with_the_released_encoders_equals_the_gather_of_their_table():
    histories = [torch.randint(129, (count,)).tolist() for count in (3, 20, 1)]
    vectors, text_table = torch.randn(129, 10), torch.randn(PAD + 1, 33)
    encoder = released.TokenEncoder(10, 33)
    for _ in range(3):
        encoder(vectors)  # in training mode: batch statistics other than 0 and 1
    inserted, gathered = insert_both_ways(histories, vectors, encoder.eval(), text_table, 129)
    torch.testing.assert_close(inserted, gathered, rtol=1e-4, atol=1e-5)
    mean = torch.stack([layers(vectors[:3]) for layers in encoder.encoders])
    constant = (encoder.sigma * encoder.epsilon).expand_as(mean)
    torch.testing.assert_close(encoder(vectors[:3]) - mean, constant, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("users", "items", "dim", "k"), [(1, 1, 3, 1), (3, 129, 1, 129), (127, 127, 129, 7)]
)
def test_ranking_equals_cosine_topk_without_excluded_items(users, items, dim, k):
    vectors, item_vectors = torch.randn(users, dim), torch.randn(items, dim)
    scores, ranking = released.rank(vectors, item_vectors, [[]] * users)
    assert torch.equal(ranking.sort(dim=1).values, torch.arange(items).expand(users, items))
    best, ids = ops.cosine_topk(vectors, ops.Catalog(item_vectors), k)
    # Scores and not ids: nearly equal items may change places in float32.
    torch.testing.assert_close(scores.gather(1, ranking[:, :k]), best, rtol=0, atol=2e-6)
    torch.testing.assert_close(scores.gather(1, ids), best, rtol=0, atol=2e-6)


def test_ranking_equals_cosine_topk_while_scores_are_positive():
    vectors, item_vectors = torch.randn(3, 16), torch.randn(129, 16)
    excluded = [torch.randperm(129)[:count].tolist() for count in (0, 1, 20)]
    seen, rows = ops.SeenLists.from_lists(excluded), torch.arange(3)
    best, ids = ops.cosine_topk(vectors, ops.Catalog(item_vectors), 5, seen=seen, seen_rows=rows)
    assert best.min() > 0  # so that no excluded item, at 0, comes between
    scores, ranking = released.rank(vectors, item_vectors, excluded)
    torch.testing.assert_close(scores.gather(1, ranking[:, :5]), best, rtol=0, atol=2e-6)
    torch.testing.assert_close(scores.gather(1, ids), best, rtol=0, atol=2e-6)


def test_excluded_items_outrank_negative_cosines_as_released_and_never_here():
    vectors, item_vectors = torch.randn(3, 7), torch.randn(129, 7).abs()
    vectors = -vectors.abs()  # every cosine is negative
    excluded = [[5], [0, 128], torch.randperm(129)[:127].tolist()]
    scores, ranking = released.rank(vectors, item_vectors, excluded)
    seen, rows = ops.SeenLists.from_lists(excluded), torch.arange(3)
    catalog = ops.Catalog(item_vectors)
    _, ids = ops.cosine_topk(vectors, catalog, 129, seen=seen, seen_rows=rows)
    for user, left_out in enumerate(excluded):
        count = len(left_out)
        assert set(ranking[user, :count].tolist()) == set(left_out)
        assert scores[user, ranking[user, :count]].eq(0).all()
        assert scores[user, ranking[user, count:]].lt(0).all()
        assert not set(ids[user].tolist()) & set(left_out)


def test_metrics_of_a_hand_computed_case():
    ranking = torch.tensor([[4, 1, 2, 3, 0], [0, 1, 4, 2, 3], [0, 1, 2, 3, 4], [1, 0, 2, 4, 3]])
    # Places of the targets: first, third, fifth (missed at 3), second.
    hit_rate, ndcg = released.metrics([4, 4, 4, 0], ranking, k=3)
    assert hit_rate == 3 / 4
    assert ndcg == pytest.approx((1 + 1 / 2 + 0 + 1 / math.log2(3)) / 4, rel=1e-6)
    assert released.metrics([4, 4, 4, 0], ranking, k=1) == (1 / 4, 1 / 4)
    assert released.metrics([9], ranking[:1], k=99) == (0, 0)


@pytest.mark.parametrize(("users", "items", "k"), [(1, 1, 1), (3, 129, 127), (127, 3, 10)])
def test_metrics_equal_the_closed_form(users, items, k):
    ranking = torch.stack([torch.randperm(items) for _ in range(users)])
    targets = torch.randint(items, (users,))
    place = (ranking == targets[:, None]).int().argmax(dim=1).double()
    hit = place < k
    hit_rate, ndcg = released.metrics(targets.tolist(), ranking, k)
    assert hit_rate == pytest.approx(float(hit.double().mean()))
    assert ndcg == pytest.approx(float((hit / (place + 2).log2()).mean()), rel=1e-5)


def test_no_user_is_refused_in_one_line():
    with pytest.raises(ValueError, match="^vectors: expected at least one user, got none$"):
        released.rank(torch.empty(0, 3), torch.randn(5, 3), [])
    with pytest.raises(ValueError, match="^ranking: expected at least one user, got none$"):
        released.metrics([], torch.empty(0, 5, dtype=torch.int64), 3)


@pytest.mark.parametrize("denoiser", ["linear", "mlp"])
def test_command_line_reports_every_stage(denoiser, tmp_path, capsys):
    threads = torch.get_num_threads()
    out = tmp_path / "results" / "released.json"
    sizes = {"users": 3, "items": 7, "dim": 6, "hidden": 4, "steps": 5, "repeats": 3}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    released.main([*options, "--denoiser", denoiser, "--threads", "1", "--out", str(out)])
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["insert", "sample", "rank", "metrics"]
    assert {line.count(" | ") for line in lines[1:]} == {9}
    stored = json.loads(out.read_text())
    assert stored["environment"]["torch"] == torch.__version__
    assert stored["environment"]["threads"] == 1
    assert stored["settings"] | sizes == stored["settings"]
    for case in stored["results"]:
        assert len(case["seconds"]) == 3
        assert 0 < case["p20_us"] <= case["median_us"] <= case["p80_us"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--users", "0"], "argument --users: invalid positive integer value: '0'"),
        (["--dim", "7"], "argument --dim: expected an even width of at least 4, got 7"),
        (["--denoiser", "adaln"], "argument --denoiser: invalid choice: 'adaln'"),
    ],
)
def test_command_line_refuses_bad_options(options, message, capsys):
    with pytest.raises(SystemExit):
        released.main(options)
    assert message in capsys.readouterr().err


def test_records_hold_quantiles_and_ratios():
    seconds = [5e-6, 1e-6, 3e-6, 4e-6, 2e-6, 6e-6]
    case = reporting.record(
        "rank", "1 x 1", "float32", "released, cpu", seconds,
        flops=7e6, moved=7e3, floor_s=7e-7, torch_s=7e-6, graph_s=35e-7,
    )  # fmt: skip
    assert (case["p20_us"], case["median_us"], case["p80_us"]) == pytest.approx((2, 3.5, 5))
    assert reporting.line(case).endswith("| 4 (2, 5) | 2 | 2 | 20 | 2 | 1")
    bare = reporting.record("rank", "1 x 1", "float32", "released, cpu", [2e-6])
    assert reporting.line(bare).endswith("| 2 (2, 2) | - | - | - | - | -")
    with pytest.raises(ValueError, match="^seconds: expected at least one repeat, got none$"):
        reporting.record("rank", "1 x 1", "float32", "released, cpu", [])
