"""examples/theory.py: what is measured is what is predicted."""

import numpy as np
import pytest

from examples.theory import main, restricted, ridge_measured, ridge_risk, risks


@pytest.mark.parametrize(("rows", "ridge"), [(60, 1e-1), (150, 1e-2)])
def test_ridge_regression_has_the_risk_of_its_closed_form(rows: int, ridge: float) -> None:
    eigenvalues = np.arange(1, 61) ** -1.2
    weights = np.ones(60) / np.sqrt(eigenvalues.sum())
    given = eigenvalues, weights, rows, ridge, 0.3
    measured = np.array([ridge_measured(*given, seed) for seed in range(40)])
    error = measured.std(ddof=1) / np.sqrt(len(measured))
    assert error < 0.05 * measured.mean()
    assert ridge_risk(*given) == pytest.approx(measured.mean(), abs=3 * error)


def test_least_squares_keep_to_the_norm() -> None:
    x = np.random.default_rng(0).standard_normal((50, 3)) * [1, 2, 3]
    y = x @ [0.3, 0.4, 0.0]
    assert restricted(x, y, 1) == pytest.approx([0.3, 0.4, 0.0])
    found = restricted(x, y, 0.2)
    assert np.linalg.norm(found) == pytest.approx(0.2)
    near = found + 0.01 * np.random.default_rng(1).standard_normal((200, 3))
    near *= 0.2 / np.linalg.norm(near, axis=1, keepdims=True)
    assert ((x @ near.T - y[:, None]) ** 2).sum(0).min() >= ((x @ found - y) ** 2).sum()


def test_residual_memory_has_the_risk_that_the_norm_predicts() -> None:
    base, knn, resmem = np.mean([risks(3, 0.5, 2000, seed, test_rows=500) for seed in range(4)], axis=0)
    assert base == pytest.approx(0.25, rel=0.1)
    assert resmem / knn == pytest.approx(0.25, rel=0.1)


def test_it_prints_both_tables_and_writes_the_picture(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("examples.theory.ROWS", (20, 40))
    monkeypatch.setenv("COLUMNS", "120")
    main(["--seeds", "2", "--plot", str(tmp_path / "theory.png")])
    printed = capsys.readouterr().out
    assert "Test risk" in printed
    assert "ridge regression" in printed
    assert (tmp_path / "theory.png").read_bytes().startswith(b"\x89PNG")
