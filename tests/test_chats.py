"""Where the assistant's reply begins in a rendered chat, whatever template and tokenizer do."""

from __future__ import annotations

import pytest
from tiny_hf import MARKS, tokenizers, transformers, write

from ooc_influence import hf
from ooc_influence.errors import InputError
from ooc_influence.hf.pretokenised import IGNORED

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


def learned(tmp_path, messages, tokenizer, **options):
    """The text of the targets, a passage each, of the first document, and all of its text."""
    data = hf.open_documents(write(tmp_path / "d.jsonl", [{"m": messages, "t": options.pop("tools", None)}]))
    fields = hf.Fields(messages="m", turns="all", tools="t")
    sample = hf.Samples(data, tokenizer, fields, options.pop("length", 900), **options)[0]
    passages, inside = [], False
    for token, label in zip(sample["input_ids"], sample["labels"], strict=True):
        if label != IGNORED:
            assert label == token
            passages += [] if inside else [""]
            passages[-1] += tokenizer.convert_ids_to_tokens([token])[0]
        inside = label != IGNORED
    return passages, "".join(tokenizer.convert_ids_to_tokens(sample["input_ids"]))


SAYS = {"role": "assistant", "content": "one"}
SYSTEM, TOOL = {"role": "system", "content": "be"}, {"role": "tool", "content": "7"}
LAST = {"role": "assistant", "content": "two"}
THOUGHTFUL = {"role": "assistant", "content": "<think>hm</think>one"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
WITH_CALLS = PLAIN.replace(
    "m.content }}", "m.content }}{% if m.tool_calls is defined %}<call>{{ m.tool_calls[0].function.name }}{% endif %}"
)
CALLS_ONLY = PLAIN.replace("m.content", "m.tool_calls[0].function.name if m.tool_calls is defined else m.content")
FORGETS = (  # a thought is shown after the last question only
    "{% set last = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<{{ m.role }}>\n"
    "{{ m.content if loop.index0 > last.user else m.content.split('</think>')[-1] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
ENDS_ONCE = PLAIN.replace("{% endif %}", "{% else %}<eos>{% endif %}")  # Phi's: an end of the text after the last turn
NO_BREAK = PLAIN.replace("<end>\n{%", "<end>{% if not loop.last %}\n{% endif %}{%", 1)


def special(template):
    """A tokenizer whose ends are special tokens."""
    words = characters(template)
    words.add_special_tokens({"additional_special_tokens": ["<end>", "<user>", "<assistant>", "<tool>", "<system>"],
                              "eos_token": "<eos>"})  # fmt: skip
    return words


@pytest.mark.parametrize("make", [characters, special])
@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (PLAIN, [SYSTEM, USER, SAYS, USER, LAST], ["one<end>\n", "two<end>\n"]),
        (PLAIN, [SYSTEM, USER, SAYS, USER, LAST, USER], ["one<end>\n", "two<end>\n"]),
        (PLAIN, [SAYS, USER, LAST], ["one<end>\n", "two<end>\n"]),
        (PLAIN, [USER, SAYS, SAYS], ["one<end>\n", "one<end>\n"]),
        (PLAIN, [USER, {**SAYS, "weight": 0}, USER, {**LAST, "weight": 1}], ["two<end>\n"]),
        (PLAIN, [USER, {"role": "assistant", "content": ""}, USER, LAST], ["<end>\n", "two<end>\n"]),
        (NO_INVITATION, [USER, SAYS, {"role": "user", "content": "one"}, SAYS], ["one<end>\n", "one<end>\n"]),
        (NO_BREAK, [USER, SAYS, USER, LAST], ["one<end>", "two<end>"]),
        (THINK, [USER, SAYS, USER, LAST], ["one<end>\n", "two<end>\n"]),
        (STRIPS, [USER, THOUGHTFUL, USER, LAST], ["one<end>\n", "two<end>\n"]),
        (QWEN, [USER, THOUGHTFUL, USER, LAST],
         ["<think>hm</think>one<end>\n", "<think>\n\n</think>\n\ntwo<end>\n"]),
        (QWEN, [USER, SAYS, USER, LAST], ["one<end>\n", "<think>\n\n</think>\n\ntwo<end>\n"]),
        (FORGETS, [USER, THOUGHTFUL, USER, LAST], ["one<end>\n", "two<end>\n"]),
        (FORGETS, [USER, THOUGHTFUL, TOOL, SAYS, USER, THOUGHTFUL],
         ["one<end>\n", "one<end>\n", "<think>hm</think>one<end>\n"]),
        (WITH_CALLS, [USER, CALLS, TOOL, LAST], ["<call>f<end>\n", "two<end>\n"]),
        (WITH_CALLS, [USER, SAYS | {"tool_calls": CALLS["tool_calls"]}, TOOL, LAST],
         ["one<call>f<end>\n", "two<end>\n"]),
        (CALLS_ONLY, [USER, CALLS, TOOL, LAST, USER, LAST], ["f<end>\n", "two<end>\n", "two<end>\n"]),
    ],
)  # fmt: skip
def test_all_replies_are_learned(tmp_path, make, template, messages, expected):
    words = make(template)
    found, whole = learned(tmp_path, messages, words)
    assert found == expected
    assert whole == words.apply_chat_template(messages if messages[-1] != USER else messages[:-1], tokenize=False)


def test_all_replies_of_one_are_the_last(tmp_path):
    for template in (PLAIN, THINK, STRIPS, NO_INVITATION, QWEN, FORGETS, ENDS_ONCE):
        chat = [SYSTEM, USER, LAST]
        assert learned(tmp_path, chat, special(template))[0] == [targets(tmp_path, chat, special(template))[0]]


def test_a_template_that_ends_the_text_after_the_last_turn(tmp_path):
    """Only special tokens show where a reply ends and what follows every turn begins."""
    found, _ = learned(tmp_path, [USER, SAYS, USER, LAST], special(ENDS_ONCE))
    assert found == ["one<end>\n", "two<end>\n<eos>"]
    with pytest.raises(InputError, match=r"ends every reply as it ends the last in document 0; .* \(--turns last\)"):
        learned(tmp_path, [USER, SAYS, USER, LAST], characters(ENDS_ONCE))


def test_replies_marked_by_the_template_itself(tmp_path):
    """Where a template marks what the assistant generates, the same tokens are learned."""
    marked = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<assistant>\n{% generation %}{{ m.content }}<end>\n"
        "{% endgeneration %}{% else %}" + TURN + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    )
    words, chat = special(marked), [SYSTEM, USER, SAYS, USER, LAST]
    known = words.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    data = hf.open_documents(write(tmp_path / "d.jsonl", [{"m": chat}]))
    sample = hf.Samples(data, words, hf.Fields(messages="m", turns="all"), 400)[0]
    assert sample["input_ids"] == known["input_ids"]
    assert [int(label != IGNORED) for label in sample["labels"]] == known["assistant_masks"]
    assert sum(known["assistant_masks"]) == len("onetwo") + 2 * len(["<end>", "\n"])


@pytest.mark.parametrize("length", [8, 15, 31])
def test_every_reply_of_a_long_chat_is_a_target_once(tmp_path, length):
    words = special(PLAIN)
    chat = [USER, SAYS, {"role": "user", "content": "a longer question than a row"}, LAST]
    found = hf.Samples(hf.open_documents(write(tmp_path / "d.jsonl", [{"m": chat}])), words,
                       hf.Fields(messages="m", turns="all"), length)  # fmt: skip
    seen = [[label for label in found[row]["labels"] if label != IGNORED] for row in range(len(found))]
    assert [len(row) for row in seen] == found.n_tokens.tolist()
    assert "".join(words.convert_ids_to_tokens([token for row in seen for token in row])) == "one<end>\ntwo<end>\n"
    assert all(seen)


def test_tools_are_shown_to_the_template(tmp_path):
    words = characters("{% if tools %}{{ tools[0].name }}:{% endif %}" + PLAIN)
    for tools in ([{"name": "add"}], '[{"name": "add"}]'):
        found, whole = learned(tmp_path, [USER, SAYS, USER, LAST], words, tools=tools)
        assert whole.startswith("add:<user>")
        assert found == ["one<end>\n", "two<end>\n"]
    for tools in (None, [], ""):
        assert learned(tmp_path, [USER, LAST], words, tools=tools)[1].startswith("<user>")
    for tools in ("add", {"name": "add"}, "{}"):
        with pytest.raises(InputError, match=r"list of tools, or its JSON, in document 0 \(--tools\); received"):
            learned(tmp_path, [USER, LAST], words, tools=tools)


def test_turns_that_do_not_go_together():
    with pytest.raises(InputError, match="turns 'last' or 'all'"):
        hf.Fields(messages="m", turns="first")
    with pytest.raises(InputError, match=r"turns='all' \(--turns all\) with messages"):
        hf.Fields(text="t", turns="all")
    with pytest.raises(InputError, match=r"tools \(--tools\) with messages"):
        hf.Fields(text="t", tools="u")


def test_all_replies_without_offsets(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.BatchEncoding, "encodings", property(lambda self: None))
    assert learned(tmp_path, [USER, SAYS, USER, LAST], characters(PLAIN))[0] == ["one<end>\n", "two<end>\n"]
