"""Conversations -> token ids and a mask of the answers, by the chat template alone.

Either the template marks answers itself ({% generation %}), or the conversation is rendered up to each answer, with
the generation prompt, and up to the answer's end: what lies between is the answer, its end-of-turn token included.
Each rendering must be a prefix of the next, as text and as token ids, so that training sees exactly the prompts that
inference will produce; otherwise the record is bad.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_cpt.config.resolve import is_template_text
from dist_cpt.data.cut_text import Cutter
from dist_cpt.data.encode import Encoded, Rejected, Source, gather
from dist_cpt.data.records import BadRecord, Fields, RawRecord
from dist_cpt.data.sources import Parse, Record, field_of, string_field, valid_text
from dist_cpt.data.store import LabelKind
from dist_cpt.data.token_ids import batch_ids, unpadded_copy
from dist_cpt.errors import DataError
from dist_cpt.storage import read_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, str]
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_JINJA_LOCK = threading.Lock()  # transformers keeps the marked spans in a global; jinja is no faster in threads


def chat_template(tokenizer: PreTrainedTokenizerFast, configured: str | None) -> str:
    """The template of the recipe (`configured`: its text or file), else the tokenizer's.

    Raises:
        DataError: there is none, or it is not valid jinja.
    """
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template

    if configured is None:
        where = "the tokenizer's chat template"
        try:
            template = tokenizer.get_chat_template()
        except ValueError:
            raise DataError(
                "task instruct: the tokenizer has no chat template",
                remedy="set data.chat_template to a jinja template or its file, or use the instruct model's tokenizer",
            ) from None
    elif is_template_text(configured):
        where, template = "data.chat_template", configured
    else:
        where = f"data.chat_template: {configured}"
        try:
            template = read_bytes(Path(configured)).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{where} cannot be read: {error}", remedy="give a jinja file or its text") from None
    try:
        _compile_jinja_template(template)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"{where}, line {error.lineno}: {error.message}", remedy="repair the template") from None
    return template


class ConversationEncoder:
    """Conversations -> ids, with 1 for every token of an answer and 0 for all others."""

    label_kind: LabelKind | None = "answers"
    cutter: Cutter | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str, seq_len: int) -> None:
        self._backend = unpadded_copy(tokenizer.backend_tokenizer)
        self._special: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._template = template
        self._marks_answers = _MARKED.search(template) is not None
        self._seq_len = seq_len

    def describe(self, source: Source) -> dict[str, Any]:
        settings = {
            "chat_template": self._template,
            "special_tokens": {key: str(token) for key, token in sorted(self._special.items())},
            "seq_len": self._seq_len,
        }
        return {"fields": self._fields(source), "labels": settings}

    def parser(self, source: Source) -> Parse[list[Message]]:
        fields = self._fields(source)

        def parse(raw: RawRecord) -> list[Message] | None:
            record = raw.fields()
            if len(fields) == 2:
                return _turns(user=string_field(record, fields[0]), assistant=string_field(record, fields[1]))
            return _conversation(record, fields[0])

        return parse

    def __call__(self, records: Sequence[Record[list[Message]]]) -> Encoded:
        rejected: Rejected = []
        rendered: list[tuple[Record[list[Message]], str, list[int]]] = []
        for record in records:
            try:
                rendered.append((record, *self._render(record.value)))
            except BadRecord as bad:
                rejected.append((record, bad))
        # One call for the whole batch, which the tokenizer works on in parallel.
        prefixes = [text[:end] for _, text, borders in rendered for end in (len(text), *borders)]
        tokenised = iter(batch_ids(self._backend, prefixes))  # templates write their special tokens themselves
        ids, answers = [], []
        for record, _, borders in rendered:
            whole, *up_to_border = islice(tokenised, 1 + len(borders))
            try:
                answers.append(self._answer_mask(whole, up_to_border))
                ids.append(whole)
            except BadRecord as bad:
                rejected.append((record, bad))
        return gather(ids, answers, rejected)

    def _fields(self, source: Source) -> list[str]:
        if source.prompt is not None and source.response is not None:
            return [source.prompt, source.response]
        return [source.messages]

    def _render(self, messages: list[Message]) -> tuple[str, list[int]]:
        """The text, and the start and end of each answer in it, in characters, ascending."""
        if all(message["role"] != "assistant" for message in messages):
            raise BadRecord("no_answer", "no message of the role assistant")
        text, spans = self._jinja(messages, mark_answers=self._marks_answers)
        if self._marks_answers:
            return text, [border for span in spans for border in span]
        borders: list[int] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, _ = self._jinja(messages[:number], add_generation_prompt=True)
            answered, _ = self._jinja(messages[: number + 1])
            if not (answered.startswith(prompt) and text.startswith(answered)):
                raise BadRecord(
                    "template_not_prefix",
                    f"the chat template renders the messages up to number {number} differently when more follow; "
                    "mark the answers in it with {% generation %}",
                )
            borders += [len(prompt), len(answered)]
        return text, borders

    def _jinja(
        self, messages: list[Message], *, mark_answers: bool = False, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # its annotations fit none of its results
        try:
            with _JINJA_LOCK:
                texts, spans = render(
                    [messages],
                    chat_template=self._template,
                    return_assistant_tokens_mask=mark_answers,
                    add_generation_prompt=add_generation_prompt,
                    **self._special,
                )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise BadRecord("template_error", f"the chat template fails: {error}") from None
        return texts[0], spans[0] if mark_answers else []

    def _answer_mask(self, whole: list[int], up_to_border: list[list[int]]) -> list[int]:
        """1 for every token of an answer; `up_to_border` are the ids of the text up to each border."""
        if len(whole) > self._seq_len:
            raise BadRecord("too_long", f"{len(whole)} tokens, more than data.seq_len {self._seq_len}")
        if any(whole[: len(prefix)] != prefix for prefix in up_to_border):
            raise BadRecord("token_across_border", "a token spans the border of an answer")
        mask = [0] * len(whole)
        for before, answered in zip(up_to_border[::2], up_to_border[1::2], strict=True):
            mask[len(before) : len(answered)] = [1] * (len(answered) - len(before))
        if not any(mask[1:]):
            raise BadRecord("no_answer", "no token belongs to an answer")
        return mask


def _conversation(record: Fields, field: str) -> list[Message] | None:
    """The messages of a record: in `field`, else as ShareGPT (conversations) or Alpaca (instruction) write them."""
    if field not in record and "instruction" in record:
        given = string_field(record, "input") if record.get("input") else ""
        question = "\n\n".join(filter(None, (string_field(record, "instruction"), given)))
        system = string_field(record, "system") if record.get("system") else None
        return _turns(system=system, user=question, assistant=string_field(record, "output"))
    if field not in record and "conversations" in record:
        field = "conversations"
    return _messages(field_of(record, field), field)


def _turns(**contents: str | None) -> list[Message]:
    return [{"role": role, "content": content} for role, content in contents.items() if content is not None]


def _messages(value: Any, field: str) -> list[Message] | None:
    if not isinstance(value, list):
        raise BadRecord("no_conversation", f"field {field!r} is of type {type(value).__name__}, not a list of messages")
    messages: list[Message] = []
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise BadRecord("no_conversation", f"message {number} is of type {type(message).__name__}, not an object")
        if "from" in message and "role" not in message:
            message = {"role": _SHAREGPT_ROLES.get(message["from"]), "content": message.get("value")}
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise BadRecord("no_conversation", f"message {number}: {key!r} is missing or not a string")
            valid_text(message[key])
        messages.append(message)
    return messages or None
