// Loads data from beside the page, makes elements. Text reaches the document as text only, never as markup.
"use strict";

const ooc = (() => {
  const received = new Map();
  const waiting = new Map();
  const views = new Map();
  const KEPT = 60; // files of queries held at a time

  // The one way to a script's address: a data file of this page. Where Trusted Types are known, nothing else can load.
  const only = (address) => {
    if (!/^data\/[a-z]+(-\d+)?\.js$/.test(address)) throw new TypeError(`no data file: ${address}`);
    return address;
  };
  const policy = window.trustedTypes
    ? window.trustedTypes.createPolicy("ooc", { createScriptURL: only })
    : { createScriptURL: only };

  function receive(name, value) {
    received.set(name, value);
  }

  function load(name) {
    if (!waiting.has(name)) {
      waiting.set(name, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.onload = () => {
          script.remove();
          if (!received.has(name)) return reject(new Error(`data/${name}.js holds something else`));
          return resolve(received.get(name));
        };
        script.onerror = () => {
          script.remove();
          waiting.delete(name);
          reject(new Error(`data/${name}.js is missing: keep the folder together`));
        };
        script.src = policy.createScriptURL(`data/${name}.js`);
        document.head.append(script);
      }));
      forget();
    }
    return waiting.get(name);
  }

  function drop(name) {
    waiting.delete(name);
    received.delete(name);
  }

  function forget() {
    const names = [...waiting.keys()].filter((name) => name.startsWith("queries-"));
    for (const name of names.slice(0, Math.max(0, names.length - KEPT))) drop(name);
  }

  function fill(node, properties, children) {
    for (const [name, value] of Object.entries(properties || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "text") node.textContent = value;
      else if (name === "on") for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
      else if (name === "vars") for (const [key, own] of Object.entries(value)) node.style.setProperty(`--${key}`, own);
      else if (["value", "checked", "disabled", "selected"].includes(name)) node[name] = value;
      else node.setAttribute(name, value === true ? "" : String(value));
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
    return node;
  }

  const el = (tag, properties, ...children) => fill(document.createElement(tag), properties, children);
  const svg = (tag, properties, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), properties, children);

  function number(value, digits = 3) {
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1000 && size < 1e7) return Math.round(value).toLocaleString("en").replace("-", "−");
    if (Number.isInteger(value) && size < 1e7) return String(value).replace("-", "−");
    const text = size >= 1e5 || size < 1e-3 ? value.toExponential(digits - 1) : value.toPrecision(digits);
    return text.replace("-", "−").replace("e+", "e");
  }

  const signed = (value) => (value > 0 ? "+" : "") + number(value);
  const count = (value, noun, many = `${noun}s`) =>
    `${Number.isInteger(value) ? value.toLocaleString("en") : number(value)} ${value === 1 ? noun : many}`;
  const say = (text) => { document.getElementById("status").textContent = text; };

  // A choice among named values, with its label.
  function choice(label, options, value, act) {
    const select = el("select", { "aria-label": label, on: { change: (event) => act(event.target.value) } },
      options.map(([key, text]) => el("option", { value: key, text, selected: key === value })));
    return el("label", { class: "field" }, el("span", { text: label }), select);
  }

  function field(label, properties, act) {
    const input = el("input", { autocomplete: "off", spellcheck: "false", ...properties,
      on: { input: (event) => act(event.target.value) } });
    return el("label", { class: "field" }, el("span", { text: label }), input);
  }

  // What may be wider or higher than its place, with a name, and in reach of the keys that scroll it.
  const scrolled = (name, content) => el("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": name }, content);

  // A button that unfolds what comes after it in its parent, on narrow screens alone (report.css).
  function fold(text) {
    const button = el("button", { type: "button", class: "fold", "aria-expanded": "false", text,
      on: { click: () => button.setAttribute("aria-expanded", String(button.getAttribute("aria-expanded") !== "true")) } });
    return button;
  }

  function later(act, wait = 120) {
    let timer = 0;
    return (...given) => {
      clearTimeout(timer);
      timer = setTimeout(() => act(...given), wait);
    };
  }

  // Kept in the browser where it allows that; a page from disk may not.
  const memory = new Map();
  function recall(key) {
    try { return JSON.parse(localStorage.getItem(key)) ?? memory.get(key); } catch { return memory.get(key); }
  }
  function keep(key, value) {
    memory.set(key, value);
    try { localStorage.setItem(key, JSON.stringify(value)); return true; } catch { return false; }
  }

  return { receive, load, drop, el, svg, number, signed, count, say, choice, field, fold, scrolled, later, recall, keep, views, index: null };
})();
