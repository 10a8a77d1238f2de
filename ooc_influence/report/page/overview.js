// The spectrum with d(λ), histograms, group sums as a heat map, what is in the store.
"use strict";

(() => {
  const { el, number, signed, count } = ooc;

  const page = (title, ...children) => el("div", { class: "page" }, el("h2", { text: title }), children.filter(Boolean));
  const figure = (title, plot, ...more) => el("figure", {}, el("figcaption", { text: title }), plot, more);
  const terms = (pairs) => el("dl", { class: "terms" }, pairs.filter((pair) => pair[1] !== null && pair[1] !== undefined && pair[1] !== "")
    .map(([name, value]) => el("div", {}, el("dt", { text: name }), el("dd", { text: value }))));

  ooc.views.set("spectrum", { name: "Spectrum", open(main) {
    const own = ooc.index.spectrum;
    if (!own || !own.eigenvalues.length) {
      main.replaceChildren(page("Spectrum", el("p", { class: "quiet", text: "These scores are plain dot products of gradients: there is no curvature." })));
      return;
    }
    const points = own.numbers.map((place, at) => [place, own.eigenvalues[at]]);
    const values = ooc.draw.line("Eigenvalues of F by number, both on logarithmic axes", points, { log: true, name: "number of the eigenvalue" },
      { log: true }, [{ y: own.lambda, text: `λ = ${number(own.lambda)}` }]);
    const curve = own.curve.map(([, value, dimension]) => [value, dimension]);
    const dimensions = ooc.draw.line("Effective dimension by damping", curve, { log: true, name: "λ" }, { low: 0 },
      [{ x: own.lambda, y: own.dimension, text: `d(λ) = ${number(own.dimension)}`, class: "used" }, { x: own.lambda, y: own.dimension, text: "", class: "tried" }]);
    const output = el("output", { id: "dimension" });
    const slider = el("input", { type: "range", min: 0, max: own.curve.length - 1, step: 1, "aria-label": "Damping to try" });
    const turn = () => {
      const [factor, value, dimension] = own.curve[slider.value];
      const text = `damping ${number(factor)}: λ = ${number(value)}, d(λ) = ${number(dimension)}`;
      output.textContent = text;
      slider.setAttribute("aria-valuetext", text);
      dimensions.marks[1](value, dimension, "");
      values.marks[0](undefined, value, `λ = ${number(value)}`);
    };
    slider.addEventListener("input", turn);
    const nearest = own.curve.reduce((best, point, at) =>
      (Math.abs(Math.log(point[1] / own.lambda)) < Math.abs(Math.log(own.curve[best][1] / own.lambda)) ? at : best), 0);
    slider.value = nearest;
    main.replaceChildren(page("Spectrum",
      el("p", { class: "lead", text: `The curvature F of ${count(own.facts.rows, "row")}, ${count(own.d, "number")} each: ${count(own.positive, "eigenvalue")} above rounding. `
        + `The scores were computed with λ = ${number(own.lambda)}, which leaves d(λ) = Σ e/(e + λ) = ${count(own.dimension, "direction")}.` }),
      el("div", { class: "figures" },
        figure("Eigenvalues", values.node, ooc.draw.numbers("Eigenvalues", ["number", "eigenvalue"], points)),
        figure("Effective dimension d(λ)", dimensions.node,
          el("label", { class: "field slider" }, el("span", { text: "Try another damping" }), slider), output,
          ooc.draw.numbers("Effective dimension", ["damping", "λ", "d(λ)"], own.curve))),
      terms([["trace", number(own.trace)], ["mean eigenvalue", number(own.mean)], ["largest", number(own.facts.largest_eigenvalue)],
        ["kind", own.facts.kind], ["row weights", own.facts.weights ? own.facts.weights.name : "none"], ["kept at", own.facts.curvature]])));
    output.textContent = `as used: λ = ${number(own.lambda)}, d(λ) = ${number(own.dimension)}`;
  } });

  ooc.views.set("distributions", { name: "Distributions", open(main) {
    main.replaceChildren(page("Distributions",
      el("p", { class: "lead", text: "Of all rows of the store. Long right tails of self-influence are where label errors and outliers are." }),
      el("div", { class: "figures" }, ooc.index.histograms.map((own) => {
        const title = own.name[0].toUpperCase() + own.name.slice(1);
        const q = own.quantiles;
        const summary = q.length ? `median ${number(q[2])}, 5 % below ${number(q[1])}, 5 % above ${number(q[3])}, largest ${number(q[4])}` : "no values";
        const left = [own.zeros ? `${number(own.zeros)} ${own.zeros === 1 ? "is" : "are"} zero` : "", own.missing ? `${number(own.missing)} dropped or missing` : ""].filter(Boolean);
        return figure(title, ooc.draw.bars(`Histogram of ${own.name}: ${summary}`, own),
          el("p", { class: "quiet", text: [summary, ...left].join("; ") + (own.log ? "; logarithmic axis" : "") }),
          ooc.draw.numbers(title, ["from", "to", "rows"], own.counts.map((count, at) => [own.edges[at], own.edges[at + 1], count])));
      }))));
  } });

  const shown = { by: 0, what: "sum" };

  function heat(own) {
    const value = (line, at) => (line[at] === null ? null : shown.what === "sum" ? line[at] : line[at] / Math.max(1, own.counts[at]));
    const largest = Math.max(0, ...own.sums.flatMap((line) => line.map((_, at) => Math.abs(value(line, at) ?? 0))));
    const cells = (line) => line.map((_, at) => {
      const found = value(line, at);
      const share = largest > 0 ? Math.min(1, Math.abs(found ?? 0) / largest) : 0;
      return el("td", { class: found === null ? null : found >= 0 ? "pro" : "con", vars: { share: share.toFixed(3) }, text: found === null ? "–" : signed(found) });
    });
    const side = own.queries_by ? `the queries of each ${own.queries_by}` : "each query";
    return [ooc.cards.legend(largest), ooc.scrolled(`Scores summed by ${own.by}`, el("table", { class: "heat" },
      el("caption", { text: `${shown.what === "sum" ? "Sum" : "Mean"} of scores of training rows by ${own.by}, ${own.queries_by ? "mean over" : "for"} ${side}` }),
      el("thead", {}, el("tr", {}, el("th", { scope: "col", text: "query ╲ training" }),
        own.groups.map((name, at) => el("th", { scope: "col", title: count(own.counts[at], "row"), text: name })))),
      el("tbody", {}, own.sums.map((line, at) => el("tr", {}, el("th", { scope: "row", text: own.queries[at] }), cells(line)))))),
    own.left_out ? el("p", { class: "quiet", text: `${count(own.left_out, "further line")} ${own.left_out === 1 ? "is" : "are"} in the pages of the queries.` }) : null];
  }

  ooc.views.set("groups", { name: "Groups", open(main) {
    const { groups } = ooc.index;
    if (!groups.length) {
      main.replaceChildren(page("Groups", el("p", { class: "quiet", text: ooc.index.queries
        ? "The store has no column label or source of few values: name columns with --by." : "This report was written without queries (--queries)." })));
      return;
    }
    const area = el("div");
    const draw = () => area.replaceChildren(...heat(groups[shown.by]).filter(Boolean));
    main.replaceChildren(page("Groups", el("p", { class: "lead", text: "Which groups of training rows the queries rest on: positive sums lowered their loss." }),
      el("div", { class: "tools" },
        ooc.choice("Training rows by", groups.map((own, at) => [String(at), own.by]), String(shown.by), (value) => { shown.by = Number(value); draw(); }),
        ooc.choice("Values", [["sum", "sum"], ["mean", "mean a row"]], shown.what, (value) => { shown.what = value; draw(); })), area));
    draw();
  } });

  function plain(value) {
    if (value === null || value === undefined) return null;
    if (typeof value === "number") return Number.isInteger(value) ? value.toLocaleString("en") : number(value, 4);
    if (typeof value === "object") return JSON.stringify(value).replaceAll('"', "").replace(/^[{[]|[}\]]$/g, "").replaceAll(",", ", ").replaceAll(":", ": ");
    return String(value);
  }

  // What a reader has to know of scores; a link to `#/store/<name>` leads to each.
  function reading() {
    const { settings, facts, rows, outside } = ooc.index;
    const share = (value) => `${(100 * value).toFixed(1)} %`;
    const verified = facts.verification;
    const unit = { none: "Scores are not normalised.", train: "Scores are divided by the norm of the training row, so that rows of large gradients do not lead every list.",
      cosine: "Scores are divided by the norms of both rows, and are between −1 and 1." }[settings.normalize];
    return [
      ["score", "score", "An estimate, to first order, of how much training on the row lowered the query’s loss (positive: proponents) or raised it (negative: opponents). Scores rank rows of one query; "
        + "they are not probabilities, and a row that is like many others shares its influence with them."],
      ["inside", "share within reach", "The part of a query’s squared gradient that is inside the span of the training rows: the rows can explain that part alone."
        + (outside === null ? "" : ` Median over the queries: ${share(1 - outside)}.`)],
      ["verified", "verified share", !verified ? "The store has no record of a comparison with autograd." : !verified.checked ? "Entries were not compared with autograd."
        : `The share of the trained parameters whose stored entries were compared with autograd’s gradients of the same loss: ${share(verified.share)}. What it leaves out is in “verification” below.`],
      ["damping", "damping", settings.lambda === null ? "There is no curvature: scores are plain dot products of gradients."
        : `λ = ${number(settings.lambda, 5)} is added to every eigenvalue of the curvature. More of it makes scores more like dot products; less lets weak directions, which are noisier, count more.`],
      ["recall", "recall", `Each query was compared with every one of the ${count(rows, "row")} of the store, so the recall of the lists is 100\u00a0%: no stronger row is missing.`],
      ["normalised", "unit", unit ?? null],
      ["lexical", "BM25 rank", "Where a search for the query’s words has the document. A strong row with a poor rank is one that a search would miss."],
      ["tokens", "tokens", "With a model, each token’s share of the score: the score is the sum over the row’s tokens. For a query, the shares are of its strongest proponents’ scores together."],
    ];
  }

  ooc.views.set("store", { name: "Store", open(main, rest) {
    const { facts, layers, curvatures, settings, queries, version, written } = ooc.index;
    const skip = new Set(["store", "writers", "created", "origin", "missing", "bytes"]);
    const lines = Object.entries(facts).filter(([name]) => !skip.has(name)).map(([name, value]) => [name.replaceAll("_", " "), plain(value)]);
    const table = (caption, header, rows) => ooc.scrolled(caption, el("table", {}, el("caption", { text: caption }),
      el("thead", {}, el("tr", {}, header.map((text) => el("th", { scope: "col", text })))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map((value) => el("td", { text: plain(value) })))))));
    const explained = el("dl", { class: "terms reading" }, reading().filter((entry) => entry[2] !== null).map(([name, title, text]) =>
      el("div", { id: `reading-${name}`, tabindex: "-1" }, el("dt", { text: title }), el("dd", {}, text, name === "damping" && ooc.index.spectrum
        ? [" ", el("a", { href: "#/spectrum", text: "Try others on the page Spectrum" }), "."] : null))));
    main.replaceChildren(page("Store", queries || rest ? el("section", {}, el("h3", { text: "How to read the scores" }), explained) : null,
      el("section", {}, el("h3", { text: "What is in it" }), terms([["path", facts.store], ...lines])),
      el("section", {}, el("h3", { text: "How it was made" }), terms(Object.entries({ ...facts.origin, ...facts.created }).map(([name, value]) => [name.replaceAll("_", " "), plain(value)]))),
      el("section", {}, el("h3", { text: "Layers" }), layers.length
        ? table("Layers whose gradients are sampled", Object.keys(layers[0]), layers.map((row) => Object.values(row))) : null),
      el("section", {}, el("h3", { text: "Curvatures" }), terms(Object.entries(curvatures))),
      el("section", {}, el("h3", { text: "This report" }), terms([["queries", queries ? `${count(queries.count, "row")} of ${queries.store}` : "none"],
        ["curvature", settings.curvature || "none: plain dot products"], ["λ", settings.lambda === null ? null : number(settings.lambda, 5)],
        ["normalised", settings.normalize], ["proponents and opponents", String(settings.top)],
        ["median share of a query outside the training spectrum", ooc.index.outside === null ? null : `${(100 * ooc.index.outside).toFixed(1)} %`],
        ["written", `${written} by ooc-influence ${version}`]]))));
    const asked = rest ? explained.querySelector(`[id="reading-${CSS.escape(rest)}"]`) : null;
    if (asked) {
      asked.focus({ preventScroll: true });
      asked.scrollIntoView({ block: "center" });
    }
  } });
})();
