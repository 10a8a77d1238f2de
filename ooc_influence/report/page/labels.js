// Suspected label errors: ranked, ticked, noted, exported as the file that `ooc-influence drop --from` reads.
"use strict";

ooc.views.set("labels", (() => {
  const { el, number } = ooc;
  const PAGE = 50;
  const ORDERS = {
    self: ["self-influence", (a, b) => a.selfRank - b.selfRank],
    loss: ["loss", (a, b) => a.lossRank - b.lossRank],
    both: ["both", (a, b) => a.selfRank + a.lossRank - b.selfRank - b.lossRank],
    norm: ["gradient norm", (a, b) => (b.norm ?? 0) - (a.norm ?? 0)],
  };
  const FIELDS = ["row", "id", "action", "label", "new_label", "note"];
  const state = { find: "", order: "self", label: "", only: "all", page: 0 };
  let all = null, marks = {}, kept = true, labelled = true;
  let body, count, pager, exported;

  const key = () => `ooc-influence/${ooc.index.identity}/labels`;

  async function read() {
    const { suspects, sizes } = ooc.index;
    const files = Math.max(1, Math.ceil(suspects / sizes.suspects));
    const parts = await Promise.all(Array.from({ length: files }, (_, place) => ooc.load(`suspects-${place}`)));
    const found = parts.flat();
    for (const [name, value] of [["selfRank", "self"], ["lossRank", "loss"]]) {
      [...found].sort((a, b) => (b[value] ?? 0) - (a[value] ?? 0) || a.row - b.row).forEach((row, place) => { row[name] = place + 1; });
    }
    return found;
  }

  // Ticks and notes by row; a mark without a tick or a note is forgotten.
  function mark(row, change) {
    const own = { ticked: false, action: "drop", new_label: "", note: "", ...marks[row], ...change };
    if (own.ticked || own.note || own.new_label) marks[row] = own;
    else delete marks[row];
    kept = ooc.keep(key(), marks);
    told();
    return own;
  }

  function chosen() {
    return all.filter((row) => marks[row.row]?.ticked).sort((a, b) => a.row - b.row);
  }

  function select() {
    const words = state.find.trim().toLowerCase();
    return all.filter((row) => {
      if (state.label && row.label !== state.label) return false;
      if (state.only === "ticked" && !marks[row.row]?.ticked) return false;
      if (state.only === "open" && marks[row.row]) return false;
      return !words || `${row.id}\n${row.label}\n${row.source}\n${row.text || ""}\n${marks[row.row]?.note || ""}`.toLowerCase().includes(words);
    }).sort(ORDERS[state.order][1]);
  }

  function draw() {
    const rows = select();
    const pages = Math.max(1, Math.ceil(rows.length / PAGE));
    state.page = Math.min(state.page, pages - 1);
    const part = rows.slice(state.page * PAGE, (state.page + 1) * PAGE);
    body.replaceChildren(...part.map(line));
    count.textContent = `${number(rows.length)} of ${ooc.count(all.length, "suspect")} among ${ooc.count(ooc.index.rows, "row")}`;
    const go = (text, page, enabled) => el("button", { type: "button", text, disabled: !enabled, on: { click: () => {
      state.page = page;
      draw();
      body.closest("table").scrollIntoView();
    } } });
    pager.replaceChildren(go("Previous", state.page - 1, state.page > 0),
      el("span", { text: `page ${state.page + 1} of ${pages}` }), go("Next", state.page + 1, state.page < pages - 1),
      el("button", { type: "button", text: "Tick this page", on: { click: () => { for (const row of part) mark(row.row, { ticked: true }); draw(); } } }));
    told();
  }

  function line(row) {
    const own = marks[row.row] || { ticked: false, action: "drop", new_label: "", note: "" };
    const named = (what) => `${what} ${row.id}`;
    const wanted = el("input", { type: "text", list: "known-labels", value: own.new_label, "aria-label": named("New label of"), placeholder: "new label",
      disabled: own.action !== "relabel", hidden: !labelled, on: { input: (event) => mark(row.row, { new_label: event.target.value }) } });
    const tick = el("input", { type: "checkbox", checked: own.ticked, "aria-label": named("Tick"), on: { change: (event) => {
      mark(row.row, { ticked: event.target.checked });
      node.classList.toggle("ticked", event.target.checked);
    } } });
    const action = el("select", { "aria-label": named("What to do with"), on: { change: (event) => {
      mark(row.row, { action: event.target.value, ticked: true });
      tick.checked = true;
      node.classList.add("ticked");
      wanted.disabled = event.target.value !== "relabel";
      if (!wanted.disabled) wanted.focus();
    } } }, (labelled ? ["drop", "relabel"] : ["drop"]).map((value) => el("option", { value, text: value, selected: value === own.action })));
    const largest = ooc.index.largest;
    const meter = (name, value, most) => el("td", { class: "number", "data-name": name }, el("span", { text: number(value) }),
      el("span", { class: "meter", "aria-hidden": "true", vars: { share: most > 0 ? Math.min(1, (value ?? 0) / most).toFixed(3) : 0 } }));
    const node = el("tr", { class: own.ticked ? "ticked" : null, id: `suspect-${row.row}` },
      el("td", { class: "tick" }, tick),
      el("th", { scope: "row", class: "what" }, el("div", { class: "head" }, el("code", { class: "id", text: row.id, title: `row ${row.row}` }),
        row.source === null ? null : el("span", { class: "quiet", text: row.source }),
        row.dropped ? el("span", { class: "chip other", text: "dropped" }) : null),
      el("div", { class: "body" }, ooc.cards.image(row, "example"), ooc.cards.text(row, 240))),
      labelled ? el("td", {}, row.label === null ? "–" : el("span", { class: "chip", text: row.label })) : null,
      meter("self-influence", row.self, largest.self), meter("loss", row.loss, largest.loss), meter("gradient norm", row.norm, largest.norm),
      el("td", { class: "do" }, el("div", { class: "pair" }, action, wanted), el("input", { type: "text", value: own.note, "aria-label": named("Note on"), placeholder: "note",
        on: { input: ooc.later((event) => mark(row.row, { note: event.target.value }), 0) } })));
    return node;
  }

  function told() {
    const rows = chosen();
    const drop = rows.filter((row) => marks[row.row].action === "drop").length;
    exported.textContent = `${number(rows.length)} ticked${labelled ? `: ${number(drop)} to drop, ${number(rows.length - drop)} to relabel` : ""}`
      + (kept ? "" : ". This browser keeps nothing for pages from disk: export before you close it.");
  }

  const record = (row) => {
    const own = marks[row.row];
    return { row: row.row, id: row.id, action: own.action, label: row.label, new_label: own.action === "relabel" ? own.new_label : "", note: own.note };
  };

  // A cell that a spreadsheet would take for a formula gets an apostrophe in front, which `drop` takes off again.
  function cell(value) {
    const text = value === null || value === undefined ? "" : String(value);
    const safe = /^['=+\-@\t\r]/.test(text) && typeof value !== "number" ? `'${text}` : text;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  }

  function file(kind) {
    const records = chosen().map(record);
    if (kind === "jsonl") return records.map((own) => `${JSON.stringify(own)}\n`).join("");
    return [FIELDS, ...records.map((own) => FIELDS.map((name) => own[name]))].map((row) => `${row.map(cell).join(",")}\r\n`).join("");
  }

  function save(kind) {
    const blob = new Blob([file(kind)], { type: kind === "csv" ? "text/csv;charset=utf-8" : "application/jsonl" });
    const address = URL.createObjectURL(blob);
    const link = el("a", { href: address, download: `label-errors.${kind}` });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
    ooc.say(`Saved label-errors.${kind}`);
  }

  async function open(main) {
    all = all || await read();
    marks = ooc.recall(key()) || {};
    ooc.index.largest = Object.fromEntries(["self", "loss", "norm"].map((name) => [name, Math.max(0, ...all.map((row) => row[name] ?? 0))]));
    body = el("tbody");
    count = el("p", { class: "quiet", "aria-live": "polite" });
    pager = el("div", { class: "pager", role: "group", "aria-label": "Pages of suspects" });
    exported = el("p", { id: "ticked", "aria-live": "polite" });
    const set = (name) => (value) => { state[name] = value; state.page = 0; draw(); };
    labelled = all.some((row) => row.label !== null);
    const labels = [...new Set(all.map((row) => row.label).filter((label) => label !== null))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    const button = (text, kind) => el("button", { type: "button", id: `export-${kind}`, text, on: { click: () => save(kind) } });
    main.replaceChildren(el("div", { class: "page labels" }, el("h2", { text: "Label errors" }),
      el("p", { class: "lead", text: "Rows that the rest of the data does not support have a high self-influence. "
        + `Tick those to drop${labelled ? " or to relabel" : ""}, and export them; ooc-influence drop STORE --from FILE reads the file.` }),
      el("div", { class: "tools" }, ooc.field("Search", { type: "search", value: state.find }, ooc.later(set("find"))),
        ooc.choice("Rank by", Object.entries(ORDERS).map(([name, own]) => [name, own[0]]), state.order, set("order")),
        labels.length > 1 ? ooc.choice("Label", [["", "all"], ...labels.map((label) => [label, label])], state.label, set("label")) : null,
        ooc.choice("Show", [["all", "all"], ["ticked", "ticked"], ["open", "not yet looked at"]], state.only, set("only")),
        el("div", { class: "export" }, exported, button("Export CSV", "csv"), button("Export JSONL", "jsonl"))),
      count,
      el("datalist", { id: "known-labels" }, [...new Set([...ooc.index.labels, ...labels])].map((value) => el("option", { value }))),
      el("div", { class: "whole" }, el("table", { class: "suspects" }, el("caption", { class: "unseen", text: "Suspected label errors" }),
        el("thead", {}, el("tr", {}, ["Tick", "Example", labelled ? "Label" : null, "Self-influence", "Loss", "Gradient norm", "What to do"].filter(Boolean).map((text) => el("th", { scope: "col", text })))), body)),
      pager));
    draw();
  }

  return { name: "Label errors", open, file };
})());
