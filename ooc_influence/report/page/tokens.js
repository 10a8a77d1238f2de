// Texts token by token: colour and underline by each token's share of a score; its number under the pointer or by keys.
"use strict";

ooc.tokens = (() => {
  const { el, signed, count } = ooc;
  const KEY = "ooc-influence/tokens";
  const LEVELS = [0.2, 0.5, 0.8]; // of the strongest share: where an underline gets thicker
  const NAMED = 3; // tokens that a reader who does not see colours hears of
  let made = 0, tip = null;

  const strength = (own) => Math.max(0, ...own.pieces.map((piece) => Math.abs(piece[1])));
  const total = (own) => own.pieces.reduce((sum, piece) => sum + piece[1], own.left_out);
  const joined = (pieces) => pieces.map((piece) => piece[0]).join("");

  // A token's text as it is named: what cannot be seen has a word.
  function named(text) {
    const plain = text.trim();
    return plain ? `“\u2068${plain}\u2069”` : // isolated: a text that runs the other way must not turn its number round
      /[\n\r]/.test(text) ? "line break" : text ? "blank" : "part of a character";
  }

  const told = (own, place) => `${named(own.pieces[place][0])}: ${signed(own.pieces[place][1])}`;

  // The places of the tokens that have a share, the strongest first.
  function ranked(own) {
    const places = own.pieces.map((_, place) => place).filter((place) => own.pieces[place][1] !== 0);
    return places.sort((a, b) => Math.abs(own.pieces[b][1]) - Math.abs(own.pieces[a][1]) || a - b);
  }

  function summary(own) {
    const strongest = ranked(own).slice(0, NAMED).map((place) => told(own, place));
    const whole = `all together: ${signed(total(own))}`;
    return strongest.length ? `Strongest tokens: ${[...strongest, whole].join("; ")}.` : "No token has a share in the score.";
  }

  function mark(own, place, largest) {
    const [text, share] = own.pieces[place];
    if (share === 0) return place < prompt(own) ? el("span", { class: "lead-in", text }) : document.createTextNode(text);
    const part = Math.abs(share) / largest;
    const level = LEVELS.filter((edge) => part >= edge).length;
    const blank = text.trim() ? "" : text.includes("\n") ? " broken" : " blank";
    const shown = text.trim() ? text.trimStart() : text; // the blank before a word is its token's, but not marked
    return [text.slice(0, text.length - shown.length),
      el("span", { class: `t ${share > 0 ? "pro" : "con"} l${level}${blank}`, vars: { share: part.toFixed(3) }, "data-place": place, text: shown })];
  }

  function hide() {
    if (tip) tip.remove();
    tip = null;
  }

  function showTip(span, text) {
    hide();
    tip = el("div", { class: "tip", "aria-hidden": "true", text });
    document.body.append(tip);
    const at = (span.getClientRects()[0] ?? span.getBoundingClientRect()), own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(4, at.left), window.innerWidth - own.width - 4);
    const above = at.top - own.height - 4;
    tip.style.setProperty("left", `${left}px`);
    tip.style.setProperty("top", `${above > 4 ? above : at.bottom + 4}px`);
  }

  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  window.addEventListener("scroll", hide, true);

  // Keys move along the text (left, right), or from the strongest token to weaker ones (down, up).
  function move(body, own, event) {
    const spans = [...body.querySelectorAll(".t")];
    if (!spans.length) return;
    const active = body.querySelector(".active"), at = spans.indexOf(active);
    const forward = getComputedStyle(body).direction === "rtl" ? "ArrowLeft" : "ArrowRight";
    const order = ranked(own).map((place) => spans.find((span) => Number(span.dataset.place) === place)).filter(Boolean);
    const rank = order.indexOf(active);
    const steps = {
      ArrowRight: () => spans[at < 0 ? 0 : at + (forward === "ArrowRight" ? 1 : -1)],
      ArrowLeft: () => spans[at < 0 ? 0 : at + (forward === "ArrowLeft" ? 1 : -1)],
      ArrowDown: () => order[rank + 1], ArrowUp: () => order[Math.max(0, rank - 1)],
      Home: () => spans[0], End: () => spans[spans.length - 1],
    };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const next = steps[event.key]();
    if (next) activate(body, own, next);
  }

  function activate(body, own, span) {
    body.querySelector(".active")?.classList.remove("active");
    span.classList.add("active");
    span.scrollIntoView({ block: "nearest" });
    const place = Number(span.dataset.place);
    requestAnimationFrame(() => { if (span.isConnected && span.classList.contains("active")) showTip(span, told(own, place)); });
    ooc.say(told(own, place));
  }

  function rest(body) {
    body.querySelector(".active")?.classList.remove("active");
    hide();
  }

  // What is not in this page of a long text, and how much of the score that is.
  function lacking(own) {
    const parts = [own.before ? `${count(own.before, "character")} before` : "", own.after ? `${count(own.after, "character")} after` : ""].filter(Boolean);
    return parts.length ? `${parts.join(" and ")} this part are not shown; ${signed(own.left_out)} of ${signed(total(own))} is theirs` : "";
  }

  // A text as its tokens: `own` as report/tokens.py writes it, from the piece `start` on.
  function text(own, label, start = 0) {
    const largest = strength(own), all = [start, own.pieces.length];
    const first = [Math.max(start, own.first[0]), Math.max(start, own.first[1])];
    const id = `tokens-${made += 1}`;
    const body = el("div", { class: "text tokens", dir: "auto", tabindex: "0", role: "group", "aria-label": `Tokens of ${label}`, "aria-describedby": id });
    const draw = ([low, high]) => {
      hide();
      const marks = own.pieces.slice(low, high).flatMap((_, place) => mark(own, low + place, largest));
      if (start > 0 && low === start && typeof marks[0] === "string") marks[0] = marks[0].trimStart(); // between a question and its answer
      body.replaceChildren(...(low > start || own.before ? ["… "] : []), ...marks, ...(high < own.pieces.length || own.after ? [" …"] : []));
    };
    const over = (event) => {
      const span = event.target.closest?.(".t");
      if (span) showTip(span, told(own, Number(span.dataset.place)));
      else hide();
    };
    for (const [name, act] of Object.entries({ mouseover: over, mouseleave: hide, keydown: (event) => move(body, own, event), blur: () => rest(body),
      click: (event) => { const span = event.target.closest?.(".t"); if (span) activate(body, own, span); } })) body.addEventListener(name, act);
    draw(first);
    const note = lacking(own);
    const parts = [el("p", { class: "unseen", id, text: summary(own) }), body];
    if (first[0] > all[0] || first[1] < all[1]) {
      const button = el("button", { type: "button", class: "more", "aria-expanded": "false", text: "Show all", on: { click: () => {
        const open = button.getAttribute("aria-expanded") === "true";
        draw(open ? first : all);
        button.setAttribute("aria-expanded", String(!open));
        button.textContent = open ? "Show all" : "Show less";
      } } });
      parts.push(button);
    }
    if (note) parts.push(el("p", { class: "quiet small", text: note }));
    return el("div", { class: "token-text" }, parts);
  }

  // How many pieces come before the first that has a share: the prompt, where there is one.
  const prompt = (own) => Math.max(0, own.pieces.findIndex((piece) => piece[1] !== 0));

  // How many pieces come before an answer, if the tokens that have a share begin with it; else 0: earlier replies of a
  // chat may have shares too.
  function answerFrom(own, answer) {
    const from = prompt(own), plain = (text) => text.replace(/\s+/g, " ").trim();
    const begin = plain(joined(own.pieces.slice(from, from + 40))), wanted = [answer, answer.replace(/^[\w-]+: /, "")].map(plain);
    const same = (text) => text && (begin.startsWith(text.slice(0, 12)) || (begin && text.startsWith(begin)));
    return wanted.some(same) ? from : 0;
  }

  const shown = () => ooc.recall(KEY) ?? true;

  const show = () => ooc.keep(KEY, true);

  function toggle(act) {
    return el("label", { class: "check" }, el("input", { type: "checkbox", id: "show-tokens", checked: shown(),
      on: { change: (event) => { ooc.keep(KEY, event.target.checked); act(); } } }), "Show tokens");
  }

  // What the marks mean.
  const key = () => el("p", { class: "quiet small tokens key" }, el("span", { class: "t pro l2", vars: { share: "0.7" }, text: "raises" }), " or ",
    el("span", { class: "t con l2", vars: { share: "0.7" }, text: "lowers" }), " the score; point at a token, or focus a text and press arrow keys, for its share");

  return { text, joined, answerFrom, shown, show, toggle, key, total };
})();
