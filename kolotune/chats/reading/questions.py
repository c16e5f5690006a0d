"""Records that are a question and its answer: how their keys become turns."""

from __future__ import annotations

from .content_parts import plain_text
from .faults import FaultKind, RecordError, fail
from .json_values import is_filled, kind_of, list_or_value
from .messages import plain_turns
from .multiple_choice import chosen, listed, read_choices
from .record_fields import RecordFields
from .record_keys import RecordPart
from .thoughts import different
from .transcripts import turns_of_prompt, without_end
from .turns_as_text import first_role, turns_as_text


def question_and_answer(fields: RecordFields, question_key: str, answer_key: str) -> list[object]:
    """Return the turns of a pair. Each side is a text, or a list of turns as in TRL; all answers are trained on.

    The question is followed by its context, its choices and its documents, with blank lines between.

    Raises:
        RecordError: A value is not what its key should have.
    """
    question, answer = fields.read(question_key), fields.read(answer_key)
    has_reasoning = not isinstance(question, list)  # beside turns, Nemotron has a switch of that name
    if (records := _columns(question, answer)) > 1:
        cause = f"{question_key} and {answer_key} have {records:,} texts each, as columns of a table"
        fail(FaultKind.BAD_CONTENT, f"{cause}; write one record for each (pandas: to_json(orient='records'))")
    question, answer = _parsed_sides(question, answer)
    history = [turn for _, value in fields.read_all(RecordPart.HISTORY) for turn in _history(value)]
    more = [_text(key, value) for key, value in fields.read_all(RecordPart.CONTEXT)]
    choices = [choice for key, value in fields.read_all(RecordPart.CHOICES) for choice in read_choices(key, value)]
    if choices:
        more.append(listed(choices, question))
        answer = chosen(answer_key, answer, choices)
    more += [_documents(key, value) for key, value in fields.read_all(RecordPart.DOCUMENTS)]
    answers = answer_turns(answer_key, answer)
    if isinstance(question, list):
        more = [text for text in more if text.strip()]
        asked = [*question, *(plain_turns([("user", "\n\n".join(more))]) if more else [])]
    elif question is not None and not isinstance(question, str):
        fail(FaultKind.BAD_CONTENT, f"{question_key} is {kind_of(question)}; it must be a text")
    else:
        asked = plain_turns([("user", "\n\n".join(text for text in [question or "", *more] if text.strip()))])
    turns = [*history, *asked, *answers]
    reasoning = [thought for _, thought in fields.read_all(RecordPart.REASONING)] if has_reasoning else []
    if reasoning and isinstance(turns[-1], dict):
        turns[-1] = {**turns[-1], "reasoning": _joined_thoughts([*reasoning, turns[-1].get("reasoning")])}
    return turns


def _parsed_sides(question: object, answer: object) -> tuple[object, object]:
    """Return a question and an answer; as turns where they are written as such, or the question as a whole prompt."""
    turns = turns_as_text(question)
    if turns and first_role(turns) in ("system", "user"):
        question = turns
    turns = turns_as_text(answer)
    if turns and first_role(turns) == "assistant":
        return question, turns
    if isinstance(question, str) and isinstance(answer, str) and (prompt := turns_of_prompt(question)):
        return prompt, without_end(answer)
    return question, answer


def _columns(question: object, answer: object) -> int:
    """Return the number of records where questions and answers are columns: lists, or texts by the number of a row."""
    if isinstance(question, dict) and isinstance(answer, dict) and question.keys() == answer.keys():
        question, answer = list(question.values()), list(answer.values())
    if not isinstance(question, list) or not isinstance(answer, list) or len(question) != len(answer):
        return 0
    return len(question) if all([isinstance(text, str) for text in (*question, *answer)]) else 0


def _joined_thoughts(values: list[object]) -> object:
    """Return different thoughts as one text; or the first value that is no text, which is reported where it is read."""
    texts = [value for value in values if isinstance(value, str) and value]
    return next(
        (value for value in values if is_filled(value) and not isinstance(value, str)),
        "\n\n".join(different(texts)),
    )


def answer_turns(key: str, answer: object) -> list[object]:
    """Return the turns of an answer: a text, turns, tool calls (xLAM), or texts of which there is one (SQuAD).

    Whole numbers are texts, as they are in a table.

    Raises:
        RecordError: There are several answers.
    """
    if isinstance(answer, str) and key == "answers" and answer.lstrip().startswith(("[", "{")):
        answer = _parsed(answer)
    if isinstance(answer, dict) and isinstance(answer.get("text"), list):
        answer = answer["text"]
    if not isinstance(answer, list):
        return list(plain_turns([("assistant", _number_as_text(answer))]))
    answer = [_number_as_text(item) for item in answer]
    if answer and all([isinstance(item, dict) and "name" in item and "role" not in item for item in answer]):
        return [{"role": "assistant", "content": "", "tool_calls": answer}]
    if answer and all([isinstance(item, str) for item in answer]):
        if len(set(answer)) > 1:
            fail(FaultKind.BAD_CONTENT, f"{key} has {len(answer)} different texts; keep the one to train on")
        return list(plain_turns([("assistant", answer[0])]))
    if answer and first_role(answer) is None and all([isinstance(item, dict) and "text" in item for item in answer]):
        fail(FaultKind.BAD_CONTENT, f"{key} is a list of objects; keep the text of one of them")
    return answer


def _number_as_text(value: object) -> object:
    return str(value) if type(value) is int else value


def _text(key: str, value: object) -> str:
    if isinstance(value, list) and all([isinstance(item, str) for item in value]):
        return "\n\n".join(value)
    return plain_text(value, key)


def _history(value: object) -> list[object]:
    try:
        history = list_or_value(value)
    except RecordError as error:
        raise error.within(FaultKind.BAD_HISTORY, "history") from None
    if isinstance(history, list) and all([isinstance(turn, dict) for turn in history]):
        return list(history)
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        fail(FaultKind.BAD_HISTORY, "history must be a list of [question, answer] pairs")
    return list(plain_turns([turn for pair in history for turn in zip(("user", "assistant"), pair, strict=True)]))


def _documents(key: str, value: object) -> str:
    documents = value if isinstance(value, list) else [value]
    return "\n\n".join(_document(key, document) for document in documents)


def _document(key: str, document: object) -> str:
    if not isinstance(document, dict):
        return _text(key, document)
    title = document.get("title")
    text = next((document[name] for name in ("text", "content", "contents", "snippet") if document.get(name)), None)
    if not isinstance(text, str):
        fail(FaultKind.BAD_CONTENT, f"{key} has a document without a text; it needs the key text or content")
    return f"{title}\n{text}" if isinstance(title, str) and title else text


def _parsed(value: object) -> object:
    try:
        return list_or_value(value)
    except RecordError:
        return value
