// Plots as SVG, each with its numbers as a table for those who do not see it.
"use strict";

ooc.draw = (() => {
  const { el, svg, number } = ooc;
  // On a narrow screen drawn small, for its words are not to shrink with it.
  const W = window.innerWidth < 560 ? 340 : 560, H = window.innerWidth < 560 ? 240 : 300;
  const LEFT = 62, RIGHT = 16, TOP = 14, BOTTOM = 42;

  function scale(low, high, from, to, log) {
    const map = log ? Math.log10 : (value) => value;
    const a = map(low), b = map(high) === a ? a + 1 : map(high);
    return (value) => from + ((map(value) - a) / (b - a)) * (to - from);
  }

  function ticks(low, high, log) {
    if (log) {
      const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
      const step = Math.max(1, Math.ceil((last - first + 1) / 6));
      const found = [];
      for (let power = first; power <= last; power += step) found.push(10 ** power);
      return found.length > 1 ? found : [low, high];
    }
    const rough = (high - low || 1) / 5, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((part) => part * power).find((part) => part >= rough);
    const found = [];
    for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) found.push(value);
    return found;
  }

  const power = (value) => (value >= 1e5 || value < 1e-3 ? value.toExponential(0).replace("-", "−").replace("e+", "e") : String(Number(value.toPrecision(2))));

  // The values of an axis with their words: on even axes, as many digits as tell neighbours apart.
  function marked(low, high, log) {
    const found = ticks(low, high, log), step = found[1] - found[0];
    const digits = step > 0 ? Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) : 2;
    const even = (value) => (value === 0 ? "0" : Math.abs(value) >= 1e7 || digits > 6 ? number(value, 3)
      : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace("-", "−"));
    return found.map((value) => [value, log ? power(value) : even(value)]);
  }

  function frame(title, x, y) {
    const at = scale(x.low, x.high, LEFT, W - RIGHT, x.log);
    const up = scale(y.low, y.high, H - BOTTOM, TOP, y.log);
    const node = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title, class: "plot" });
    for (const [value, text] of marked(y.low, y.high, y.log)) {
      node.append(svg("line", { x1: LEFT, x2: W - RIGHT, y1: up(value), y2: up(value), class: "grid" }),
        svg("text", { x: LEFT - 8, y: up(value) + 4, "text-anchor": "end", text }));
    }
    for (const [value, text] of marked(x.low, x.high, x.log)) {
      node.append(svg("line", { x1: at(value), x2: at(value), y1: H - BOTTOM, y2: H - BOTTOM + 4, class: "axis" }),
        svg("text", { x: at(value), y: H - BOTTOM + 18, "text-anchor": "middle", text }));
    }
    node.append(svg("line", { x1: LEFT, x2: W - RIGHT, y1: H - BOTTOM, y2: H - BOTTOM, class: "axis" }),
      svg("text", { x: (LEFT + W - RIGHT) / 2, y: H - 6, "text-anchor": "middle", class: "name", text: x.name }));
    return { node, at, up };
  }

  function line(title, points, x, y, marks = []) {
    const xs = points.map((point) => point[0]), ys = points.map((point) => point[1]);
    const { node, at, up } = frame(title, bounds(x, xs, marks.map((mark) => mark.x)), bounds(y, ys, marks.map((mark) => mark.y)));
    const path = points.map((point, place) => `${place ? "L" : "M"}${at(point[0]).toFixed(1)} ${up(point[1]).toFixed(1)}`);
    node.append(svg("path", { d: path.join(""), class: "line" }));
    const drawn = [];
    for (const mark of marks) drawn.push(place(node, at, up, mark));
    return { node, at, up, marks: drawn };
  }

  // An axis holds all values, and the marks with some room around them: one at its end would look like the axis.
  function bounds(own, values, marks) {
    const reached = marks.filter((value) => Number.isFinite(value) && (value > 0 || !own.log))
      .flatMap((value) => (own.log ? [value / 1.5, value * 1.5] : [value]));
    return { low: Math.min(...values, ...reached), high: Math.max(...values, ...reached), ...own };
  }

  // A mark at y (a horizontal line) or at x and y (a point), with its name beside it; what is outside has an arrow.
  function place(node, at, up, mark) {
    const group = svg("g", { class: `mark ${mark.class || ""}` });
    const label = svg("text", { class: "label" });
    group.append(label);
    node.append(group);
    const shape = svg(mark.x !== undefined && mark.y !== undefined ? "circle" : "line", { r: 5 });
    group.prepend(shape);
    const move = (x, y, text) => {
      label.textContent = text;
      group.toggleAttribute("hidden", x !== undefined && !Number.isFinite(at(x))); // 0 has no place on a logarithmic axis
      if (group.hasAttribute("hidden")) return;
      if (shape.tagName === "circle") {
        shape.setAttribute("cx", at(x));
        shape.setAttribute("cy", up(y));
        const right = at(x) > W - 130; // curves fall: above and to the right of a point there is room
        fillIn(label, { x: at(x) + (right ? 8 : 10), y: Math.max(TOP + 8, up(y) - (right ? 26 : 8)), "text-anchor": right ? "end" : "start" });
      } else {
        const high = Math.min(H - BOTTOM, Math.max(TOP, up(y)));
        const outside = up(y) > H - BOTTOM + 0.5 ? "↓ " : up(y) < TOP - 0.5 ? "↑ " : "";
        label.textContent = outside + text;
        shape.toggleAttribute("hidden", outside !== "");
        fillIn(shape, { x1: LEFT, x2: W - RIGHT, y1: high, y2: high });
        fillIn(label, { x: LEFT + 8, y: high > H - BOTTOM - 20 ? high - 6 : high + 15, "text-anchor": "start" });
      }
    };
    move(mark.x, mark.y, mark.text);
    return move;
  }

  function fillIn(node, values) {
    for (const [name, value] of Object.entries(values)) node.setAttribute(name, value);
  }

  function bars(title, histogram) {
    const { edges, counts, log } = histogram;
    const x = { low: edges[0], high: edges[edges.length - 1], log, name: histogram.name };
    const { node, at, up } = frame(title, x, { low: 0, high: Math.max(1, ...counts), log: false });
    counts.forEach((count, number_) => {
      const left = at(edges[number_]), right = at(edges[number_ + 1]);
      node.append(svg("rect", { x: left + 0.5, width: Math.max(0.5, right - left - 1), y: up(count), class: "bar",
        height: H - BOTTOM - up(count) },
      svg("title", { text: `${number(edges[number_])} to ${number(edges[number_ + 1])}: ${ooc.count(count, "row")}` })));
    });
    return node;
  }

  function numbers(caption, header, rows) {
    return el("details", { class: "numbers" }, el("summary", { text: "Show the numbers" }),
      ooc.scrolled(`${caption} in numbers`, el("table", {}, el("caption", { text: caption }),
        el("thead", {}, el("tr", {}, header.map((text) => el("th", { scope: "col", text })))),
        el("tbody", {}, rows.map((row) => el("tr", {}, row.map((value) => el("td", { text: number(value) }))))))));
  }

  return { line, bars, numbers };
})();
