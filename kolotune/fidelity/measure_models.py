"""What is measured with transformers: the base, the adapter on it (the reference), and the merged model."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import KolotuneError, SpaceError
from kolotune.runners.child_process import emit

from .figures import MERGED, REFERENCE, TUNED, compared, keep, loss_of, prompts_equal, split
from .reference_model import model_in
from .selection import Selection, TrainedFormat, choose, misplaced, pieces
from .tasks import ComparedChat, Figures, GreedyAnswer, ModelsTask, Prompt, Reference


def measure(file: Path) -> None:
    """Carries out the `ModelsTask` in a file; leaves the reference and log-probabilities in its scratch folder.

    Raises:
        KolotuneError: base, adapter, tokenizer or prepared chats can't be used. What is wrong with the merged model
            stands in its figures.
    """
    asked = typed_storage.read(ModelsTask, file)
    scratch = Path(asked.scratch)
    trained = TrainedFormat.load(Path(asked.tokenizer))
    chosen = choose(asked, trained)
    end = trained.tokenizer.convert_tokens_to_ids(trained.end)
    prompts, expected = _to_answer(asked, trained, chosen)
    emit("doing", text="the base model, and the adapter on it")
    model = model_in(Path(asked.base))
    rows_of_chats = zip(model.log_probabilities(chosen.chats), chosen.chats, strict=True)
    base_losses = [loss_of(rows, chat) for rows, chat in rows_of_chats]
    base_answers = model.answers([each.ids for each in prompts], end, asked.longest_answer)
    model.add(Path(asked.adapter))
    tuned = keep(scratch / TUNED, chosen.chats, model.log_probabilities(chosen.chats))
    tuned_answers = model.answers([each.ids for each in prompts], end, asked.longest_answer)
    del model
    gc.collect()
    tuned_losses = [loss_of(rows, chat) for rows, chat in split(tuned, chosen.chats)]
    if prompts and base_answers[0] is None:
        chosen.notes.append(
            "the model does not fit into the free memory in fp32: it was read layer by layer, and answers were left out"
        )
    labels = [len(chat.positions) for chat in chosen.chats]
    reference = Reference(
        chats=chosen.chats,
        prompts=chosen.prompts,
        probes=chosen.probes,
        answers=[_greedy(trained, *each) for each in zip(prompts, expected, base_answers, tuned_answers, strict=True)],
        chat_losses=[[one, two] for one, two in zip(base_losses, tuned_losses, strict=True)],
        labels=labels,
        stops=_stops(tuned, chosen.chats, end),
        held_out=bool(asked.chats_file),
        whole=chosen.whole,
        prepared_equal=chosen.equal,
        prepared_chats=chosen.held,
        wrong_prepared=chosen.wrong,
        end_token=trained.end,
        pieces=pieces(trained.tokenizer),
        base_loss=sum(base_losses) / sum(labels),
        tuned_loss=sum(tuned_losses) / sum(labels),
        merged=None,
        notes=chosen.notes,
    )
    if asked.merged:
        emit("doing", text="the merged model")
        merged = _merged(Path(asked.merged), reference, tuned, scratch)
        reference = dataclasses.replace(reference, merged=merged)
    typed_storage.write(scratch / REFERENCE, reference)


def _to_answer(asked: ModelsTask, trained: TrainedFormat, chosen: Selection) -> tuple[list[Prompt], list[str | None]]:
    """The prompts that are answered, and what the chats have there: the user's own, or the first of the chats."""
    if asked.own_prompts:
        system = [{"role": "system", "content": asked.system}] if asked.system else []
        own = [trained.prompt([*system, {"role": "user", "content": each}], None) for each in asked.own_prompts]
        return own, [None] * len(own)
    firsts = [(prompt, text) for prompt, text in zip(chosen.prompts, chosen.expected, strict=True) if _first(prompt)]
    return [prompt for prompt, _ in firsts[: asked.most_answers]], [text for _, text in firsts[: asked.most_answers]]


def _first(prompt: Prompt) -> bool:
    return all(each["role"] != "assistant" for each in prompt.messages)


def _stops(tuned: np.ndarray, chats: Sequence[ComparedChat], end: int) -> list[list[int]]:
    """Where the tuned model finds the end token likeliest, of the places where it has to come."""
    return [
        [number, place]
        for number, (rows, chat) in enumerate(split(tuned, chats))
        for place in chat.ends
        if int(rows[place].argmax()) == end
    ]


def _greedy(
    trained: TrainedFormat, prompt: Prompt, expected: str | None, base: list[int] | None, tuned: list[int] | None
) -> GreedyAnswer:
    end = trained.tokenizer.convert_tokens_to_ids(trained.end)
    ended = tuned is not None and tuned[-1:] == [end]
    return GreedyAnswer(prompt.messages, prompt.ids, _said(trained, base), _said(trained, tuned), ended, expected)


def _said(trained: TrainedFormat, ids: list[int] | None) -> str | None:
    if ids is None:
        return None
    return str(trained.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _merged(folder: Path, reference: Reference, tuned: np.ndarray, scratch: Path) -> Figures:
    """The merged model's figures against the adapter on its base."""
    wrong: list[str] = []
    equal = 0
    try:
        own = TrainedFormat.load(folder)
        equal, found = prompts_equal(
            reference.prompts, lambda prompt: own.prompt(prompt.messages, prompt.tools or None).ids
        )
        wrong += found
        moved = misplaced(reference.pieces, [each or "" for each in pieces(own.tokenizer)])
        wrong += [moved] if moved else []
        if own.end != reference.end_token:
            wrong.append(f"its answers end with {own.end!r}, and with {reference.end_token!r} in training")
        model = model_in(folder)
        after = keep(scratch / MERGED, reference.chats, model.log_probabilities(reference.chats))
    except SpaceError:
        raise
    except KolotuneError as error:
        return Figures(prompts_equal=equal, prompts=len(reference.prompts), wrong=[*wrong, error.cause])
    return compared(reference, tuned, after, equal, wrong)
