"""How well a linear reader recovers sources from latents: InfoE (Hsu et al., arXiv 2305.18378, section 4).

The reader is judged on the samples that it was fitted to, as published. For categories it is a multinomial logistic
regression without penalty and with balanced classes, fitted by L-BFGS; where classes are nearly separable its loss has
no minimum, and the number of steps (100 as published) decides the last digits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import minimize

from isthmus.metrics.mutual_information import codes


def explicitness(sources: Any, latents: Any, discrete: bool, steps: int | None = 100) -> float:
    """Mean over sources of ``(H_null - H) / H_null``, with H the log loss of the reader.

    H_null is the loss of a reader without inputs. Balanced classes make it predict evenly, so that it is the logarithm
    of the number of classes and not the source's entropy.

    Args:
        sources: ``(n, S)``, categories, each with several values.
        latents: ``(n, L)``; discrete ones are read one-hot, continuous ones standardised.
        discrete: which of the two.
        steps: most steps of L-BFGS; ``None`` goes on until the gradient is 1e-7.
    """
    s, x = codes(sources), _one_hot(latents) if discrete else _standardised(latents)
    found = []
    for source in s.T:
        null = np.log(source.max() + 1)
        found.append((null - log_loss(x, source, steps)) / null)
    return float(np.mean(found))


def log_loss(x: Any, label: np.ndarray, steps: int | None = 100) -> float:
    """Mean log loss, unweighted, of the balanced multinomial reader of ``x`` ``(n, F)`` on its own samples.

    Args:
        x: inputs, an array or a sparse one; an intercept is added.
        label: ``(n,)``, class numbers from 0, all of them met.
        steps: most steps of L-BFGS; ``None`` until converged.
    """
    n, width = x.shape
    sizes = np.bincount(label)
    classes, rows = len(sizes), np.arange(n)
    weight = (n / (classes * sizes))[label] / n  # sums to 1
    back = x.T.tocsr() if sparse.issparse(x) else x.T

    def shares(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What every class gets, and the logarithm of what the right one gets."""
        w = w.reshape(width + 1, classes)
        logits = x @ w[:-1] + w[-1]
        logits -= logits.max(1, keepdims=True)
        right = logits[rows, label]
        share = np.exp(logits, out=logits)
        total = share.sum(1, keepdims=True)
        share /= total
        return share, right - np.log(total[:, 0])

    def loss_and_slope(w: np.ndarray) -> tuple[float, np.ndarray]:
        slope, right = shares(w)
        slope[rows, label] -= 1
        slope *= weight[:, None]
        return -float(weight @ right), np.concatenate([(back @ slope).ravel(), slope.sum(0)])

    options = {"maxiter": steps or 20000, "maxfun": 10**6, "maxls": 50, "ftol": 64 * np.finfo(float).eps}
    # The published tolerance of 1e-4 is of the summed loss.
    options["gtol"] = 1e-4 / n if steps else 1e-8
    start = np.zeros((width + 1) * classes)
    fitted = minimize(loss_and_slope, start, method="L-BFGS-B", jac=True, options=options)
    return -float(shares(fitted.x)[1].mean())


def explained_variance(sources: Any, latents: Any) -> float:
    """R² of a linear least-squares reader of standardised latents, on its own samples, averaged over sources.

    Args:
        sources: ``(n, S)``, real numbers that vary.
        latents: ``(n, L)``.
    """
    y, x = np.asarray(sources, np.float64), _standardised(latents)
    y = y - y.mean(0)
    fitted = x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return float((1 - ((y - fitted) ** 2).sum(0) / (y**2).sum(0)).mean())


def _standardised(latents: Any) -> np.ndarray:
    x = np.asarray(latents, np.float64)
    deviation = x.std(0)
    return (x - x.mean(0)) / np.where(deviation > 0, deviation, 1)


def _one_hot(latents: Any) -> sparse.csr_array:
    """One entry a latent and sample; so wide a matrix is almost empty."""
    numbers = codes(latents)
    widths = numbers.max(0) + 1
    columns = numbers + np.concatenate([[0], np.cumsum(widths)[:-1]])
    n, latent_count = numbers.shape
    bounds = np.arange(n + 1) * latent_count
    return sparse.csr_array((np.ones(columns.size), columns.ravel(), bounds), shape=(n, int(widths.sum())))
