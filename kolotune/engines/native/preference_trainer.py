"""The trainer of preference objectives: losses of whole answers, compared with those of the model before the training.

A step is one forward and one backward pass over the packed answers, as for chats: the loss is a function of each
answer's log-probability, and its derivative with respect to these weighs the gradients of the labels. KTO's estimate
of the divergence takes one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from kolotune.foundation.errors import TrainingError
from kolotune.foundation.objectives import OBJECTIVES, LearnsFrom

from ..job import TrainJob
from ..prepared_tokens import PreparedTokens, longest_first
from . import reference_logs
from .model import PackedModel
from .preference_answers import AnswerTable, mismatched
from .preference_losses import PREFERRED, REJECTED, Answers, PreferenceLoss, Totals, estimated_kl
from .process_group import ProcessGroup
from .starting_matrices import as_base
from .trainer import Trainer


class PreferenceTrainer(Trainer):
    """A training of a preference objective; call `prepare` before the first step.

    Raises:
        TrainingError: the hand-written passes can't compute the model, or the chats are no preferences.
    """

    def __init__(self, job: TrainJob, group: ProcessGroup | None = None) -> None:
        super().__init__(job, group)
        if not isinstance(self.model, PackedModel):
            reason = self.model.reason_slow or "the base is sharded"
            raise TrainingError(
                f"transformers would compute this model, and preferences are trained by the packed step only: {reason}",
                "Train on the preferred answers with --objective sft, or choose another base model.",
            )
        assert job.preference is not None
        self._packed, self._loss = self.model, PreferenceLoss(job.preference)
        objective = OBJECTIVES[job.preference.objective]
        self._has_reference, self._has_kl = objective.has_reference, objective.estimates_divergence
        is_paired = objective.learns_from is LearnsFrom.PAIRS
        self._data = {"train": _AnsweredChats.of(self.tokens, is_paired, self._has_kl)}
        if self.held_out is not None and len(self.held_out):
            self._data["held_out"] = _AnsweredChats.of(self.held_out, is_paired, self._has_kl)

    def prepare(self, report: Callable[[str], None]) -> None:
        """Read the reference's log-probabilities, or compute them of the model before the training, and keep them."""
        if not self._has_reference:
            return
        job, path = self.job, Path(self.job.reference)
        identity = {"base": job.base_sha256, "data": job.data_sha256, "dtype": job.dtype, "kernels": self.model.kernels}
        identity["start"] = job.start_sha256
        stored = reference_logs.read(path, identity)
        names = {name for part, data in self._data.items() for name in data.reference_names(part)}
        has_all = stored is not None and stored.keys() == names
        if not all(self.group.gather(has_all)):
            count = sum(len(data.table.tokens) for data in self._data.values())
            report(f"computing the log-probabilities of {count} chats before the training, once")
            with self._adapter_before():
                stored = {}
                for part, data in self._data.items():
                    stored |= self._all_logs(part, data)
            if self.group.writes:
                reference_logs.write(path, stored, identity)
        assert stored is not None
        for name, data in self._data.items():
            data.reference = stored[name]
            data.kl_reference = stored.get(f"{name}_mismatched")

    def _accumulate(self, indices: Sequence[int]) -> Tensor:
        data = self._data["train"]
        totals = self._totals(data, indices)
        figures = _StepFigures(self._loss, totals)
        for group, _ in self._groups(self.tokens, indices):

            def derivative(losses: Tensor, sequences: Tensor, group: Sequence[int] = group) -> Tensor:
                answers = data.answers(data.table.sum(losses, sequences, group), group)
                answers.logs.requires_grad_()
                with torch.enable_grad():
                    share = self._loss.share(answers, totals)
                    (gradient,) = torch.autograd.grad(share, answers.logs)
                figures.add(answers, float(share.detach()))
                return -gradient.flatten()[data.table.places(sequences, group)].float()

            self._packed.backward_from(self.tokens, group, derivative)
        self.figures = figures.means(self._summed(figures))
        return self._zero() + figures.sums["loss"]

    def _summed(self, figures: _StepFigures) -> dict[str, float]:
        """Return the sums over all processes."""
        values = torch.tensor(list(figures.sums.values()), dtype=torch.float64)
        return dict(zip(figures.sums, self._over_processes(values).tolist(), strict=True))

    def _over_processes(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor of the host over all processes."""
        return values if self.group.size == 1 else self.group.sum(values.to(self.parameter.device)).cpu()

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Return the objective's mean loss on the held-out chats, and note their `figures`; None without such chats."""
        data = self._data.get("held_out")
        if data is None:
            return None
        self._apply_backoff()
        tokens = data.table.tokens
        totals = self._totals(data, range(len(tokens)))
        figures = _StepFigures(self._loss, totals)
        for group, _ in self._groups(tokens, longest_first(tokens)):
            answers = data.answers(data.table.sum(*self._packed.label_losses(tokens, group), group), group)
            figures.add(answers, float(self._loss.share(answers, totals)))
        sums = self._summed(figures)
        self.figures = {f"held_out_{name}": value for name, value in figures.means(sums).items()}
        if totals.preferred_labels:
            self.figures["held_out_answer_loss"] = sums["preferred_nll"] / totals.preferred_labels
        self.accuracy = self.figures["held_out_accuracy"]
        return sums["loss"]

    def _totals(self, data: _AnsweredChats, indices: Sequence[int]) -> Totals:
        labels = data.table.labels[list(indices)]
        kl = 0.0
        if data.mismatched is not None and data.kl_reference is not None:
            logs = self._logs(data.mismatched, list(indices))[:, PREFERRED]
            kl = estimated_kl(logs, data.kl_reference[list(indices)])
        return Totals(len(labels), int((labels > 0).sum()), int(labels[:, PREFERRED].sum()), kl)

    def _all_logs(self, name: str, data: _AnsweredChats) -> dict[str, Tensor]:
        """Return the log-probabilities of all answers, and of the mismatched ones, by their names in the file."""
        logs = {name: self._logs(data.table, range(len(data.table.tokens)))}
        if data.mismatched is not None:
            logs[f"{name}_mismatched"] = self._logs(data.mismatched, range(len(data.table.tokens)))[:, PREFERRED]
        return logs

    def _logs(self, table: AnswerTable, indices: Sequence[int]) -> Tensor:
        """Return the log-probabilities of some chats' answers, fp64 ``[chats, 2]``; each process computes a share."""
        rows = {index: row for row, index in enumerate(indices)}
        logs = torch.zeros(len(indices), 2, dtype=torch.float64)
        for group, _ in self._groups(table.tokens, list(indices)):
            found = table.sum(*self._packed.label_losses(table.tokens, group), group)
            logs[[rows[index] for index in group]] = found
        return self._over_processes(logs)

    @contextmanager
    def _adapter_before(self) -> Iterator[None]:
        """Compute the model before the training within the block: the base, or with the adapter it starts from."""
        with torch.no_grad():
            weights = self.parameter.detach().clone()
            if self.job.start_from:
                self.start()
            else:
                as_base(self.parameter, self.adapters)
                self.model.reset()
            try:
                yield
            finally:
                self.parameter.copy_(weights)
                self.model.updated()


class _AnsweredChats:
    """Chats with their answers and what the reference says of them."""

    def __init__(self, table: AnswerTable, others: AnswerTable | None) -> None:
        self.table, self.mismatched = table, others
        self.reference: Tensor | None = None
        self.kl_reference: Tensor | None = None

    @classmethod
    def of(cls, tokens: PreparedTokens, pairs: bool, has_kl: bool) -> _AnsweredChats:
        table = AnswerTable.of(tokens, pairs=pairs)
        others = AnswerTable.of(mismatched(tokens, tokens.longest), pairs=False) if has_kl else None
        return cls(table, others)

    def reference_names(self, name: str) -> list[str]:
        """The names of its tensors in the reference's file."""
        return [name] if self.mismatched is None else [name, f"{name}_mismatched"]

    def answers(self, logs: Tensor, chats: Sequence[int]) -> Answers:
        reference = torch.zeros_like(logs) if self.reference is None else self.reference[list(chats)]
        return Answers(logs, reference, self.table.labels[list(chats)])


class _StepFigures:
    """Adds up what is reported of a step or an evaluation."""

    def __init__(self, loss: PreferenceLoss, totals: Totals) -> None:
        self._loss, self._totals = loss, totals
        names = ("loss", "right", "judged", "preferred", "rejected", "preferred_nll")
        self.sums = dict.fromkeys((*names, "preferred_count", "rejected_count"), 0.0)

    @torch.no_grad()
    def add(self, answers: Answers, share: float) -> None:
        """Add some chats, and their share of the loss."""
        rewards, exist = self._loss.rewards(answers), answers.exist
        right = self._loss.are_right(answers, self._totals)
        self.sums["loss"] += share
        self.sums["judged"] += len(right)
        for name, value in {
            "right": right.sum(),
            "preferred": rewards[:, PREFERRED][exist[:, PREFERRED]].sum(),
            "rejected": rewards[:, REJECTED][exist[:, REJECTED]].sum(),
            "preferred_count": exist[:, PREFERRED].sum(),
            "rejected_count": exist[:, REJECTED].sum(),
            "preferred_nll": -answers.logs[:, PREFERRED].sum(),
        }.items():
            self.sums[name] += float(value)

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """Return what the metrics have of it; a step without answers of one side has no reward of it, and no margin."""
        figures = {"accuracy": sums["right"] / max(1.0, sums["judged"])}
        if sums["preferred_count"]:
            figures["chosen_reward"] = sums["preferred"] / sums["preferred_count"]
        if sums["rejected_count"]:
            figures["rejected_reward"] = sums["rejected"] / sums["rejected_count"]
        if sums["preferred_count"] and sums["rejected_count"]:
            figures["margin"] = figures["chosen_reward"] - figures["rejected_reward"]
        return figures | ({"kl": self._totals.kl} if self._loss.settings.objective == "kto" else {})
