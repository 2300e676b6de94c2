"""The arithmetic of advreg once more, in NumPy and float64, by other means."""

import numpy as np
from scipy import optimize

NORMS = ("l1", "l2", "infinity")
ORDERS = {"l1": 1, "l2": 2, "infinity": np.inf}


def norms(rows, norm):
    return np.linalg.norm(rows, ORDERS[norm], axis=1)


def steepest(gradient, norm):
    out = np.zeros_like(gradient)
    for row, g in zip(out, gradient, strict=True):
        if norm == "infinity":
            row[:] = np.sign(g)
        elif norm == "l2" and g.any():
            row[:] = g / np.sqrt((g**2).sum())
        elif norm == "l1" and g.any():
            largest = np.flatnonzero(np.abs(g) == np.abs(g).max())
            row[largest] = np.sign(g[largest]) / len(largest)
    return out


def project(rows, radius, norm):
    out = rows.copy()
    for row in out:
        if np.linalg.norm(row, ORDERS[norm]) <= radius:
            continue
        if norm == "infinity":
            row[:] = np.clip(row, -radius, radius)
        elif norm == "l2":
            row *= radius / np.sqrt((row**2).sum())
        else:
            size = np.abs(row)
            threshold = optimize.brentq(
                lambda t, size=size: np.maximum(size - t, 0).sum() - radius,
                0,
                size.max(),
                xtol=1e-14,
            )
            row[:] = np.sign(row) * np.maximum(size - threshold, 0)
    return out


def attack(x, gradient_at, norm, step, iterations=1, radius=None, low=None, high=None):
    """Projected steepest ascent from `x`."""
    x_adv = x
    for _ in range(iterations):
        d = x_adv - x + step * steepest(gradient_at(x_adv), norm)
        if radius is not None:
            d = project(d, radius, norm)
        x_adv = x + d
        if low is not None or high is not None:
            x_adv = np.clip(x_adv, low, high)
    return x_adv


class LinearRegression:
    """`x @ w + b` under the mean squared error, differentiated by hand."""

    def __init__(self, w, b):
        self.w, self.b = np.asarray(w, float), float(b)

    def loss(self, x, y, weights):
        return np.mean(weights * (x @ self.w + self.b - y) ** 2)

    def input_gradient(self, x, y, weights):
        residual = weights * 2 * (x @ self.w + self.b - y) / len(x)
        return residual[:, None] * self.w

    def weight_gradient(self, x, y, weights):
        residual = weights * 2 * (x @ self.w + self.b - y) / len(x)
        return residual @ x, residual.sum()
