"""Conversations -> token ids and which of them are answers, by a chat template and nothing else.

The template alone says where an answer begins and ends. Either it marks answers itself ({% generation %}), or the
conversation is rendered up to each answer, with the prompt for one, and up to its end: what lies between is the
answer, its end-of-turn token included. Each rendering must be the beginning of the next, as text and as token ids,
so that the model is trained on exactly what it will meet and what it shall give; a record for which this does not
hold is a bad record.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_cpt.config.resolve import is_template_text
from dist_cpt.config.schema import SourceConfig, ValidationConfig
from dist_cpt.data.labelled import Labelled, Tokeniser, gather
from dist_cpt.data.sources import BadRecord, Parse, Record, checked, field_of, json_object, string_field
from dist_cpt.data.store import LabelKind
from dist_cpt.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, str]
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_RENDERING = (
    threading.Lock()
)  # a template that marks answers keeps its place in a global; jinja is no faster in threads


def chat_template(tokenizer: PreTrainedTokenizerFast, given: str | None) -> str:
    """The template of a recipe (`given`: its text or file), else that of the tokenizer.

    Raises:
        DataError: there is none, or it is not valid jinja.
    """
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template

    where = "the tokenizer's chat template"
    template = given
    if given is None:
        try:
            template = tokenizer.get_chat_template()
        except ValueError:
            raise DataError(
                "task instruct: the tokenizer has no chat template",
                remedy="set data.chat_template to a jinja template or its file, or take the instruct model's tokenizer",
            ) from None
    elif not is_template_text(given):
        where = f"data.chat_template: {given}"
        try:
            template = Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{where} cannot be read: {error}", remedy="give a jinja file or its text") from None
    else:
        where = "data.chat_template"
    assert template is not None
    try:
        _compile_jinja_template(template)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"{where}, line {error.lineno}: {error.message}", remedy="repair the template") from None
    return template


class ConversationEncoder:
    """Conversations -> ids, with 1 beside every token of an answer and 0 beside all others."""

    label_kind: LabelKind = "answers"

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str, seq_len: int) -> None:
        # Templates write their special tokens themselves.
        self._tokenise = Tokeniser(tokenizer, add_special_tokens=False)
        self._special: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._template = template
        self._marked = _MARKED.search(template) is not None
        self._seq_len = seq_len
        self.identity: dict[str, Any] = {
            "chat_template": template,
            "special_tokens": {key: str(token) for key, token in sorted(self._special.items())},
            "seq_len": seq_len,
        }

    def fields(self, source: SourceConfig | ValidationConfig) -> list[str]:
        if source.prompt is not None and source.response is not None:
            return [source.prompt, source.response]
        return [source.messages]

    def parser(self, source: SourceConfig | ValidationConfig) -> Parse[list[Message]]:
        fields = self.fields(source)

        def parse(raw: bytes, is_json: bool) -> list[Message] | None:
            if not is_json:
                raise BadRecord("no_conversation", "conversations are read from .jsonl alone")
            record = json_object(raw)
            if len(fields) == 2:
                pairs = zip(("user", "assistant"), fields, strict=True)
                return [{"role": role, "content": string_field(record, field)} for role, field in pairs]
            return _messages(field_of(record, fields[0]), fields[0])

        return parse

    def __call__(self, records: Sequence[Record[list[Message]]]) -> Labelled:
        bad: list[tuple[Record[list[Message]], BadRecord]] = []
        rendered: list[tuple[Record[list[Message]], str, list[int]]] = []
        for record in records:
            try:
                rendered.append((record, *self._render(record.value)))
            except BadRecord as error:
                bad.append((record, error))
        # One call for all: the tokenizer works on a batch in parallel.
        found = iter(self._tokenise([t for _, text, at in rendered for t in (text, *(text[:border] for border in at))]))
        ids, answers = [], []
        for record, _, borders in rendered:
            whole = next(found)
            parts = [next(found) for _ in borders]
            try:
                answers.append(self._answers(whole, parts))
                ids.append(whole)
            except BadRecord as error:
                bad.append((record, error))
        return gather(ids, answers, bad)

    def _render(self, messages: list[Message]) -> tuple[str, list[int]]:
        """The text, and where its answers begin and end: rising characters, two of each answer."""
        if all(message["role"] != "assistant" for message in messages):
            raise BadRecord("no_answer", "no message of the role assistant")
        if self._marked:
            text, spans = self._jinja(messages, marks=True)
            return text, [border for span in spans for border in span]
        text, _ = self._jinja(messages)
        borders: list[int] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, _ = self._jinja(messages[:number], add_generation_prompt=True)
            answered, _ = self._jinja(messages[: number + 1])
            if not (answered.startswith(prompt) and text.startswith(answered)):
                raise BadRecord(
                    "template_not_prefix",
                    f"the chat template renders what is up to message {number} differently when more follows; "
                    "mark the answers in it with {% generation %}",
                )
            borders += [len(prompt), len(answered)]
        return text, borders

    def _jinja(
        self, messages: list[Message], *, marks: bool = False, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with _RENDERING:
                render: Any = render_jinja_template  # its annotations fit none of its answers
                texts, spans = render(
                    [messages],
                    chat_template=self._template,
                    return_assistant_tokens_mask=marks,
                    add_generation_prompt=add_generation_prompt,
                    **self._special,
                )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise BadRecord("template_error", f"the chat template refuses it: {error}") from None
        return texts[0], spans[0] if marks else []

    def _answers(self, whole: list[int], parts: list[list[int]]) -> list[int]:
        """1 for every token of an answer; `parts` are the ids of the text up to each border."""
        if len(whole) > self._seq_len:
            raise BadRecord("too_long", f"{len(whole)} tokens, more than data.seq_len {self._seq_len}")
        for part in parts:
            if whole[: len(part)] != part:
                raise BadRecord("token_across_border", "a token spans the border of an answer")
        answers = [0] * len(whole)
        for begin, end in zip(parts[::2], parts[1::2], strict=True):
            answers[len(begin) : len(end)] = [1] * (len(end) - len(begin))
        if not any(answers[1:]):
            raise BadRecord("no_answer", "no token of an answer")
        return answers


def _messages(value: Any, field: str) -> list[Message] | None:
    if not isinstance(value, list):
        raise BadRecord("no_conversation", f"field {field!r} is of type {type(value).__name__}, not a list of messages")
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise BadRecord("no_conversation", f"message {number} is of type {type(message).__name__}, not an object")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise BadRecord("no_conversation", f"message {number} has no text {key!r}")
            checked(message[key])
    return value or None
