// A live page only (ooc-influence serve): a new query, its progress, its proponents.
"use strict";

(() => {
  const { el } = ooc;
  const NAMES = { text: "Text of the new query", prompt: "Prompt", completion: "Completion (its loss alone counts)", label: "Label" };
  let last = null, asked = {};

  async function call(address, options = {}) {
    const answer = await fetch(address, { credentials: "omit", cache: "no-store", ...options });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error || `the server answered ${answer.status}`);
    return found;
  }

  const post = (address, values) => call(address, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(values) });

  const halt = (job) => post("api/stop", { job });

  // mine: { job, stopped }, the server's name of the query once it is known, and whether Stop was pressed before that.
  async function run(values, tell, mine) {
    let job = await post("api/query", values);
    mine.job = job.job;
    if (mine.stopped) await halt(mine.job);
    while (job.state === "waiting" || job.state === "running") {
      tell(job);
      await new Promise((resolve) => { setTimeout(resolve, 250); });
      job = await call(`api/jobs/${job.job}`);
    }
    if (job.state !== "done") throw new Error(job.error || "stopped");
    return job;
  }

  // What is said of a job that waits or runs.
  function stage(job) {
    const of = job.total ? ` ${job.done.toLocaleString("en")} of ${ooc.count(job.total, "row")}` : "";
    const waiting = job.ahead ? `waiting for ${ooc.count(job.ahead, "query", "queries")} before this one` : "starting…";
    return job.state === "waiting" ? waiting : `${job.stage}${of}`;
  }

  // A button that has the tokens of a stored query computed, and calls `done` once the query has them.
  function tokens(query, done) {
    const told = el("span", { class: "quiet small", role: "status" });
    const button = el("button", { type: "button", id: "compute-tokens", text: "Show tokens", on: { click: async () => {
      button.disabled = true;
      try {
        const job = await run({ stored: query.number }, (seen) => { told.textContent = stage(seen); }, {});
        Object.assign(query, job.result);
        ooc.tokens.show();
        done();
      } catch (error) {
        told.textContent = error.message;
        button.disabled = false;
      }
    } } });
    return el("div", { class: "check" }, button, told);
  }

  ooc.ask = { name: "Ask", tokens, open(main) {
    const { model, fields } = ooc.index.ask;
    const inputs = Object.fromEntries(fields.map((name) => [name, name === "label"
      ? el("input", { id: "ask-label", type: "text", list: "known-labels", autocomplete: "off" })
      : el("textarea", { id: `ask-${name}`, rows: name === "completion" ? 4 : 6, spellcheck: "false" })]));
    for (const [name, own] of Object.entries(asked)) if (inputs[name]) inputs[name].value = own;
    const bar = el("progress", { id: "progress", hidden: true, "aria-label": "Progress" });
    const told = el("p", { class: "quiet", "aria-live": "polite" });
    const button = el("button", { type: "submit", class: "main", text: "Find its proponents" });
    const stop = el("button", { type: "button", text: "Stop", disabled: true, on: { click: async () => {
      stop.disabled = true;
      mine.stopped = true;
      if (mine.job) await halt(mine.job).catch((error) => { told.textContent = error.message; });
    } } });
    const result = el("div", { id: "answer" });
    let mine = {};
    const show = () => {
      if (last) result.replaceChildren(ooc.cards.detail(last.query, last.examples, el("h2", {}, el("span", { class: "quiet", text: "Query " }), "as typed")));
    };
    const tell = (job) => {
      told.textContent = stage(job);
      if (job.total) {
        bar.max = job.total;
        bar.value = job.done;
      } else bar.removeAttribute("value");
    };
    const form = el("form", { on: { submit: async (event) => {
      event.preventDefault();
      if (button.disabled) return;
      button.disabled = true;
      stop.disabled = bar.hidden = false;
      result.replaceChildren();
      mine = {};
      try {
        const began = performance.now();
        asked = Object.fromEntries(Object.entries(inputs).map(([name, own]) => [name, own.value]));
        const job = await run(asked, tell, mine);
        last = job.result;
        told.textContent = `${((performance.now() - began) / 1000).toFixed(1)} seconds`;
        show();
      } catch (error) {
        told.textContent = "";
        result.replaceChildren(el("p", { class: "notice", role: "alert", text: error.message }));
      }
      button.disabled = false;
      stop.disabled = bar.hidden = true;
    } } }, fields.map((name) => el("label", { class: "field" }, el("span", { text: NAMES[name] }), inputs[name])), el("div", { class: "row" }, button, stop, bar), told);
    main.replaceChildren(el("div", { class: "page ask" }, el("h2", { text: "Ask" }),
      el("p", { class: "lead", text: `What is typed becomes a query: its gradient is computed by ${model} and scored against ${ooc.index.rows === 1 ? "the row" : `the ${ooc.count(ooc.index.rows, "row")}`} of the store.` }),
      el("datalist", { id: "known-labels" }, ooc.index.labels.map((value) => el("option", { value }))), form, result));
    show();
    inputs[fields[0]].focus();
  } };
})();
