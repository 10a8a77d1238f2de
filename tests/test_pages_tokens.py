"""Token by token in a headless Chromium: marks, numbers by pointer and keys, without colours, in both schemes."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from conftest import random_rows
from pages import HOSTILE, make_store
from test_pages import contrast
from test_report import data_of

from ooc_influence.report import write_report
from ooc_influence.report.folder import to_script
from ooc_influence.report.tokens import token_pieces

pytest.importorskip("jinja2")

ANSWER = [("Why?\n\n", 0.0), (" Because", 4.0), (" of", -3.0), (" rain", 0.5), (".", 1e-4)]
RIGHT_TO_LEFT = [("שלום", 1.0), (" עולם", -2.0), (" טוב", 0.5)]
RIGHT, LEFT, DOWN, END, ESCAPE, TAB = "\ue014", "\ue012", "\ue015", "\ue010", "\ue00c", "\ue004"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A report of three queries whose first has tokens: an answer, hostile ones, right to left, a long text."""
    folder = tmp_path_factory.mktemp("told")
    train = make_store(folder / "train.zarr", random_rows(60, 12), ids=[f"doc-{row}" for row in range(60)],
                       labels=["a"] * 60, sources=[f"site {row % 2}" for row in range(60)])  # fmt: skip
    query = make_store(folder / "query.zarr", random_rows(3, 12, 1), like=train)
    pairs = [{"prompt": "Why?", "completion": " Because of rain."}] * 3
    (folder / "answers.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    texts = [{"text": f"The text of row {row}"} for row in range(60)]
    (folder / "train.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    report = write_report(train, folder / "report", query, data=folder / "train.jsonl",
                          query_data=folder / "answers.jsonl", top=4, suspects=8)  # fmt: skip
    file = data_of(report, "queries-0")
    rows = [row for row, _ in file["queries"][0]["proponents"]]
    clean = [text.encode("utf-8", "replace").decode() for text in HOSTILE]
    long = [f" word{number}" for number in range(900)]
    weights = np.where(np.arange(900) == 700, 5.0, 0.01)
    texts = [list(zip(*RIGHT_TO_LEFT, strict=True)), (clean, np.arange(1.0, len(clean) + 1)), (long, weights)]
    file["queries"][0]["tokens"] = {
        "query": token_pieces(*zip(*ANSWER, strict=True), 1200),
        "rows": {row: token_pieces(*own, 420) for row, own in zip(rows, texts, strict=False)},
    }
    (report / "data" / "queries-0.js").write_text(f'ooc.receive("queries-0", {to_script(file)});\n')
    return report


@pytest.fixture
def opened(page, told):
    page.open((told / "index.html").as_uri(), "queries/0")
    page.wait("return document.querySelectorAll('.card').length === 8")
    return page


def keys(page, selector, *pressed):
    page.run("document.querySelector(arguments[0]).focus()", selector)
    for key in pressed:
        page.driver.switch_to.active_element.send_keys(key)
    page.wait("return document.querySelector('.tip')?.textContent === document.getElementById('status').textContent")
    return page.text(".tip").replace("\u2068", "").replace("\u2069", "")


def test_question_answer_and_marks(opened):
    assert opened.texts(".query .exchange h3") == ["QUESTION", "ANSWER"]
    assert [text.strip() for text in opened.texts(".query .exchange .text")] == ["Why?", "Because of rain."]
    assert opened.texts(".query .t") == ["Because", "of", "rain", "."]
    shares = opened.run("return [...document.querySelectorAll('.query .t')].map((own) => [own.className, "
                        "own.style.getPropertyValue('--share')])")  # fmt: skip
    assert shares == [["t pro l3", "1.000"], ["t con l2", "0.750"], ["t pro l0", "0.125"], ["t pro l0", "0.000"]]
    widths = opened.run("return [...document.querySelectorAll('.query .t')].map((own) => { const style = "
                        "getComputedStyle(own); return [style.textDecorationLine, style.textDecorationStyle, "
                        "style.textDecorationThickness]; })")  # fmt: skip
    assert widths[:3] == [["underline", "solid", "3px"], ["underline", "wavy", "2px"], ["none", "solid", "auto"]]
    assert "strongest proponents, +1.50 together" in opened.text(".query .said")
    assert opened.logs() == []


def test_tokens_of_an_answer_alone_are_beside_its_question(opened):
    """In cards too; whole where earlier replies have shares, so that nothing is shown twice or left out."""
    draw = """
        const [pieces, text, answer] = arguments;
        const own = { pieces, first: [0, pieces.length], before: 0, after: 0, left_out: 0 };
        const query = { row: 0, id: 'q', text, answer, cut: 0, proponents: [[7, 1]], opponents: [], outside: 0,
          tokens: { query: own, rows: { 7: own } } };
        const example = { row: 7, id: 'e', text, answer, cut: 0, label: null, source: null };
        document.querySelector('.pane').replaceChildren(ooc.cards.detail(query, { 7: example }, 'Q'));
    """
    template = [["<system>Be brief.<user>Why?<bot>", 0], [" Because", 4], [" of", -3], [" rain.", 1], ["<end>", 0]]
    text = "system: Be brief.\n\nuser: Why?\n\nassistant: Because of rain."
    opened.run(draw, template, text, text.index("assistant"))
    for place in (".query", ".card"):
        assert opened.text(f"{place} .exchange > :not(h3):not(.token-text)") == "system: Be brief.\n\nuser: Why?"
        assert (
            opened.run("return document.querySelector(arguments[0]).textContent", f"{place} .tokens")
            == "Because of rain.<end>"
        )
    opened.run(draw, [["<bot>", 0], ["Hi", 2], ["<user>Why?<bot>", 0], *template[1:]],
               f"assistant: Hi\n\n{text}", text.index("assistant") + 15)  # fmt: skip
    for place in (".query", ".card"):
        assert opened.count(f"{place} .exchange") == 0
        assert opened.text(f"{place} .tokens") == "<bot>Hi<user>Why?<bot> Because of rain.<end>"


def test_numbers_by_keys(opened):
    body = ".query .tokens"
    assert keys(opened, body, RIGHT) == "“Because”: +4"
    assert keys(opened, body, RIGHT, RIGHT) == "“rain”: +0.500"
    assert opened.texts(".active") == ["rain"]
    assert keys(opened, body, END, LEFT) == "“rain”: +0.500"
    opened.driver.switch_to.active_element.send_keys(ESCAPE)
    assert opened.count(".tip") == 0
    opened.driver.switch_to.active_element.send_keys(TAB)
    assert opened.count(".active") == 0
    assert keys(opened, body, DOWN) == "“Because”: +4"  # the strongest
    assert keys(opened, body, DOWN) == "“of”: −3"


def test_keys_follow_the_direction_of_the_text(opened):
    body = ".proponents .tokens"
    assert opened.run("return getComputedStyle(document.querySelector(arguments[0])).direction", body) == "rtl"
    assert keys(opened, body, LEFT) == "“שלום”: +1"
    assert keys(opened, body, LEFT) == "“עולם”: −2"
    assert keys(opened, body, RIGHT) == "“שלום”: +1"


def test_numbers_under_the_pointer(opened):
    opened.run("document.querySelector('.query .t.con').dispatchEvent(new MouseEvent('mouseover', { bubbles: true }))")
    assert "of\u2069”: −3" in opened.text(".tip")
    tip, token = (opened.run("const own = document.querySelector(arguments[0]).getBoundingClientRect(); "
                             "return [own.top, own.bottom]", selector) for selector in (".tip", ".t.con"))  # fmt: skip
    assert tip[1] <= token[0] or tip[0] >= token[1]  # beside it, not on it
    opened.run("document.querySelector('.query .tokens').dispatchEvent(new MouseEvent('mouseleave'))")
    assert opened.count(".tip") == 0


def test_a_reader_who_sees_no_colours_hears_of_the_strongest(opened):
    nodes = opened.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    found = [node for node in nodes if node.get("name", {}).get("value", "").startswith("Tokens of")]
    assert len(found) == 4
    assert {node["role"]["value"] for node in found} == {"group"}
    described = re.sub("[\u2068\u2069]", "", found[0]["description"]["value"])
    assert described == "Strongest tokens: “Because”: +4; “of”: −3; “rain”: +0.500; all together: +1.50."
    texts = [node["name"]["value"] for node in nodes if node.get("role", {}).get("value") == "StaticText"]
    assert " Because" in texts or "Because" in texts


def test_hostile_tokens_stay_text(opened):
    opened.find(".proponents li:nth-child(2) .more").click()
    body = "return document.querySelectorAll('.proponents .tokens')[1]"
    assert opened.run(f"{body}.textContent").count("<script>window.hacked = 1</script>") == 1
    assert opened.count(".card script, .card iframe, .card img, .card svg") == 0
    keys(opened, ".proponents li:nth-child(2) .tokens", END)
    assert opened.run("return window.hacked ?? null") is None
    assert opened.logs() == []


def test_long_texts_open_and_say_what_is_missing(opened):
    card = ".proponents li:nth-child(3) "
    first = opened.text(f"{card}.tokens")
    assert "word700" in first
    assert first.startswith("…")
    assert len(first) < 440
    assert "characters before" in opened.text(card)
    opened.find(f"{card}.more").click()
    assert 3900 < len(opened.run("return document.querySelector(arguments[0]).textContent", f"{card}.tokens")) <= 4004
    opened.find(f"{card}.more").click()
    assert opened.text(f"{card}.tokens") == first


def test_the_switch_is_remembered(opened, told):
    opened.find("#show-tokens").click()
    assert opened.count(".t:not(.quiet .t)") == 0
    assert opened.texts(".query .exchange .text") == ["Why?", "Because of rain."]
    assert opened.texts(".proponents .text")[0].startswith("The text of row")
    opened.open((told / "index.html").as_uri(), "queries/0")  # as a reader who comes back
    opened.wait("return document.querySelectorAll('.card').length === 8")
    assert opened.run("return document.getElementById('show-tokens').checked") is False
    opened.find("#show-tokens").click()
    assert opened.count(".query .t") == 4


def test_without_tokens_there_is_no_switch(opened):
    opened.go("queries/1")
    opened.wait("return document.querySelector('.query h2')?.innerText === 'Query 1'")
    assert opened.count("#show-tokens") == 0
    assert opened.count(".t") == 0
    assert opened.texts(".query .exchange .text") == ["Why?", "Because of rain."]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_on_its_marks_is_readable(page, told, scheme):
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    try:
        page.open((told / "index.html").as_uri(), "queries/0")
        page.wait("return document.querySelectorAll('.card').length === 8")
        for selector in (".query .t.pro[style*='1.000']", ".card .t.con[style*='1.000']", "p.tokens .t.pro",
                         "p.tokens .t.con", ".trust a", ".lexical", ".exchange h3"):  # fmt: skip
            assert contrast(page, selector) >= 4.5, selector
        keys(page, ".query .tokens", RIGHT)
        assert contrast(page, ".tip") >= 4.5
    finally:
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_what_scores_mean_is_said_with_links(opened):
    said = opened.text(".trust")
    outside = opened.run("return ooc.load('queries-0').then((file) => file.queries[0].outside)")
    assert f"{100 * (1 - outside):.0f} % of its gradient’s energy" in said
    assert "all 60 rows were scored" in said
    links = opened.run("return [...document.querySelectorAll('.trust a')].map((own) => own.getAttribute('href'))")
    assert links[0] == "#/store/inside"
    assert links[-2:] == ["#/store/damping", "#/store/recall"]
    for link in links:
        opened.go(link.removeprefix("#/"))
        opened.wait("return document.activeElement.id === arguments[0]", f"reading-{link.split('/')[-1]}")


def test_on_a_narrow_screen_the_query_comes_first(page, told):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.open((told / "index.html").as_uri(), "queries/0")
        page.wait("return document.querySelectorAll('.card').length === 8")
        edges = "return document.querySelector(arguments[0]).getBoundingClientRect()"
        assert page.run(edges, ".proponents .card .score")["bottom"] < 844  # the answer, and who is behind it
        assert page.run(edges, ".list")["height"] == 0
        assert page.run("return document.documentElement.scrollWidth") == 390
        page.find(".side .fold").click()
        page.wait("return document.querySelectorAll('.line-of-list').length === 3")
        page.run("document.querySelector('#query-1').click()")
        page.wait("return document.querySelector('.query h2')?.innerText === 'Query 1'")
        assert page.run(edges, ".list")["height"] == 0
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_pages_of_tokens_need_their_folder_alone(opened, told, tmp_path):
    shutil.copytree(told, tmp_path / "moved")
    opened.open((tmp_path / "moved" / "index.html").as_uri(), "queries/0")
    opened.wait("return document.querySelectorAll('.query .t').length === 4")
    assert all(address.startswith(("file://", "about:")) for address in opened.requests())
