"""Which chats are compared, and the prompts in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kolotune.chats import Chat
from kolotune.chats.reading.files import read_chats
from kolotune.chats.templates.loss_mask import end_token
from kolotune.chats.templates.template import ChatTemplate
from kolotune.chats.tokens.encoder import EncodedChat, Encoder
from kolotune.chats.tokens.tokenizer import chat_template, load_tokenizer, special_tokens, template_text
from kolotune.engines.prepared_tokens import IGNORED, PreparedTokens
from kolotune.foundation.errors import ArtifactError, KolotuneError
from kolotune.ollama.template import NotDerivable, TurnFormat, derive

from .tasks import ComparedChat, ModelsTask, Prompt

_SEARCHED = 4  # times as many training chats are read as are compared: some of them are held out or left out


@dataclass
class TrainedFormat:
    """The tokenizer and template that were trained with."""

    tokenizer: Any
    template: ChatTemplate
    encoder: Encoder
    end: str
    turns: TurnFormat | None

    @classmethod
    def load(cls, folder: Path) -> TrainedFormat:
        """From a folder.

        Raises:
            ModelError, TemplateError: there are none.
        """
        tokenizer = load_tokenizer(folder)
        template = chat_template(tokenizer, template_text(folder))
        special = frozenset(str(each) for each in tokenizer.added_tokens_decoder.values() if each.special)
        found = derive(
            lambda messages, opened: template.render(messages, None, opened),
            special_tokens(tokenizer).get("bos_token", ""),
        )
        turns = None if isinstance(found, NotDerivable) else found
        return cls(tokenizer, template, Encoder(template, tokenizer), end_token(template, special), turns)

    def prompt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> Prompt:
        """The prompt that a model is asked with after these turns.

        Encoded as a server does, from its text as a whole, which is not how chats are prepared.

        Raises:
            TemplateError: the template refuses them.
        """
        text = self.template.render(messages, tools, True)
        plain = not tools and all(set(each) <= {"role", "content"} and each["role"] != "tool" for each in messages)
        if plain and self.turns is not None:
            plain = self.turns.render(messages, True) == text  # where it is not, `modelfile` has said so
        return Prompt(messages, tools or [], text, self.encoded(text), plain)

    def encoded(self, text: str) -> list[int]:
        """The ids of a rendered text."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass
class Selection:
    """The compared chats; see `task.Reference` for the names."""

    chats: list[ComparedChat] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    probes: list[Prompt] = field(default_factory=list)
    equal: int = 0
    held: int = 0
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    whole: bool = False


def choose(task: ModelsTask, trained: TrainedFormat) -> Selection:
    """The first chats that keep to the limits, at least one, with what can be said of how they were prepared.

    Raises:
        TrainingError, ArtifactError: the prepared chats can't be read, or there are none.
    """
    tokens = PreparedTokens.load(Path(task.tokens))
    found = Selection()
    end = trained.tokenizer.convert_tokens_to_ids(trained.end)
    total = 0
    for index in range(min(len(tokens), task.most_chats)):
        ids, labels = tokens.chat(index)
        total += len(ids)
        if found.chats and total > task.most_tokens:
            break
        found.chats.append(_asked(ids.tolist(), [int(each) != IGNORED for each in labels], end))
        found.indices.append(index)
    if not found.chats:
        raise ArtifactError(f"{task.tokens}: there is no chat to compare with", "Run `kolotune prepare` again.")
    found.whole = len(found.chats) == len(tokens)
    without_end = sum(not each.ends for each in found.chats)
    if without_end:
        found.wrong.append(f"{without_end} of {len(found.chats)} chats are not trained to end with {trained.end!r}")
    _with_texts(task, trained, found)
    found.probes = _probes(task, trained, found)
    return found


def _probes(task: ModelsTask, trained: TrainedFormat, found: Selection) -> list[Prompt]:
    """A prompt with a system turn, which what is served must not lose; none where the template has no place for it."""
    if trained.turns is None or trained.turns.refuses_system or not found.prompts:
        return []
    turns = [each for each in found.prompts[0].messages if each["role"] != "system"]
    system = {"role": "system", "content": task.system or "Be brief."}
    try:
        return [trained.prompt([system, *turns], None)]
    except KolotuneError:
        return []


def _asked(ids: list[int], labelled: list[bool], end: int) -> ComparedChat:
    positions = [at - 1 for at in range(1, len(ids)) if labelled[at]]
    last = [number for number, at in enumerate(positions) if at + 2 >= len(ids) or not labelled[at + 2]]
    return ComparedChat(ids, positions, [number for number in last if ids[positions[number] + 1] == end])


def _with_texts(task: ModelsTask, trained: TrainedFormat, found: Selection) -> None:
    """Encodes the chats again, and renders the prompts in them."""
    saved = Path(task.chats_file) if task.chats_file else None
    texts: Sequence[Chat | None] = read_chats([saved]).chats if saved else _training_chats(task, trained, found)
    if not texts:
        found.notes.append("the chats' texts are no longer there, so the prompts were not compared")
    left_out = 0
    for asked, chat in zip(found.chats, texts, strict=False):
        if chat is None:
            continue
        found.held += 1
        try:
            encoded = trained.encoder.encode(chat)
        except KolotuneError as error:
            found.wrong.append(f"the trained template can't write a chat that was trained on: {error.cause}")
            continue
        if not _same(asked, encoded):
            continue
        found.equal += 1
        if encoded.special_in_content or encoded.boundary_merge:
            left_out += 1
            continue
        try:
            _add_prompts(chat, asked, trained, found)
        except KolotuneError as error:
            found.wrong.append(f"the trained template can't write the prompt of a chat: {error.cause}")
    if found.equal < found.held:
        found.wrong.append(
            f"{found.held - found.equal} of {found.held} chats now get other tokens or labels than those trained on"
        )
    if left_out:
        found.notes.append(
            f"{left_out} chats can't be served with the tokens that they were trained with (`prepare` said so); "
            "their prompts were not compared"
        )


def _add_prompts(chat: Chat, asked: ComparedChat, trained: TrainedFormat, found: Selection) -> None:
    """The prompt before each answer; the first must be what stands before the first label."""
    messages = chat.message_dicts()
    for at, message in enumerate(messages):
        if message["role"] != "assistant" or at == 0:
            continue
        prompt = trained.prompt(messages[:at], list(chat.tools) or None)
        first = asked.positions[0] + 1
        is_first = all(each["role"] != "assistant" for each in messages[:at])
        if is_first and prompt.ids != asked.ids[:first]:
            found.wrong.append("a prompt gets other tokens than those that stand before the trained answer")
        found.prompts.append(prompt)
        found.expected.append(chat.messages[at].content)


def _same(asked: ComparedChat, encoded: EncodedChat) -> bool:
    wanted = [at - 1 for at in range(1, len(encoded.ids)) if encoded.labelled[at]]
    return encoded.ids == asked.ids and wanted == asked.positions


def _training_chats(task: ModelsTask, trained: TrainedFormat, found: Selection) -> Sequence[Chat | None]:
    """The texts of the first training chats, found among those of the user's files by their tokens."""
    wanted = {tuple(each.ids): number for number, each in enumerate(found.chats)}
    texts: list[Chat | None] = [None] * len(found.chats)
    try:
        read = read_chats([Path(each) for each in task.train_data])
    except KolotuneError:
        return []
    for chat in read.chats[: _SEARCHED * len(found.chats)]:
        try:
            number = wanted.get(tuple(trained.encoder.encode(chat).ids))
        except KolotuneError:
            continue
        if number is not None:
            texts[number] = chat
    return texts if any(texts) else []


def pieces(tokenizer: Any) -> list[str | None]:
    """The vocabulary by id; None for what was added and is no special token: formats write those differently."""
    vocabulary = tokenizer.get_vocab()
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if not token.special}
    found: list[str | None] = [None] * (max(vocabulary.values()) + 1)
    for piece, index in vocabulary.items():
        if index not in added:
            found[index] = piece
    return found


def misplaced(wanted: Sequence[str | None], found: Sequence[str]) -> str:
    """A sentence about the first entry that stands at another id than in training; "" when there is none.

    Entries that are merely written otherwise (SentencePiece's space, say) are none.
    """
    places = {piece: index for index, piece in enumerate(found)}
    for index, piece in enumerate(wanted):
        if piece is None or (index < len(found) and found[index] == piece):
            continue
        if piece in places:
            return f"the vocabulary's entry {piece!r} is token {places[piece]}, and was token {index} in training"
    return ""
