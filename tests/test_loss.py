"""The SAMI loss is two cross entropies of one n x n matrix: of its rows and of its columns."""
import math

import pytest
import torch

from sami import infonce, sami_loss

# under c_1 response y_1 is 4 times as likely as y_2, under c_2 the two are equally likely
LOGP = torch.tensor([[0.8, 0.2], [0.5, 0.5]]).log()


def test_two_by_two_by_hand():
    row = -(math.log(0.8 / (0.8 + 0.2)) + math.log(0.5 / (0.5 + 0.5))) / 2  # each row sums to 1
    col = -(math.log(0.8 / (0.8 + 0.5)) + math.log(0.5 / (0.2 + 0.5))) / 2  # each column sums to 1
    assert sami_loss(LOGP, "responses").item() == pytest.approx(row)
    assert sami_loss(LOGP, "constitutions").item() == pytest.approx(col)
    assert sami_loss(LOGP).item() == pytest.approx((row + col) / 2)
    assert infonce(LOGP).item() == pytest.approx(math.log(2) - col)


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("contrast", ["two-sided", "constitutions", "responses"])
def test_chance_is_log_n_and_certainty_is_zero(n, contrast):
    assert sami_loss(torch.full((n, n), -3.0), contrast).item() == pytest.approx(math.log(n))
    certain = torch.eye(n) * 1000 - 2000  # log-probs of -1000 and -2000
    assert sami_loss(certain, contrast).item() == 0


def test_five_constitutions_against_plain_arithmetic():
    p = torch.rand(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    row = -sum(math.log(p[i, i] / p[i].sum()) for i in range(5)) / 5
    col = -sum(math.log(p[j, j] / p[:, j].sum()) for j in range(5)) / 5
    assert sami_loss(p.log(), "responses").item() == pytest.approx(row, abs=1e-12)
    assert sami_loss(p.log(), "constitutions").item() == pytest.approx(col, abs=1e-12)
    assert sami_loss(p.log()).item() == pytest.approx((row + col) / 2, abs=1e-12)


def test_transposition_swaps_the_two_terms():
    row, col = (sami_loss(LOGP, contrast) for contrast in ("responses", "constitutions"))
    assert sami_loss(LOGP.T, "responses") == col != row == sami_loss(LOGP.T, "constitutions")
    assert sami_loss(LOGP.T) == sami_loss(LOGP)


def test_each_term_is_blind_to_its_own_kind_of_shift():
    """A constitution that raises all responses alike moves the column term only; a response that is
    likely under every constitution (a short one, a dull one) moves the row term only."""
    for shift, blind, sighted in ((torch.tensor([[1.0], [0]]), "responses", "constitutions"),
                                  (torch.tensor([[1.0, 0]]), "constitutions", "responses")):
        assert sami_loss(LOGP + shift, blind).item() == pytest.approx(sami_loss(LOGP, blind).item())
        assert abs(sami_loss(LOGP + shift, sighted) - sami_loss(LOGP, sighted)) > 0.05


def test_the_gradient_pushes_the_diagonal_up_and_the_rest_down():
    logp = torch.zeros(3, 3, requires_grad=True)
    sami_loss(logp).backward()
    # at chance d loss / d logp = (1/n - [i = j]) / n: nothing but the diagonal matters at first
    assert torch.allclose(logp.grad, (torch.full((3, 3), 1 / 3) - torch.eye(3)) / 3)


def test_infonce_never_exceeds_log_n():
    for seed in range(20):
        logp = 30 * torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        assert infonce(logp) <= math.log(4)
    assert infonce(torch.eye(4) * 1000).item() == pytest.approx(math.log(4))


def test_an_unknown_contrast_is_an_error():
    with pytest.raises(KeyError):
        sami_loss(LOGP, "both")
