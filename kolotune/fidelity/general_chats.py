"""Chats that the base model itself answers, mixed into the training so that it keeps what it could (`--keep-general`).

A sample of what the base says has no gradient on average as long as the model says the same, so such chats hold it
where the run's own chats do not pull. The prompts ship with kolotune; the general set asks none of them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.resources
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.cache import cache_folder
from kolotune.foundation.errors import ModelError
from kolotune.foundation.files import write_text
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.runners import child_process, local
from kolotune.runners.child_process import emit
from kolotune.version import VERSION

_TOGETHER = 16  # prompts; a cut answer costs the most, and all wait for the longest
_LONGEST_ANSWER = 160  # tokens; answers that do not end within them are not used
_MOST_ASKED = 6  # prompts for each chat that is wanted
_PACKAGES = ("torch", "transformers")


@dataclass(frozen=True)
class GeneralChatsTask:
    """Have a base model answer general prompts.

    Attributes:
        base, tokenizer: folders of the model, and of the trained tokenizer and template.
        base_sha256, tokenizer_sha256: hashes of their content.
        count: the number of chats.
        file: receives them, a line each.
    """

    base: str
    base_sha256: str
    tokenizer: str
    tokenizer_sha256: str
    count: int
    file: str


@dataclass(frozen=True)
class _AnsweredBatches:
    """What a base has answered so far, kept in the cache: for each batch the answers, "" for those that did not end."""

    batches: list[list[str]]


def general_prompts() -> list[str]:
    """Return the prompts."""
    folder = importlib.resources.files(__package__).joinpath("general")
    return folder.joinpath("prompts.txt").read_text(encoding="utf-8").splitlines()


def prompts_sha256() -> str:
    """Return what the chats depend on beside base and template, as a hash."""
    return hashlib.sha256(json.dumps([general_prompts(), _TOGETHER, _LONGEST_ANSWER]).encode()).hexdigest()


def make_general_chats(task: GeneralChatsTask, log: Path, reporter: Reporter) -> None:
    """Carry out a task in a child process, which loads PyTorch.

    Raises:
        ModelError: the base hardly ever ends an answer.
        KolotuneError: what the child reports.
    """

    def on_event(name: str, fields: JsonObject) -> None:
        if name == "doing":
            reporter.doing(str(fields["text"]))

    file = Path(task.file).with_suffix(".task.json")
    typed_storage.write(file, task)
    code = child_process.run(
        "kolotune.fidelity", "general", str(file), log=log, otherwise=ModelError, on_event=on_event
    )
    file.unlink()
    if code != 0:
        raise ModelError(f"the base's answers ended with code {code}: {local.last_lines(log)}", f"The log is {log}.")


def write_general_chats(file: Path) -> None:
    """Carry out the `GeneralChatsTask` in a file, in this process.

    Raises:
        ModelError: the base hardly ever ends an answer.
    """
    task = typed_storage.read(GeneralChatsTask, file)
    chats = []
    for prompt, answer in _answered(task):
        if answer:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            chats.append(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
        if len(chats) == task.count:
            break
    else:
        raise ModelError(
            f"of {task.count * _MOST_ASKED} answers to general prompts, the base ended {len(chats)} within "
            f"{_LONGEST_ANSWER} tokens: too few for --keep-general",
            "Omit --keep-general, or choose a base model that was tuned for chats.",
        )
    write_text(Path(task.file), "".join(chats))


def _answered(task: GeneralChatsTask) -> Iterator[tuple[str, str]]:
    """Yield prompts with the base's answers, those in the cache first; the first ones are always the same."""
    cache = _cache_file(task)
    known = typed_storage.read_or_none(_AnsweredBatches, cache) or _AnsweredBatches([])
    base = None
    for number, prompts in enumerate(_batches(task.count * _MOST_ASKED)):
        if number < len(known.batches):
            answers = known.batches[number]
        else:
            emit("doing", text=f"the base model answers general prompts ({number * _TOGETHER} answered)")
            base = base or _SamplingBase(task)
            answers = base.answers(prompts, seed=number)
            known.batches.append(answers)
            cache.parent.mkdir(parents=True, exist_ok=True)
            typed_storage.write(cache, known)
        yield from zip(prompts, answers, strict=True)


def _cache_file(task: GeneralChatsTask) -> Path:
    versions = [VERSION, *(importlib.metadata.version(name) for name in _PACKAGES)]
    subject = json.dumps([versions, task.base_sha256, task.tokenizer_sha256, prompts_sha256()])
    return cache_folder("general_chats") / f"{hashlib.sha256(subject.encode()).hexdigest()[:32]}.json"


def _batches(most: int) -> Iterator[list[str]]:
    """Yield prompts, all of them in one random order after the other."""
    asked: list[str] = []
    for turn in range(-(-most // len(general_prompts()))):
        prompts = general_prompts()
        random.Random(turn).shuffle(prompts)
        asked += prompts
    for start in range(0, most, _TOGETHER):
        yield asked[start : min(start + _TOGETHER, most)]


class _SamplingBase:
    """A base model that answers as it would: each token is sampled from its distribution."""

    def __init__(self, task: GeneralChatsTask) -> None:
        import torch

        from .reference_model import WholeModel
        from .trained_format import TrainedFormat

        self._trained = TrainedFormat.load(Path(task.tokenizer))
        self._model = WholeModel(Path(task.base))
        if torch.cuda.is_available():
            self._model.model.to("cuda", torch.bfloat16)

    def answers(self, prompts: Sequence[str], seed: int) -> list[str]:
        """Return the answer to each prompt; "" for one that does not end."""
        end = self._trained.end_id
        ids = [self._trained.prompt([{"role": "user", "content": text}], None).ids for text in prompts]
        answers = self._model.sampled_answers(ids, end, _LONGEST_ANSWER, seed)
        return [self._trained.decode(answer) or "" if answer[-1:] == [end] else "" for answer in answers]
