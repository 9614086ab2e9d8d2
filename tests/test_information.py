"""When the loss is information and when it teaches nothing: a small world, fully enumerated.

A response is "a", "ba" or "bb". Two numbers per constitution decide: the odds of a first "b", and
of a second. Expectations run over every way to sample one response under each of n = 3
constitutions, with its probability.
"""
import itertools, math

import pytest
import torch

from sami import as_matrix, infonce, kl_to_base, sami_loss

THETA = torch.tensor([[0.3, 1.2], [-1.1, -0.4], [1.5, 0.1]], dtype=torch.float64)  # (n, 2) log odds
N = len(THETA)


def token_logps(theta):
    """-> for each constitution its three responses, each as a tensor of token log-probs."""
    b, not_b = torch.nn.functional.logsigmoid(theta), torch.nn.functional.logsigmoid(-theta)
    return [[not_b[i, :1], torch.stack([b[i, 0], not_b[i, 1]]), torch.stack([b[i, 0], b[i, 1]])]
            for i in range(N)]


def expected(value, theta, temperature=1.0, reduce="sum"):
    """E value(logp) over all choices y_1..y_n, y_j sampled under c_j token by token at a
    temperature, scored at 1."""
    sampling = [[t.sum().exp() for t in row] for row in token_logps((theta / temperature).detach())]
    scoring = token_logps(theta)
    return sum(math.prod(sampling[j][y] for j, y in enumerate(ys))
               * value(as_matrix([[scoring[i][y] for y in ys] for i in range(N)], reduce))
               for ys in itertools.product(range(3), repeat=N))


def information(theta):
    """I(Y; C) of a uniform choice among the constitutions, by its definition."""
    # (n, 3) p(y | c)
    p = torch.tensor([[t.sum().exp() for t in row] for row in token_logps(theta)])
    return (p / N * (p / p.mean(0)).log()).sum().item()


def gradient(contrast, **how):
    theta = THETA.clone().requires_grad_()
    expected(lambda logp: sami_loss(logp, contrast), theta, **how).backward()
    return theta.grad


def test_probabilities_sum_to_one():
    assert expected(lambda logp: torch.ones(()), THETA).item() == pytest.approx(1)


def test_with_summed_log_probs_infonce_is_exactly_the_mutual_information():
    assert expected(infonce, THETA).item() == pytest.approx(information(THETA), abs=1e-12)
    assert 0.1 < information(THETA) < math.log(N)


def test_with_means_over_tokens_the_same_formula_is_another_number():
    assert abs(expected(infonce, THETA, reduce="mean").item() - information(THETA)) > 0.01


def test_scoring_with_another_model_than_the_sampling_one_still_gives_a_lower_bound():
    sharp, blunt = THETA, 0.3 * THETA  # sample from one, score with the other
    # blunt / 0.3 = sharp
    assert expected(infonce, blunt, temperature=0.3).item() < information(sharp)


def test_the_row_term_is_no_bound():
    """c_1 always says A; c_2 says A one time in five, else B. By hand, with y_1 = A:
    I = H(0.6, 0.4) - H(0.2, 0.8) / 2, and
    log 2 - row averages log 2 p(y_i | c_i) / (p(y_1 | c_i) + p(y_2 | c_i))."""
    p = torch.tensor([[1.0, 1e-30], [0.2, 0.8]], dtype=torch.float64)
    h = lambda q: -q * math.log(q) - (1 - q) * math.log(1 - q)
    mutual = h(0.6) - h(0.2) / 2
    row = lambda y: sami_loss(p[:, [0, y]].log(), "responses").item()
    value = {y: math.log(2) - row(y) for y in (0, 1)}  # y_2 = A, y_2 = B
    assert value[0] == pytest.approx(0)
    assert value[1] == pytest.approx((math.log(2) + math.log(1.6)) / 2)
    assert 0.2 * value[0] + 0.8 * value[1] > mutual + 0.04  # 0.465 > 0.423


def test_temperature_one_with_summed_log_probs_teaches_nothing():
    """The samples carry the very posterior that the model assigns: the column term's expected
    gradient is zero."""
    assert gradient("constitutions").abs().max() < 1e-12
    assert gradient("responses").abs().max() > 0.01  # the row term, no bound, has no such excuse


@pytest.mark.parametrize("how", [dict(temperature=0.5), dict(reduce="mean"),
                                 dict(temperature=0.5, reduce="mean")])
def test_colder_samples_or_means_over_tokens_do_teach(how):
    assert gradient("constitutions", **how).abs().max() > 0.01


def test_a_step_on_cold_samples_raises_the_information():
    for reduce in ("sum", "mean"):
        better = THETA - gradient("two-sided", temperature=0.5, reduce=reduce)
        assert information(better) > information(THETA) + 1e-3


def test_the_kl_estimate_is_right_on_average_and_never_negative():
    policy, base = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    k3 = kl_to_base(policy.log(), base.log())  # for each token that could be sampled
    exact = (policy * (policy / base).log()).sum().item()
    assert (policy * k3).sum().item() == pytest.approx(exact)
    assert (k3 >= 0).all() and kl_to_base(policy.log(), policy.log()).abs().max() == 0
