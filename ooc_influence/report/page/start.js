// Which page is shown: by the address's hash.
"use strict";

(async () => {
  const main = document.getElementById("main");
  const { el } = ooc;

  const names = () => [...(ooc.index.ask ? ["ask"] : []), "queries", "labels", "spectrum", "distributions", "groups", "store"];

  async function route() {
    if (location.hash && !location.hash.startsWith("#/")) return; // a place within the page
    const [, name = "", rest = ""] = location.hash.split("/");
    const chosen = names().includes(name) ? name : ooc.index.queries ? "queries" : names()[0] === "ask" ? "ask" : "labels";
    document.title = `${ooc.views.get(chosen).name} – ${ooc.index.title} – influence`;
    for (const link of document.querySelectorAll("#pages a")) {
      if (link.dataset.name === chosen) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    try {
      await ooc.views.get(chosen).open(main, rest);
      document.body.dataset.view = chosen;
    } catch (error) {
      main.replaceChildren(el("p", { class: "notice", role: "alert", text: error.message }));
    }
  }

  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey) return;
    if (["INPUT", "TEXTAREA", "SELECT"].includes(document.activeElement?.tagName)) return;
    const search = main.querySelector("input[type=search]");
    if (search) {
      event.preventDefault();
      search.focus();
    }
  });

  try {
    ooc.index = await ooc.load("index");
  } catch (error) {
    main.replaceChildren(el("p", { class: "notice", role: "alert", text: error.message }));
    return;
  }
  if (ooc.index.ask) ooc.views.set("ask", ooc.ask);
  const { queries, rows, settings } = ooc.index;
  document.getElementById("subtitle").textContent = [ooc.count(rows, "training row"), queries ? ooc.count(queries.count, "query", "queries") : "",
    settings.lambda === null ? "plain dot products" : `λ = ${ooc.number(settings.lambda)}`].filter(Boolean).join(" · ");
  document.getElementById("pages").replaceChildren(...names().map((name) =>
    el("li", {}, el("a", { href: `#/${name}`, "data-name": name, text: ooc.views.get(name).name }))));
  window.addEventListener("hashchange", route);
  await route();
})();
