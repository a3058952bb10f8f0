"""Muon in float32, for CPUs without bfloat16 arithmetic; torch's own calculates in bfloat16."""

from collections.abc import Iterable

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Keller Jordan, "Muon" (2024)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum made orthogonal by Newton and Schulz's iteration, for matrices [M, N].

    A step has the root mean square of AdamW's, 0.2 (Liu et al. 2025, arXiv:2502.16982).
    """

    def __init__(
        self,
        matrices: Iterable[torch.Tensor],
        lr: float,
        weight_decay: float = 0.05,
        momentum: float = 0.95,
        iterations: int = 4,
    ):
        settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(matrices, settings | {"iterations": iterations})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                average = state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
                update = matrix.grad.lerp(average, group["momentum"])
                update = orthogonal(update, group["iterations"])
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)


def orthogonal(matrix: torch.Tensor, iterations: int) -> torch.Tensor:
    """[M, N] with the same singular vectors and singular values near 1."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(iterations):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
