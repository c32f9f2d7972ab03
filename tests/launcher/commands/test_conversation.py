"""What a conversation asks of the model: every message in its place, old ones left out when the context is full."""

from collections.abc import Iterable

import pytest

from launcher.commands.conversation import Conversation
from model.text.chat_template import ChatTemplate, build_variables
from parallel.errors import RequestError

TEMPLATE = ChatTemplate("{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:", "test")


class Letters:
    """A tokenizer with one id per character."""

    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    vocab_size = 128
    special_ids = frozenset[int]()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(map(ord, text))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))


def build(context_tokens: int, system: str | None = None) -> Conversation:
    tokenizer = Letters()
    return Conversation(lambda messages: TEMPLATE.render(build_variables(messages, {})), tokenizer, context_tokens, system)


def render(conversation: Conversation, text: str) -> str:
    return Letters().decode(conversation.plan(text).prompt_ids)


def test_every_message_and_answer_is_in_the_next_prompt() -> None:
    conversation = build(4096, "S")
    assert render(conversation, "one") == "s:S;u:one;a:"
    conversation.add("one", "1")
    assert render(conversation, "two") == "s:S;u:one;a:1;u:two;a:"
    conversation.reset()
    assert render(conversation, "three") == "s:S;u:three;a:", "the system message stays"


def test_the_oldest_messages_are_left_out_of_a_full_context() -> None:
    conversation = build(70, "S")  # of which 17 are kept free for the answer
    for number in range(3):
        conversation.add(f"question {number}", "answer")
    turn = conversation.plan("now")
    text = Letters().decode(turn.prompt_ids)
    assert (turn.num_dropped, text) == (4, "s:S;u:question 2;a:answer;u:now;a:")
    assert turn.room == 70 - len(text)
    conversation.add("now", "yes", turn.num_dropped)
    assert render(conversation, "x") == "s:S;u:question 2;a:answer;u:now;a:yes;u:x;a:"


def test_a_message_that_leaves_little_room_is_still_asked_alone() -> None:
    conversation = build(80)
    conversation.add("old", "answer")
    turn = conversation.plan("x" * 70)
    assert (turn.num_dropped, turn.room) == (2, 80 - len("u:;a:") - 70)


def test_a_message_longer_than_the_context_is_refused_and_changes_nothing() -> None:
    conversation = build(80)
    conversation.add("old", "answer")
    with pytest.raises(RequestError, match=r"the message has 95 tokens .* the context is 80: shorten it"):
        conversation.plan("x" * 90)
    assert render(conversation, "y") == "u:old;a:answer;u:y;a:"
