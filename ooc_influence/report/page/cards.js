// Examples as cards, a query with its proponents and opponents.
"use strict";

ooc.cards = (() => {
  const { el, number, signed } = ooc;
  const LONG = 420; // characters that a card shows at first

  function text(example, limit = LONG) {
    if (example.text === null || example.text === undefined) return null;
    const body = el("div", { class: "text", dir: "auto" });
    if (!example.text.length) return el("div", { class: "text quiet", text: "(empty)" });
    if (example.text.length <= limit && !example.cut) {
      body.textContent = example.text;
      return body;
    }
    const short = `${example.text.slice(0, limit).trimEnd()}…`;
    const whole = example.cut ? `${example.text}…\n(${ooc.count(example.cut, "more character")} in the corpus)` : example.text;
    body.textContent = short;
    const button = el("button", { type: "button", class: "more", "aria-expanded": "false", text: "Show all", on: {
      click: () => {
        const open = button.getAttribute("aria-expanded") === "true";
        body.textContent = open ? short : whole;
        button.setAttribute("aria-expanded", String(!open));
        button.textContent = open ? "Show all" : "Show less";
      } } });
    return el("div", {}, body, button);
  }

  function image(example, kind) {
    if (!example.image) return example.unseen ? el("p", { class: "quiet unseen", text: example.unseen }) : null;
    const picture = el("img", { src: example.image, alt: `Image of ${kind} ${example.id}`, loading: "lazy" });
    picture.addEventListener("load", () => picture.classList.toggle("pixels", picture.naturalWidth < 96));
    return el("div", { class: "picture" }, picture);
  }

  const fact = (name, value, title) =>
    (value === null || value === undefined ? null
      : el("div", { class: "fact", title }, el("dt", { text: name }), el("dd", { text: value })));

  function facts(example, extra = []) {
    const more = Object.entries(example.more || {}).map(([name, value]) => fact(name, String(value)));
    return el("dl", { class: "facts" }, fact("label", example.label), fact("source", example.source),
      fact("loss", number(example.loss)), example.norm === null ? null : fact("gradient norm", number(example.norm)), extra, more);
  }

  // A score with its sign, its place on the colour scale and a bar as long as it is strong.
  function score(value, largest) {
    const share = largest > 0 ? Math.min(1, Math.abs(value) / largest) : 0;
    const side = value >= 0 ? "pro" : "con";
    return el("div", { class: `score ${side}`, vars: { share: share.toFixed(3) } },
      el("span", { class: "sign", "aria-hidden": "true", text: value >= 0 ? "▲" : "▼" }),
      el("span", { class: "value", text: signed(value) }),
      el("span", { class: "track", "aria-hidden": "true" }, el("span", { class: "fill" })));
  }

  // Where a search for the query's words has this example's document.
  function lexical(ranks, row) {
    if (!ranks) return null;
    const rank = ranks[row];
    return fact("BM25 rank", rank === null || rank === undefined ? "no word in common" : number(rank),
      "rank of the document for the query's words, among all documents");
  }

  function card(example, value, rank, largest, query) {
    const other = query && query.label !== null && query.label !== undefined && example.label !== query.label;
    return el("li", {}, el("article", { class: "card", "aria-label": `${value >= 0 ? "Proponent" : "Opponent"} ${rank}: ${example.id}` },
      el("div", { class: "head" }, el("span", { class: "rank", text: String(rank) }), score(value, largest),
        el("code", { class: "id", text: example.id, title: `row ${example.row}` }),
        example.label === null ? null : el("span", { class: `chip${other ? " other" : ""}`,
          title: other ? "another label than the query's" : null,
          text: `${other ? "≠ " : ""}${example.label}` }),
        example.dropped ? el("span", { class: "chip other", text: "dropped" }) : null),
      el("div", { class: "body" }, image(example, "example"), el("div", { class: "said" }, text(example),
        facts({ ...example, label: null, norm: null }, [fact("self-influence", number(example.self)), lexical(query && query.bm25, example.row)])))));
  }

  function legend(largest) {
    return el("div", { class: "legend", role: "img",
      "aria-label": `Colour scale from ${signed(-largest)}, opponents, to ${signed(largest)}, proponents` },
    el("span", { text: `▼ ${signed(-largest)}` }), el("span", { class: "ramp" }), el("span", { text: `▲ ${signed(largest)}` }));
  }

  function groupBars(groups) {
    return Object.entries(groups || {}).filter(([, rows]) => rows.length).map(([by, rows]) => {
      const largest = Math.max(...rows.map((row) => Math.abs(row[1] ?? 0)));
      return el("details", { class: "groups" }, el("summary", { text: `Scores summed by ${by}` }),
        el("table", { class: "sums" }, el("thead", {}, el("tr", {}, [by, "sum", "rows"].map((name) => el("th", { scope: "col", text: name })))),
          el("tbody", {}, rows.map(([name, sum, count]) => el("tr", {}, el("th", { scope: "row", text: name }),
            el("td", {}, score(sum ?? 0, largest)), el("td", { text: number(count) }))))));
    });
  }

  const ORDERS = {
    score: () => 0,
    loss: (a, b) => (b.example.loss ?? 0) - (a.example.loss ?? 0),
    self: (a, b) => (b.example.self ?? 0) - (a.example.self ?? 0),
  };
  const view = { find: "", order: "score", label: "all" }; // stays when the next query is shown

  function matches(entry, query) {
    const { example } = entry;
    if (view.label === "same" && example.label !== query.label) return false;
    if (view.label === "other" && example.label === query.label) return false;
    const words = view.find.trim().toLowerCase();
    return !words || `${example.id}\n${example.label}\n${example.source}\n${example.text || ""}`.toLowerCase().includes(words);
  }

  // Why a list is shorter than asked for: it ends where the sign of scores changes.
  function shortage(query, side) {
    const sign = side === "proponents" ? "positive" : "negative", found = query[side].length;
    if (query.dropped) return "None: the query is dropped.";
    if (found >= ooc.index.settings.top) return null;
    return found ? `Only ${ooc.count(found, side.slice(0, -1))}: no other training row has a ${sign} score.`
      : `No ${side}: no training row has a ${sign} score.`;
  }

  // A query and its lists; `examples` by row.
  function detail(query, examples, heading) {
    const lists = { proponents: "Proponents", opponents: "Opponents" };
    const scores = Object.keys(lists).flatMap((side) => query[side].map((pair) => Math.abs(pair[1])));
    const largest = Math.max(0, ...scores);
    const columns = el("div", { class: "columns" });
    const draw = () => {
      columns.replaceChildren(...Object.entries(lists).map(([side, name]) => {
        const entries = query[side].map(([row, value], place) => ({ value, rank: place + 1, example: examples[row] }));
        const shown = entries.filter((entry) => matches(entry, query)).sort(ORDERS[view.order]);
        const short = shortage(query, side);
        const count = shown.length === entries.length ? "" : ` ${shown.length} of ${entries.length}`;
        return el("section", { class: side, "aria-label": name },
          el("h3", {}, el("span", { "aria-hidden": "true", text: side === "proponents" ? "▲ " : "▼ " }), name,
            el("small", { text: side === "proponents" ? " lowered its loss" : " raised its loss" }),
            el("small", { class: "count", text: count })),
          shown.length ? el("ol", {}, shown.map((entry) => card(entry.example, entry.value, entry.rank, largest, query)))
            : entries.length ? el("p", { class: "quiet", text: "None matches the filter." }) : null,
          short ? el("p", { class: "quiet", text: short }) : null);
      }));
    };
    draw();
    const set = (name) => (value) => { view[name] = value; draw(); };
    const labels = [["all", "all labels"], ["same", "the query's label"], ["other", "another label"]];
    const orders = [["score", "score"], ["loss", "loss, highest"], ["self", "self-influence, highest"]];
    return el("div", { class: "detail" },
      el("div", { class: "query" }, heading,
        el("div", { class: "body" }, image(query, "query"), el("div", { class: "said" }, text(query, 1200), facts(query, [fact("outside the training spectrum", query.outside === null || query.outside === undefined ? null
          : `${(100 * query.outside).toFixed(0)} %`, "share of the query's squared gradient outside the span of the training rows")]))),
        groupBars(query.groups)),
      el("div", { class: "tools" },
        ooc.field("Filter examples", { type: "search", value: view.find, class: "examples-filter" }, ooc.later(set("find"))),
        ooc.choice("Order", orders, view.order, set("order")),
        query.label === null || query.label === undefined ? null : ooc.choice("Labels", labels, view.label, set("label")),
        legend(largest)),
      columns);
  }

  return { detail, text, image, score, fact, facts, legend };
})();
