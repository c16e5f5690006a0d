"""Losses of preference objectives, from the log-probabilities of whole answers.

An answer's log-probability is the sum over its labels; some objectives divide it by their number. The formulas and
their signs are those of TRL's trainers:

- DPO: Rafailov et al., Direct Preference Optimization (2023), the sigmoid loss.
- IPO: Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences (2023), with mean
  log-probabilities, as its authors advise.
- SimPO: Meng, Xia and Chen, SimPO: Simple Preference Optimization with a Reference-Free Reward (2024).
- ORPO: Hong, Lee and Thorne, ORPO: Monolithic Preference Optimization without Reference Model (2024). The answers' own
  loss covers the answers alone, as everywhere here and in the paper; TRL's covers the prompts, too.
- KTO: Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization (2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..job import PreferenceSettings

PREFERRED, REJECTED = 0, 1
"""Columns of ``[chats, 2]``: the preferred or desirable answer, and the rejected or undesirable one."""


@dataclass(frozen=True)
class Answers:
    """The answers of some chats.

    Attributes:
        logs: fp64 ``[chats, 2]``: summed log-probabilities of each chat's answers, in nats; 0 where there is none.
        reference: the same of the model before the training; 0 for objectives without a reference.
        labels: int64 ``[chats, 2]``: how many tokens that covers; 0 where there is no such answer.
    """

    logs: Tensor
    reference: Tensor
    labels: Tensor

    @property
    def exist(self) -> Tensor:
        """bool ``[chats, 2]``: whether there is such an answer."""
        return self.labels > 0

    def means(self, logs: Tensor) -> Tensor:
        """Return log-probabilities per label."""
        return logs / self.labels.clamp(min=1)


@dataclass(frozen=True)
class Totals:
    """What the mean over a step, or over an evaluation, is taken over.

    Attributes:
        chats: all of its chats.
        answers: all of their answers.
        preferred_labels: the labels of the preferred answers.
        kl: for KTO, how far the model is from its reference (`estimated_kl`).
    """

    chats: int
    answers: int
    preferred_labels: int
    kl: float = 0.0


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss of an objective.

    Attributes:
        settings: its name and its numbers.
    """

    settings: PreferenceSettings

    def share(self, answers: Answers, totals: Totals) -> Tensor:
        """Return what some chats add to the mean loss, fp64 ``[]``; its gradient reaches ``answers.logs``."""
        beta = self.settings.beta
        if self.settings.objective == "kto":
            return self._kto(answers, totals.kl) / totals.answers
        if self.settings.objective == "orpo":
            own = -answers.logs[:, PREFERRED].sum() / max(1, totals.preferred_labels)
            means = answers.means(answers.logs)
            odds = means - torch.log1p(-means.exp())
            return own - beta * logsigmoid(odds[:, PREFERRED] - odds[:, REJECTED]).sum() / totals.chats
        margins = self.margins(answers)
        if self.settings.objective == "ipo":
            return (margins - 1 / (2 * beta)).square().sum() / totals.chats
        if self.settings.objective == "simpo":
            margins = margins - self.settings.simpo_gamma / beta
        return -logsigmoid(beta * margins).sum() / totals.chats

    def margins(self, answers: Answers) -> Tensor:
        """Return by how much each chat's preferred answer is ahead of the rejected one, ``[chats]``, in nats."""
        gains = self._gains(answers)
        return gains[:, PREFERRED] - gains[:, REJECTED]

    def rewards(self, answers: Answers) -> Tensor:
        """Return the implicit rewards of the answers, ``[chats, 2]``."""
        return self.settings.beta * self._gains(answers)

    def are_right(self, answers: Answers, totals: Totals) -> Tensor:
        """Return what accuracy counts, bool: for each pair, or for KTO each answer, whether it is on the right side."""
        if self.settings.objective != "kto":
            return self.margins(answers) > 0
        gains = self._gains(answers)
        right = torch.stack([gains[:, PREFERRED] > totals.kl, gains[:, REJECTED] < totals.kl], 1)
        return right[answers.exist]

    def _gains(self, answers: Answers) -> Tensor:
        """Return log-probabilities as the objective compares them, ``[chats, 2]``."""
        gains = answers.logs - answers.reference
        return gains if self.settings.objective in ("dpo", "kto") else answers.means(gains)

    def _kto(self, answers: Answers, kl: float) -> Tensor:
        """Return the summed losses of all answers."""
        beta, gains = self.settings.beta, self._gains(answers)
        desirable = self.settings.desirable_weight * (1 - torch.sigmoid(beta * (gains[:, PREFERRED] - kl)))
        undesirable = self.settings.undesirable_weight * (1 - torch.sigmoid(beta * (kl - gains[:, REJECTED])))
        exist = answers.exist
        return desirable[exist[:, PREFERRED]].sum() + undesirable[exist[:, REJECTED]].sum()


def estimated_kl(logs: Tensor, reference: Tensor) -> float:
    """Return KTO's estimate of the divergence from the reference: the mean gain of mismatched answers, at least 0.

    Args:
        logs: summed log-probabilities of answers behind prompts that they don't belong to.
        reference: the same of the model before the training.
    """
    return max(0.0, float((logs - reference).mean())) if len(logs) else 0.0
