"""Scaling laws: the loss that a model of N parameters reaches on D tokens, and the cheapest N and D.

L(N, D) = E + A / N^α + B / D^β, in nats per token: J. Hoffmann et al., "Training Compute-Optimal Large
Language Models", arXiv:2203.15556 (approach 3). The laws were fitted to dense models of up to some 16 G
parameters on their authors' text; they say little of other data, and nothing of what a loss is good for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ridgeline.types import ConfigError

TRAINING_FLOPS = 6
"""Per parameter and token: two in the forward pass, four in the backward."""

SERVING_FLOPS = 2
"""Per parameter and token."""

_BISECTIONS = 200


@dataclass(frozen=True, slots=True)
class Law:
    """The constants of one fit, in the letters of the papers."""

    name: str
    E: float
    A: float
    B: float
    alpha: float
    beta: float
    source: str

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats per token after training."""
        return self.E + self.A / math.pow(parameters, self.alpha) + self.B / math.pow(tokens, self.beta)

    # At the optimum a per cent more compute gains as much spent on either side: αA/N^α = βB/D^β.

    def tokens_for(self, parameters: float) -> float:
        """The tokens on which a model of that size is the cheapest of its loss (Chinchilla-optimal)."""
        return math.pow(self.beta * self.B * parameters**self.alpha / (self.alpha * self.A), 1 / self.beta)

    def parameters_for(self, tokens: float) -> float:
        """The size that makes the most of that many tokens."""
        return math.pow(self.alpha * self.A * tokens**self.beta / (self.beta * self.B), 1 / self.alpha)

    def optimum(self, flops: float) -> tuple[float, float]:
        """(parameters, tokens) of the least loss that 6ND = `flops` can buy."""
        products = flops / TRAINING_FLOPS
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = ratio * products ** (self.beta / (self.alpha + self.beta))
        return parameters, products / parameters

    def cheapest(self, loss: float) -> tuple[float, float]:
        """(parameters, tokens) that reach a loss with the least training compute.

        Raises ConfigError for a loss that the law says nothing reaches.
        """
        if not loss > self.E:
            raise ConfigError(f"loss is {loss}; accepted for the law {self.name}: more than {self.E}")
        parameters = (self.A * (1 + self.alpha / self.beta) / (loss - self.E)) ** (1 / self.alpha)
        return parameters, self.tokens_for(parameters)

    def tokens_to_reach(self, loss: float, parameters: float) -> float:
        """Tokens on which a model of that size reaches a loss; infinite where it never does."""
        left = loss - self.E - self.A / math.pow(parameters, self.alpha)
        return math.inf if left <= 0 else math.pow(self.B / left, 1 / self.beta)

    def served_optimum(self, loss: float, served_tokens: float) -> tuple[float, float]:
        """(parameters, tokens) that reach a loss with the least compute in training and in all of serving.

        Minimises 6ND + 2NT over N, for T served tokens: N. Sardana, J. Portes, S. Doubov, J. Frankle, "Beyond
        Chinchilla-Optimal", arXiv:2401.00448. Raises ConfigError as `cheapest` does.
        """
        largest, _ = self.cheapest(loss)
        low = math.log(self.A / (loss - self.E)) / self.alpha  # no smaller model reaches the loss at all
        high = math.log(largest)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if self._shrinking_saves(math.exp(middle), loss, served_tokens):
                high = middle
            else:
                low = middle
        parameters = math.exp(high)
        return parameters, self.tokens_to_reach(loss, parameters)

    def _shrinking_saves(self, parameters: float, loss: float, served_tokens: float) -> bool:
        """Whether a slightly smaller model of this loss takes less compute over its life.

        The sign of d(6ND + 2NT)/dN, where along the curve of one loss dD/dN = −(D/N)·(αA/N^α)/(βB/D^β).
        """
        tokens = self.tokens_to_reach(loss, parameters)
        if math.isinf(tokens):
            return False
        gain = self.alpha * self.A / math.pow(parameters, self.alpha)
        price = gain / (self.beta * self.B / math.pow(tokens, self.beta))
        return TRAINING_FLOPS * tokens * (1 - price) + SERVING_FLOPS * served_tokens > 0


LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Law("hoffmann", 1.69, 406.4, 410.7, 0.34, 0.28, "Hoffmann et al. 2022, arXiv:2203.15556, approach 3"),
        Law("besiroglu", 1.8172, 482.01, 2085.43, 0.3478, 0.3658, "Besiroglu et al. 2024, arXiv:2404.10102"),
        Law("sardana", 1.69, 406.4, 410.7, 0.336, 0.283, "Sardana et al. 2023, arXiv:2401.00448"),
    )
}
"""The first as printed, with exponents rounded to two digits; the second fits the first's data anew; the
third is the first less rounded, as the authors of the inference-aware optimum used it."""

DEFAULT_LAWS = ("hoffmann", "besiroglu")


def parse_law(text: str) -> Law:
    """A law by its name, or from its five constants E,A,B,alpha,beta. Raises ConfigError."""
    if text in LAWS:
        return LAWS[text]
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 5 or not all(0 < number < 1e12 for number in numbers) or max(numbers[3:]) >= 10:
        raise ConfigError(
            f"law is {text!r}; accepted: {', '.join(LAWS)}, or five positive numbers E,A,B,alpha,beta"
        )
    E, A, B, alpha, beta = numbers
    return Law(text, E, A, B, alpha, beta, "given")
