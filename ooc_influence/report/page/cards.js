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
    if (!example.image) return example.unseen ? el("p", { class: "quiet", text: example.unseen }) : null;
    const picture = el("img", { src: example.image, alt: `Image of ${kind} ${example.id}`, loading: "lazy" });
    picture.addEventListener("load", () => picture.classList.toggle("pixels", picture.naturalWidth < 96));
    return el("div", { class: "picture" }, picture);
  }

  const fact = (name, value, title) =>
    (value === null || value === undefined ? null
      : el("div", { class: "fact", title }, el("dt", { text: name }), el("dd", { text: value })));

  function facts(example, extra = []) {
    const more = Object.entries(example.more || {}).map(([name, value]) => fact(name === "n_tokens" ? "tokens" : name.replaceAll("_", " "), String(value)));
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
    return el("span", { class: "lexical", title: "rank of the document for the query's words, among all documents",
      text: rank === null || rank === undefined ? "BM25: no word in common" : `BM25 rank ${number(rank)}` });
  }

  // The text of an example or a query: token by token where that is known and asked for.
  function passage(example, own, limit) {
    if (!own) return text(example, limit);
    if (ooc.tokens.shown()) {
      const parts = split(example), from = parts && ooc.tokens.answerFrom(own, parts.answer);
      return from ? el("div", { class: "exchange" }, el("div", { class: "lead-in" }, text({ text: parts.question, cut: 0 })), ooc.tokens.text(own, example.id, from))
        : ooc.tokens.text(own, example.id);
    }
    return text(example.text === null || example.text === undefined ? { text: ooc.tokens.joined(own.pieces), cut: 0 } : example, limit);
  }

  // A text's question and its answer; null where it has none.
  function split(example) {
    if (example.answer === null || example.answer === undefined || !example.text) return null;
    return { question: example.text.slice(0, example.answer).trim(), answer: example.text.slice(example.answer).trim() };
  }

  // The question of a query and its answer, of which each has a heading; or its text.
  function asked(query) {
    const own = ooc.tokens.shown() && query.tokens ? query.tokens.query : null;
    const parts = split(query), from = parts && own ? ooc.tokens.answerFrom(own, parts.answer) : 0;
    if (!parts || (own && !from)) return passage(query, query.tokens && query.tokens.query, 1200);
    return el("div", { class: "exchange" }, el("h3", { text: "Question" }), text({ text: parts.question, cut: 0 }),
      el("h3", { text: "Answer" }), own ? ooc.tokens.text(own, `the answer of ${query.id}`, from) : text({ text: parts.answer, cut: query.cut }, 1200));
  }

  const percent = (share) => {
    const value = 100 * share;
    return `${value > 99 && value < 100 ? value.toFixed(1) : value.toFixed(0)} %`;
  };

  // What scores mean, and what is known of how far they reach here; each fact leads to where it is explained.
  function trust(query) {
    const { settings, rows, facts: store } = ooc.index;
    const link = (place, said) => el("a", { href: `#/${place}`, text: said });
    const found = [];
    const inside = query.outside === null || query.outside === undefined ? null : 1 - query.outside;
    if (inside !== null) found.push([link("store/inside", `${percent(inside)} of its gradient’s energy`), " is within reach of the training rows"]);
    const { verification } = store;
    if (verification) {
      found.push(verification.checked ? [link("store/verified", `${percent(verification.share)} of the parameters`), " were verified against autograd"]
        : [link("store/verified", "gradients"), " were not compared with autograd"]);
    }
    if (settings.lambda !== null) {
      found.push([link("store/damping", settings.damping === null || settings.damping === undefined ? "damping" : `damping ${settings.damping}`), ` is λ = ${number(settings.lambda)}`]);
    } else if (!settings.curvature) found.push([link("store/damping", "no curvature"), " was used"]);
    found.push([link("store/recall", rows === 1 ? "the one row" : `all ${ooc.count(rows, "row")}`), rows === 1 ? " was scored" : " were scored"]);
    const listed = found.flatMap((parts, place) => [place === 0 ? "" : place === found.length - 1 ? ", and " : ", ", ...parts]);
    return el("p", { class: "trust" }, "A score estimates how much training on a row lowered (▲) or raised (▼) this query’s loss. ",
      inside !== null && inside < 0.5 ? el("strong", { text: "Read these with care: most of the query is beyond what the rows can explain. " }) : null,
      "To judge them here: ", listed, ".");
  }

  function card(example, value, rank, largest, query) {
    const own = query && query.tokens ? query.tokens.rows[example.row] : null;
    const other = query && query.label !== null && query.label !== undefined && example.label !== query.label;
    return el("li", {}, el("article", { class: "card", "aria-label": `${value >= 0 ? "Proponent" : "Opponent"} ${rank}: ${example.id}` },
      el("div", { class: "head" }, el("span", { class: "rank", text: String(rank) }), score(value, largest),
        el("code", { class: "id", text: example.id, title: `row ${example.row}` }),
        lexical(query && query.bm25, example.row),
        example.label === null ? null : el("span", { class: `chip${other ? " other" : ""}`,
          title: other ? "another label than the query's" : null,
          text: `${other ? "≠ " : ""}${example.label}` }),
        example.source === null ? null : el("span", { class: "chip", title: "source", text: example.source }),
        example.dropped ? el("span", { class: "chip other", text: "dropped" }) : null),
      el("div", { class: "body" }, image(example, "example"), el("div", { class: "said" }, passage(example, own),
        facts({ ...example, label: null, source: null, norm: null }, [fact("self-influence", number(example.self))])))));
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
    const said = el("div", { class: "said" });
    const tokens = query.tokens;
    const say = () => {
      const marked = tokens && ooc.tokens.shown();
      const listed = marked ? Object.keys(tokens.rows).filter((row) => query.proponents.some((pair) => pair[0] === Number(row))).length : 0;
      said.replaceChildren(...[asked(query), marked && listed
        ? el("p", { class: "quiet small", text: `Marked: shares in the scores of the ${listed === 1 ? "strongest proponent" : `${listed} strongest proponents`}, ${signed(ooc.tokens.total(tokens.query))} together` }) : null,
      query.no_tokens ? el("p", { class: "quiet small", text: `Not shown token by token: ${query.no_tokens}` }) : null,
      facts(query)].filter(Boolean));
    };
    const redraw = () => { say(); draw(); };
    redraw();
    const set = (name) => (value) => { view[name] = value; draw(); };
    const labels = [["all", "all labels"], ["same", "the query's label"], ["other", "another label"]];
    const orders = [["score", "score"], ["loss", "loss, highest"], ["self", "self-influence, highest"]];
    const ask = !tokens && !query.no_tokens && ooc.index.ask?.tokens
      ? ooc.ask.tokens(query, () => { if (node.isConnected) node.replaceWith(detail(query, examples, heading)); }) : null;
    const node = el("div", { class: "detail" },
      el("div", { class: "query" }, heading, el("div", { class: "body" }, image(query, "query"), said), groupBars(query.groups)),
      trust(query),
      el("div", { class: "tools" }, ooc.fold("Filter and order"),
        ooc.field("Filter examples", { type: "search", value: view.find, class: "examples-filter" }, ooc.later(set("find"))),
        ooc.choice("Order", orders, view.order, set("order")),
        query.label === null || query.label === undefined ? null : ooc.choice("Labels", labels, view.label, set("label")),
        tokens ? ooc.tokens.toggle(redraw) : ask,
        legend(largest), tokens ? ooc.tokens.key() : null),
      columns);
    return node;
  }

  return { detail, text, image, score, fact, facts, legend };
})();
