// The list of queries, of which only what is seen is in the document, and the one chosen.
"use strict";

ooc.views.set("queries", (() => {
  const { el, number, signed } = ooc;
  const ROW = 62; // pixels of a line, as in report.css
  const ORDERS = {
    number: ["as in the store", (a, b) => a.number - b.number],
    best: ["strongest proponent", (a, b) => (b.best ?? -Infinity) - (a.best ?? -Infinity)],
    worst: ["strongest opponent", (a, b) => (a.worst ?? Infinity) - (b.worst ?? Infinity)],
    loss: ["loss, highest", (a, b) => (b.loss ?? -Infinity) - (a.loss ?? -Infinity)],
    low: ["loss, lowest", (a, b) => (a.loss ?? Infinity) - (b.loss ?? Infinity)],
    id: ["id", (a, b) => a.id.localeCompare(b.id, "en", { numeric: true })],
  };
  const state = { find: "", order: "number", label: "", source: "" };
  let all = null;
  let shown = [];
  let chosen = 0;
  let list, inner, pane, count, unfold;
  let texts = "unread"; // or "reading", "read", or what went wrong

  // What is searched: white space counts as one blank, as in the texts of the list.
  const plain = (value) => String(value ?? "").replace(/\s+/g, " ").toLowerCase();
  const searched = (line, text) => [line.id, text, line.label, line.source].map(plain).join("\n");

  async function read() {
    const { queries, sizes } = ooc.index;
    const files = Math.ceil(queries.count / sizes.list);
    const parts = await Promise.all(Array.from({ length: files }, (_, place) => ooc.load(`list-${place}`)));
    return parts.flat().map(([id, text, label, source, loss, best, worst, image, dropped], place) =>
      ({ number: place, id, text, label, source, loss, best, worst, image, dropped, words: searched({ id, label, source }, text) }));
  }

  // The list holds the beginnings of long texts; the whole ones are read when somebody searches.
  async function readTexts() {
    texts = "reading";
    try {
      for (let place = 0; place < ooc.index.texts; place += 1) {
        const name = `texts-${place}`;
        for (const [query, text] of await ooc.load(name)) all[query].words = searched(all[query], text);
        ooc.drop(name);
      }
      texts = "read";
    } catch (error) {
      texts = error.message;
    }
    if (count.isConnected) select();
  }

  function values(name) {
    const found = [...new Set(all.map((line) => line[name]).filter((value) => value !== null))];
    return found.length > 1 && found.length <= 500 ? found.sort((a, b) => a.localeCompare(b, "en", { numeric: true })) : [];
  }

  function select() {
    const words = plain(state.find.trim());
    if (words && texts === "unread") readTexts();
    shown = all.filter((line) => (!words || line.words.includes(words))
      && (!state.label || line.label === state.label) && (!state.source || line.source === state.source));
    if (state.order !== "number") shown.sort(ORDERS[state.order][1]);
    inner.style.height = `${shown.length * ROW}px`;
    const found = (shown.length === all.length ? "" : `${number(shown.length)} of `) + ooc.count(all.length, "query", "queries");
    const still = !words || texts === "read" ? "" : texts === "reading" ? ", searching…" : `, in the beginnings of texts alone: ${texts}`;
    count.textContent = found + still;
    list.scrollTop = Math.max(0, shown.findIndex((line) => line.number === chosen) * ROW - 2 * ROW);
    paint();
  }

  function paint() {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
    const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 4);
    const lines = [];
    for (let place = first; place < last; place += 1) lines.push(option(shown[place], place));
    inner.replaceChildren(...lines);
    const here = shown.slice(first, last).some((line) => line.number === chosen);
    if (here) list.setAttribute("aria-activedescendant", `query-${chosen}`);
    else list.removeAttribute("aria-activedescendant");
  }

  function option(line, place) {
    const node = el("div", { role: "option", id: `query-${line.number}`, class: "line-of-list", "aria-selected": String(line.number === chosen),
      "aria-setsize": shown.length, "aria-posinset": place + 1, on: { click: () => { unfold.setAttribute("aria-expanded", "false"); choose(line.number); } } },
    line.image ? el("img", { src: line.image, alt: "", loading: "lazy" }) : null,
    el("div", { class: "first" }, el("code", { text: line.id }),
      line.label === null ? null : el("span", { class: "chip", text: line.label }),
      el("span", { class: `best${line.best === null ? "" : " pro"}`, text: line.dropped ? "dropped" : line.best === null ? "no proponent" : signed(line.best) })),
    el("div", { class: "second", dir: "auto", text: line.text || (line.source ?? `loss ${number(line.loss)}`) }));
    node.style.top = `${place * ROW}px`;
    return node;
  }

  function choose(query, quiet = false) {
    chosen = query;
    if (!quiet) history.replaceState(null, "", `#/queries/${query}`);
    paint();
    show();
  }

  const show = ooc.later(async () => {
    const size = ooc.index.sizes.queries, wanted = chosen;
    try {
      const file = await ooc.load(`queries-${Math.floor(wanted / size)}`);
      if (wanted !== chosen || !pane.isConnected) return;
      const query = file.queries[wanted % size];
      const heading = el("h2", { tabindex: "-1" }, el("span", { class: "quiet", text: "Query " }), query.id);
      pane.replaceChildren(ooc.cards.detail(query, file.examples, heading));
      pane.scrollTop = 0;
      ooc.say(`Query ${query.id}`);
    } catch (error) {
      pane.replaceChildren(el("p", { class: "notice", role: "alert", text: error.message }));
    }
  }, 30);

  function move(event) {
    const place = shown.findIndex((line) => line.number === chosen);
    const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
    const steps = { ArrowDown: place + 1, ArrowUp: place - 1, PageDown: place + page, PageUp: place - page, Home: 0, End: shown.length - 1 };
    if (event.key === "Enter") {
      pane.querySelector("h2")?.focus();
      return;
    }
    if (!(event.key in steps) || !shown.length) return;
    event.preventDefault();
    const next = Math.min(shown.length - 1, Math.max(0, steps[event.key]));
    if (next * ROW < list.scrollTop) list.scrollTop = next * ROW;
    if ((next + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (next + 1) * ROW - list.clientHeight;
    choose(shown[next].number);
  }

  async function open(main, rest) {
    if (!ooc.index.queries) {
      main.replaceChildren(el("div", { class: "page" }, el("h2", { text: "Queries" }),
        el("p", { class: "quiet", text: "This report was written without queries (--queries)." })));
      return;
    }
    all = all || await read();
    chosen = Math.min(all.length - 1, Math.max(0, Number.parseInt(rest, 10) || 0));
    inner = el("div", { class: "inner", role: "presentation" });
    list = el("div", { class: "list", role: "listbox", tabindex: "0", "aria-label": "Queries", on: { keydown: move, scroll: () => requestAnimationFrame(paint) } }, inner);
    count = el("p", { class: "quiet", id: "query-count", "aria-live": "polite" });
    pane = el("div", { class: "pane", id: "pane" });
    unfold = ooc.fold(`Choose among ${ooc.count(all.length, "query", "queries")}`);
    const set = (name) => (value) => { state[name] = value; select(); };
    const chooser = (name, label) => {
      const found = values(name);
      return found.length ? ooc.choice(label, [["", "all"], ...found.map((value) => [value, value])], state[name], set(name)) : null;
    };
    main.replaceChildren(el("div", { class: "queries" },
      el("section", { class: "side", "aria-label": "Choose a query" }, unfold,
        ooc.field("Search queries", { type: "search", id: "search", value: state.find }, ooc.later(set("find"))),
        el("div", { class: "row" }, ooc.choice("Sort", Object.entries(ORDERS).map(([key, own]) => [key, own[0]]), state.order, set("order")),
          chooser("label", "Label"), chooser("source", "Source")),
        count, list),
      pane));
    select();
    new ResizeObserver(() => list.isConnected && paint()).observe(list);
    show();
  }

  return { name: "Queries", open };
})());
