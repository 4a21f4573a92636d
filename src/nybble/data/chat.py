"""Samples as the text that a model sees, by a chat template or plain."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from nybble.data.formats import Chat, Plain, RowError, Sample
from nybble.data.template import ChatTemplate, Rendered
from nybble.data.turns import render_turns
from nybble.errors import UserError


class Renderer:
    """Turns samples into text. `template` is the text of the chat template used, None where there is none."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template_file: str | None = None,
        train_on: str = "assistant",
        use_chat_template: bool = True,
    ) -> None:
        self._template = ChatTemplate.find(tokenizer, template_file)
        self._train_on_all = train_on == "all"
        self._prefer_chat = use_chat_template and self._template is not None

    @property
    def template(self) -> str | None:
        return self._template.text if self._template else None

    def render(self, sample: Sample) -> list[Rendered]:
        """One rendering, or several where earlier turns are rendered otherwise later on. Raises RowError, UserError."""
        if sample.chat and (self._prefer_chat or not sample.plain):
            return self._render_chat(sample.chat)
        assert sample.plain is not None
        return [self._render_plain(sample.plain)]

    def render_question(self, sample: Sample) -> Rendered:
        """What precedes the sample's last answer, as the model is to see it. Raises RowError, UserError."""
        if sample.chat and (self._prefer_chat or not sample.plain):
            asked = len(sample.chat.messages) - 1
            if not asked or sample.chat.messages[asked]["role"] != "assistant":
                raise RowError("does not end in a question and its answer")
            return Rendered(self._known_template().render(sample.chat, asked, generation_prompt=True), ())
        assert sample.plain is not None
        return Rendered(sample.plain.prompt, (), add_bos=True)

    def _render_plain(self, plain: Plain) -> Rendered:
        text = plain.prompt + plain.completion
        start = 0 if self._train_on_all else len(plain.prompt)
        return Rendered(text, ((start, len(text)),), add_bos=True, add_eos=True)

    def _render_chat(self, chat: Chat) -> list[Rendered]:
        template = self._known_template()
        if self._train_on_all:
            text = template.render(chat, len(chat.messages))
            ends = template.ending(text)[1]
            end = ends[-1] if ends else len(text)  # white space behind the end token only separates turns
            return [Rendered(text, ((0, end),), add_eos=not ends)]
        return list(render_turns(template, chat))

    def _known_template(self) -> ChatTemplate:
        if self._template is None:
            raise UserError(
                "the tokenizer has no chat template, and the data are chats",
                where="data.chat_template",
                fix="Give a file with a Jinja chat template, or the instruction-tuned version of the model.",
            )
        return self._template
