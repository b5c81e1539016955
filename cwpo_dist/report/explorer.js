// Reads the pairs that lie in the page as JSON, filters them and shows them as text.
// Untrusted text goes through textContent alone; nothing is fetched, stored or evaluated.
(() => {
  const PER_PAGE = 5;
  const LABEL = document.getElementById("explorer").dataset.label;
  const data = JSON.parse(document.getElementById("explorer-data").textContent);
  const form = document.getElementById("explorer-form");
  const list = document.getElementById("explorer-list");
  const count = document.getElementById("explorer-count");
  const [previous, next] = ["previous", "next"].map((name) => document.getElementById(`explorer-${name}`));
  const place = document.getElementById("explorer-place");
  let found = [];
  let page = 0;

  const pairs = data.pairs.map((pair) => ({
    ...pair,
    confidence: pair.margin === null ? null : Math.tanh(Math.abs(pair.margin) / 2),
    choice: pair.margin === null ? null : pair.margin >= 0 ? "a" : "b",
    longest: Math.max(pair.a.length, pair.b.length),
    answered: Object.keys(pair.answers).length > 0,
  }));

  const SHOW = {
    all: () => true,
    wrong: (p) => p.label !== null && p.choice !== null && p.label !== p.choice,
    right: (p) => p.label !== null && p.label === p.choice,
    split: (p) => p.margins.some((m) => m > 0) && p.margins.some((m) => m !== null && m < 0),
    answers: (p) => p.answered,
  };
  const ORDER = {
    drawn: () => 0,
    sure: (p, q) => (q.confidence ?? -1) - (p.confidence ?? -1),
    unsure: (p, q) => (p.confidence ?? 2) - (q.confidence ?? 2),
    longest: (p, q) => q.longest - p.longest,
    difference: (p, q) => Math.abs(q.a.length - q.b.length) - Math.abs(p.a.length - p.b.length),
  };

  const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);

  const number = (name, otherwise) => {
    const text = form.elements[name].value;
    return text === "" || Number.isNaN(Number(text)) ? otherwise : Number(text);
  };
  const select = () => {
    const [low, high] = [number("low", 0), number("high", 1)];
    const [short, long] = [number("short", 0), number("long", Infinity)];
    const show = SHOW[form.elements.show.value];
    const split = form.elements.split.value;
    const words = form.elements.words.value.toLowerCase();
    const sure = (p) => (p.confidence === null ? low <= 0 && high >= 1 : p.confidence >= low && p.confidence <= high);
    const has = (p) => words === "" || [p.prompt, p.a, p.b].some((text) => text.toLowerCase().includes(words));
    found = pairs.filter((p) =>
      sure(p) && p.longest >= short && p.longest <= long && (split === "" || p.split === split) && show(p) && has(p));
    found.sort(ORDER[form.elements.order.value]);
  };

  const side = (pair, name) => {
    const made = element("section", "answer");
    const title = element("h5", "", `Answer ${name.toUpperCase()}`);
    if (pair.label === name) title.append(element("span", "badge human", LABEL));
    if (pair.choice === name) title.append(element("span", "badge weak", "the annotator"));
    made.append(title, prose(pair[name], `Answer ${name.toUpperCase()}`));
    made.append(element("p", "small", `${pair[name].length.toLocaleString("en")} characters`));
    return made;
  };
  const models = (pair) => {
    const arm = form.elements.arm.value;
    const told = Object.hasOwn(pair.answers, arm) ? pair.answers[arm] : null;
    if (told === null) return [];
    const grid = element("div", "answers");
    for (const [when, words] of [["before", "Before: its SFT model"], ["after", "After preference optimisation"]]) {
      const made = element("section", "answer");
      made.append(element("h5", "", words), prose(told[when], words));
      grid.append(made);
    }
    return [element("h4", "", `What the policy of arm ${arm} says`), grid];
  };
  const facts = (pair) => {
    const told = [pair.split];
    if (pair.confidence !== null) told.push(`confidence ${pair.confidence.toFixed(2)}`, `margin a − b ${signed(pair.margin)}`);
    if (pair.margins.length > 1) {
      const each = pair.margins.map((m, k) => `${data.annotators[k]}: ${m === null ? "none" : signed(m)}`);
      told.push(each.join("; "));
    }
    if (pair.label === null) told.push("no label shown");
    else if (pair.choice !== null) told.push(pair.label === pair.choice ? `agrees with ${LABEL}` : `contradicts ${LABEL}`);
    return told.join(" · ");
  };
  const card = (pair) => {
    const made = element("article", "pair");
    made.append(element("p", "facts", facts(pair)), element("h4", "", "Prompt"), prose(pair.prompt, "Prompt"));
    const grid = element("div", "answers");
    grid.append(side(pair, "a"), side(pair, "b"));
    made.append(grid, ...models(pair), element("p", "small id", pair.id));
    return made;
  };

  const draw = () => {
    const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    const from = page * PER_PAGE;
    list.replaceChildren(...found.slice(from, from + PER_PAGE).map(card));
    count.textContent = `${found.length.toLocaleString("en")} of ${pairs.length.toLocaleString("en")} pairs`;
    place.textContent = `page ${page + 1} of ${pages}`;
    previous.disabled = page === 0;
    next.disabled = page === pages - 1;
  };
  const turn = (by) => {
    page += by;
    draw();
    document.getElementById("explorer-top").scrollIntoView({ block: "start" });
  };

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => { page = 0; select(); draw(); });
  form.addEventListener("reset", () => setTimeout(() => { page = 0; select(); draw(); }));
  previous.addEventListener("click", () => turn(-1));
  next.addEventListener("click", () => turn(1));
  document.getElementById("explorer-pages").addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft" && !previous.disabled) turn(-1);
    if (event.key === "ArrowRight" && !next.disabled) turn(1);
  });
  select();
  draw();
  document.getElementById("explorer").classList.add("ready");
})();
