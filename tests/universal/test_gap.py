"""Gaps: exact where they are sums, unbiased where they are sampled, and zero for the reference itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmojo import presets
from bmojo.data.synthetic import EVALUATION, make_task
from bmojo.errors import UniversalError
from bmojo.hf import BMojoConfig, BMojoForCausalLM
from bmojo.nn.model import BMojoLM
from bmojo.universal.autoregression import AR
from bmojo.universal.ctw import CTW
from bmojo.universal.enumeration import Counts
from bmojo.universal.gap import InContext, Uniform, ctw_gap, kalman_gap, solomonoff_gap
from bmojo.universal.kt import KT
from bmojo.universal.table import SolomonoffTable


def table_of(levels):
    """A table with these counts of all strings of 0, 1 ... bits."""
    n_bits = len(levels) - 1
    counts = Counts.none(n_bits)
    counts.first[1:] = np.concatenate(levels)
    return SolomonoffTable("bp7", "", 7, n_bits, 1, 1, counts)


def random_table(n_bits, seed):
    """Of any semimeasure on `n_bits` bits."""
    draw, levels = np.random.default_rng(seed), [np.array([10**6], np.uint64)]
    for _ in range(n_bits):
        parent = np.repeat(levels[-1], 2).astype(float).reshape(-1, 2)
        share = draw.dirichlet([0.3, 0.3, 0.3], len(parent))[:, :2]
        levels.append((parent * share).ravel().astype(np.uint64))
    return table_of(levels)


class Known:
    """M_norm of a table as a predictor, word for word."""

    def __init__(self, table):
        self.levels = table.levels()

    def probabilities(self, x):
        result = np.empty(x.shape)
        for row, string in enumerate(x):
            node = 0
            for t, bit in enumerate(string):
                zero, one = (int(count) for count in self.levels[t + 1][2 * node : 2 * node + 2])
                result[row, t] = one / (zero + one) if zero + one else 0.5
                node = 2 * node + int(bit)
        return result


class Fixed:
    def __init__(self, probabilities):
        self.fixed = probabilities

    def distribution(self, x):
        return np.broadcast_to(self.fixed, (*x.shape, self.fixed.shape[-1]))


def literal_gap(model, table):
    """sum_x M_norm(x) log2 M_norm(x) / q(x), and the entropy, string by string."""
    n, gap, entropy = table.n_bits, 0.0, 0.0
    for number in range(2**n):
        x = np.array([[int(bit) for bit in f"{number:0{n}b}"]], np.uint8)
        p, q = (
            np.prod(np.where(x, ones, 1 - ones)) for ones in (Known(table).probabilities(x), model.probabilities(x))
        )
        if p > 0:
            gap, entropy = gap + p * np.log2(p / q), entropy - p * np.log2(p)
    return gap, entropy


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(0, 2**31), st.integers(0, 2**31))
def test_the_gap_is_zero_for_the_table_and_positive_for_others(n_bits, seed, other):
    table = random_table(n_bits, seed)
    own = solomonoff_gap(Known(table), table)
    np.testing.assert_allclose(own.positions, 0, atol=1e-12)
    q = 0.001 + 0.998 * np.random.default_rng(other).random(n_bits)
    model = Fixed(np.stack([1 - q, q], -1))
    assert (solomonoff_gap(model, table).positions >= -1e-12).all()
    uniform = solomonoff_gap(Uniform(), table)
    assert uniform.total == pytest.approx(n_bits - uniform.entropy)
    assert uniform.total_ci95 == 0
    gap, entropy = literal_gap(KT(), table)
    got = solomonoff_gap(KT(), table)
    assert (got.total, got.entropy) == pytest.approx((gap, entropy))
    assert len(got.positions) == n_bits


def test_the_gap_of_a_solomonoff_table():
    table = SolomonoffTable.build(n_bits=6, depth=5, threads=1)
    gap = solomonoff_gap(CTW(4), table)
    assert (gap.total, gap.entropy) == pytest.approx(literal_gap(CTW(4), table))
    assert gap.entropy == pytest.approx(table.entropy())


@pytest.mark.slow
def test_gaps_as_they_were_first_measured():
    """Depth 10, 16 bits, by another program: uniform 11.53, KT 4.40, CTW 2.76."""
    table = SolomonoffTable.build(n_bits=16, depth=10, threads=1)
    for model, bits in ((Uniform(), 11.53), (KT(), 4.40), (CTW(4), 2.76)):
        assert solomonoff_gap(model, table).total == pytest.approx(bits, abs=0.01)


def test_what_a_model_rules_out_costs_infinity():
    table = table_of([[4], [1, 3]])
    assert solomonoff_gap(Fixed(np.array([0.0, 1.0])), table).total == np.inf
    table = table_of([[4], [0, 3]])
    assert solomonoff_gap(Fixed(np.array([0.0, 1.0])), table).total == 0


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return BMojoLM(presets.bmojo("tiny", vocab_size=8, window=16, chunk_size=16, num_layers=1)).train()


def test_a_model_in_context(model):
    """Renormalised logits, whatever the module answers with; position t has read the start and the symbols before."""
    x = np.random.default_rng(0).integers(2, size=(5, 40)).astype(np.uint8)
    predictor = InContext(model, symbols=(6, 3), start=1, batch=2)
    ones = predictor.probabilities(x)
    assert model.training
    for row, t in ((0, 0), (3, 1), (4, 39)):
        tokens = torch.tensor([[1, *(3 if bit else 6 for bit in x[row, :t])]])
        logits = model.eval()(tokens)[0][0, -1].detach().double()
        assert ones[row, t] == pytest.approx(float((logits[3] - logits[6]).sigmoid()), abs=1e-6)
    twin = BMojoForCausalLM(BMojoConfig.from_core(model.config))
    twin.model.load_state_dict(model.state_dict())
    for other in (twin, Logits(model)):
        np.testing.assert_allclose(InContext(other, (6, 3), 1).probabilities(x), ones, atol=1e-6)


class Logits(torch.nn.Module):
    """A model that answers with its logits alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens)[0]


def test_refuses(model):
    task, trees = make_task("linear_gaussian", length=8), make_task("markov_tree", length=8)
    for call, message in (
        (lambda: InContext(model, (0, 8)), "at least 0 and below the vocabulary's 8, got 8; name the ids"),
        (lambda: InContext(model, start=-1), "got -1"),
        (lambda: InContext(model, (3, 3)), r"two or more different tokens, got \[3, 3\]"),
        (lambda: kalman_gap(InContext(model), task, EVALUATION, 4), "symbols or more, got 2; name the tokens of all"),
        (lambda: ctw_gap(InContext(model, range(3), 7), trees, EVALUATION, 4), r"\[4, 8, 2\], got \[4, 8, 3\]"),
        (lambda: ctw_gap(KT(), trees, EVALUATION, 1), "rows must be at least 2"),
        (lambda: ctw_gap(model, trees, EVALUATION, 4), r"BMojoLM has neither; .*: InContext\(model, symbols"),
    ):
        with pytest.raises(UniversalError, match=message):
            call()


def test_the_gap_to_context_trees():
    task = make_task("markov_tree", length=60, depth=4)
    own = ctw_gap(CTW(4), task, EVALUATION, 300, depth=4)
    assert (own.ctw.positions == 0).all()
    assert own.source.total > 3 * own.source.total_ci95 > 0
    other = ctw_gap(KT(), task, EVALUATION, 300, depth=4)
    assert other.ctw.total == pytest.approx(other.source.total - own.source.total)
    assert other.ctw.total > 2 * other.ctw.total_ci95
    assert other.ctw.total == pytest.approx(other.ctw.totals.mean())
    # what it says is the mean of what coding costs
    x, given_ones = task.bits(EVALUATION, 300)
    cost = CTW(4).log2_probability(x) - KT().log2_probability(x)
    error = (cost - other.ctw.totals).std() / np.sqrt(300)
    assert abs(cost.mean() - other.ctw.total) < 4 * error
    entropy = -np.log2(np.where(x, given_ones, 1 - given_ones)).sum(1)
    assert abs(entropy.mean() - other.source.entropy) < 4 * entropy.std() / np.sqrt(300)


def test_intervals_cover():
    """Of 40 intervals over other sources, most hold the mean of all."""
    task = make_task("markov_tree", length=20, depth=3)
    gaps = [ctw_gap(Uniform(), task, number, 50, depth=3).source for number in range(40)]
    mean = np.mean([gap.total for gap in gaps])
    assert 33 <= sum(abs(gap.total - mean) < gap.total_ci95 for gap in gaps) <= 40


def test_the_gap_to_the_kalman_filter():
    task = make_task("linear_gaussian", length=40)
    filtered = task.predictions(EVALUATION, 200)

    class Filter:
        def distribution(self, x):
            return task.probabilities(*filtered)

    own = kalman_gap(Filter(), task, EVALUATION, 200)
    assert (own.positions == 0).all()
    marginal = Fixed(task.probabilities(np.zeros(()), np.ones(())))
    gap = kalman_gap(marginal, task, EVALUATION, 200)
    assert gap.positions[0] == pytest.approx(0, abs=1e-9)  # every system has unit variance
    assert gap.positions[5:].min() > 0.3
    x = task.batch(EVALUATION, 200)["labels"]
    p, q = Filter().distribution(x), marginal.distribution(x)
    cost = np.log2(np.take_along_axis(p / q, x[..., None], -1)).sum((1, 2))
    assert abs(cost.mean() - gap.total) < 4 * (cost - gap.totals).std() / np.sqrt(200)
    learned = kalman_gap(AR(task.edges, task.centres), task, EVALUATION, 200)
    assert learned.total_ci95 < learned.total < 0.6 * gap.total


def test_autoregression_is_the_bayes_mixture():
    """Orders 0 to 2 against the closed form of a regression with a normal-gamma prior, at every length."""
    from scipy.stats import t as student

    task = make_task("linear_gaussian", length=12, bins=6, span=2.0)
    x = task.batch(0, 2)["labels"]
    shares = AR(task.edges, task.centres, order=2).distribution(x)
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-12)
    edges = np.array([-np.inf, *task.edges, np.inf])
    for row in range(2):
        y, weights = task.centres[x[row]], np.ones(3)
        for t in range(12):
            each = []
            for p in range(3):
                padded = np.concatenate([np.zeros(p), y])
                Z = np.array([padded[i : i + p][::-1] for i in range(t + 1)]).reshape(t + 1, p)
                past, now = Z[:-1], Z[-1]
                V = np.linalg.inv(np.eye(p) + past.T @ past)
                a = V @ past.T @ y[:t]
                rate = 1 + (y[:t] @ y[:t] - a @ np.linalg.inv(V) @ a) / 2
                scale = np.sqrt(rate / (2 + t / 2) * (1 + now @ V @ now))
                each.append(np.diff(student.cdf((edges - now @ a) / scale, 4 + t)))
            np.testing.assert_allclose(shares[row, t], weights @ each / weights.sum(), atol=1e-10)
            weights = weights * np.array(each)[:, x[row, t]]
