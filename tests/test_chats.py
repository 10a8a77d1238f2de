"""Where the assistant's reply begins in a rendered chat, whatever template and tokenizer do."""

from __future__ import annotations

import pytest
from tiny_hf import MARKS, tokenizers, transformers, write

from ooc_influence import hf
from ooc_influence.errors import InputError
from ooc_influence.hf.padding import IGNORED

pytestmark = MARKS

TURN = "<{{ m.role }}>\n{{ m.content }}<end>\n"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
THINK = PLAIN.replace("<assistant>\n{%", "<assistant>\n<think>\n{%")
STRIPS = PLAIN.replace("m.content", "m.content.split('</think>')[-1]")
NO_INVITATION = "{% for m in messages %}" + TURN + "{% endfor %}"
QWEN = (  # the last reply gets its thought, or an empty one
    "{% for m in messages %}<{{ m.role }}>\n"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('first the user') }}{% endif %}" + PLAIN
USER, TWO = (
    {"role": "user", "content": "ask"},
    [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
)


def characters(template, *, merges=()):
    """A tokenizer of single characters, in which a few pairs are one token."""
    alphabet = sorted({chr(code) for code in range(32, 127)} | {"\n"} | {"".join(pair) for pair in merges})
    vocabulary = {character: number for number, character in enumerate(["<unk>", *alphabet])}
    model = tokenizers.models.BPE(vocabulary, list(merges), unk_token="<unk>")
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), unk_token="<unk>")
    made.chat_template = template
    return made


def targets(tmp_path, messages, tokenizer, length=400, **options):
    """The text of the first document's targets, and all of its text."""
    data = hf.open_documents(write(tmp_path / "d.jsonl", [{"m": messages}]))
    found = hf.Samples(data, tokenizer, hf.Fields(messages="m"), length, **options)
    sample = found[0]
    wanted = [token for token in sample["labels"] if token != IGNORED]
    return tuple("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (wanted, sample["input_ids"]))


@pytest.mark.parametrize(
    ("template", "reply", "expected"),
    [
        (PLAIN, "yes", "yes<end>\n"),
        (PLAIN, "", "<end>\n"),
        (THINK, "yes", "yes<end>\n"),
        (THINK, "<b>", "<b><end>\n"),  # the thought that the template opens and the reply begin alike
        (THINK, "<think>\nhm</think>yes", "hm</think>yes<end>\n"),
        (STRIPS, "<think>hm</think>yes", "yes<end>\n"),
        (STRIPS.replace("<assistant>\n{%", "<assistant>\n<think>\n{%"), "<think>hm</think>yes", "yes<end>\n"),
        (NO_INVITATION, "yes", "yes<end>\n"),
        (NO_INVITATION, "ask", "ask<end>\n"),
        (QWEN, "yes", "<think>\n\n</think>\n\nyes<end>\n"),
        (QWEN, "<think>hm</think>yes", "<think>hm</think>yes<end>\n"),
    ],
)
def test_the_reply_is_what_is_learned(tmp_path, template, reply, expected):
    messages = [*TWO, USER, {"role": "assistant", "content": reply}]
    found, whole = targets(tmp_path, messages, characters(template))
    assert found == expected
    assert whole.endswith(expected)


@pytest.mark.parametrize("reply", ["\nyes", "\n", "\n\nyes"])
def test_a_token_of_both_template_and_reply_is_learned(tmp_path, reply):
    words = characters(PLAIN, merges=[("\n", "\n")])
    found, whole = targets(tmp_path, [USER, {"role": "assistant", "content": reply}], words)
    assert found == "\n" + reply + "<end>\n"
    assert whole == "<user>\nask<end>\n<assistant>\n" + reply + "<end>\n"
    apart, _ = targets(tmp_path, [USER, {"role": "assistant", "content": reply}], characters(PLAIN))
    assert apart == reply + "<end>\n"


def test_a_chat_that_ends_with_the_user_ends_with_the_last_reply(tmp_path):
    reply = [USER, {"role": "assistant", "content": "yes"}]
    expected = targets(tmp_path, reply, characters(PLAIN))
    assert targets(tmp_path, [*reply, USER], characters(PLAIN)) == expected
    assert targets(tmp_path, [*reply, {"role": "tool", "content": "7"}, USER], characters(PLAIN)) == expected


def test_one_message(tmp_path):
    reply = {"role": "assistant", "content": "yes"}
    assert targets(tmp_path, [reply], characters(PLAIN))[0] == "yes<end>\n"
    with pytest.raises(InputError, match=r"accepts in document 0; received TemplateError: first the user"):
        targets(tmp_path, [reply], characters(STRICT))
    with pytest.raises(InputError, match=r"document 0 .* received messages of user only, no assistant's reply: .*skip"):
        targets(tmp_path, [USER], characters(PLAIN))
    with pytest.raises(InputError, match=r"document 0 .* received no messages"):
        targets(tmp_path, [], characters(PLAIN))
    with pytest.raises(InputError, match="received none that has any"):
        targets(tmp_path, [USER], characters(PLAIN), on_missing="skip")


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        (None, "document 0 .* received null in field 'm'"),
        ("hello", "list of messages in document 0; received str"),
        ([{"from": "gpt", "value": "a"}], "role and content in document 0; received one with from, value"),
        (["a"], "role and content in document 0; received one with str"),
    ],
)
def test_what_is_no_chat_is_refused_by_number(tmp_path, messages, match):
    with pytest.raises(InputError, match=match):
        targets(tmp_path, messages, characters(PLAIN))


def test_a_template_that_raises_or_changes_the_reply(tmp_path):
    chat = [USER, {"role": "assistant", "content": "yes"}]
    for template, match in (
        ("{{ raise_exception('no\nway') }}", r"accepts in document 0; received TemplateError: no way: change them, or"),
        ("{{ messages[9].content.x }}", "accepts in document 0; received UndefinedError"),
        ("{{ messages|length }}", "shows a reply as it is in document 0"),
    ):
        with pytest.raises(InputError, match=match) as caught:
            targets(tmp_path, chat, characters(template))
        assert "\n" not in str(caught.value)


def test_contents_in_parts_and_calls_of_tools(tmp_path):
    """What a reply is made of beside its text is the template's to show."""
    template = PLAIN.replace("m.content", "(m.content[0].text if m.content is not string else m.content)")
    chat = [USER, {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]
    assert targets(tmp_path, chat, characters(template))[0] == "yes<end>\n"
    template = PLAIN.replace("m.content", "(m.content or m.calls)")
    assert targets(tmp_path, [USER, {"role": "assistant", "content": None, "calls": "f()"}], characters(template))[
        0
    ] == ("f()<end>\n")


def test_a_tokenizer_without_offsets(tmp_path, monkeypatch):
    """Where characters are not known, tokens of what comes before the reply have to be those of the whole."""
    chat = [USER, {"role": "assistant", "content": "yes"}]
    words = characters(PLAIN, merges=[("\n", "y")])
    monkeypatch.setattr(transformers.BatchEncoding, "encodings", property(lambda self: None))
    assert targets(tmp_path, chat, characters(THINK))[0] == "yes<end>\n"
    with pytest.raises(InputError, match="a reply that begins with a token of its own in document 0"):
        targets(tmp_path, chat, words)
