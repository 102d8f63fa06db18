"""The table from `beta_quantiles`, which mixup and cutmix use to draw weights, matches a beta distribution."""

import numpy as np
import pytest

from data_prep.batch_ops import beta_quantiles

ALPHAS = [0.01, 0.05, 0.1, 0.2, 0.45, 0.5, 1.0, 2.0, 5.0]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_beta_quantiles_match_samples_from_numpy(alpha: float) -> None:
    drawn = np.random.default_rng(0).beta(alpha, alpha, size=400_000)
    expected = np.quantile(drawn, np.linspace(0, 1, 1025)[1:-1])
    assert np.abs(beta_quantiles(alpha)[1:-1] - expected).mean() < 2e-3  # the sampling error is about 1e-3
    lowest = 1 / 1024, 1 / 32, 1 / 4  # these quantiles are tiny if alpha is small, so their logarithms are compared
    exponents = np.log(beta_quantiles(alpha)[[1, 32, 256]]) - np.log(np.quantile(drawn, lowest))
    assert np.abs(alpha * exponents).max() < 0.1


@pytest.mark.parametrize("alpha", ALPHAS)
def test_beta_quantiles_have_the_moments_of_the_distribution(alpha: float) -> None:
    table = beta_quantiles(alpha)
    middle = (table[1:] + table[:-1]) / 2
    assert np.all(np.diff(table) >= 0)
    assert (table[0], table[-1]) == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-6))
    assert middle.mean() == pytest.approx(0.5, abs=1e-3)
    assert middle.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.02)


def test_beta_quantiles_of_a_narrow_distribution_have_the_right_spread() -> None:
    assert beta_quantiles(5000.0)[1:-1].std() == pytest.approx(1 / (2 * 10001**0.5), rel=0.02)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("alpha", "spread"), [(5e-324, 0.5), (1e-17, 0.5), (1e-6, 0.5), (1e12, 0), (1e308, 0)])
def test_beta_quantiles_of_an_extreme_distribution_have_the_right_spread(alpha: float, spread: float) -> None:
    assert beta_quantiles(alpha)[1:-1].std() == pytest.approx(spread, abs=1e-3)
