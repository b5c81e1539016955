// Shows one question after the other, and keeps what each person says of it.
// Untrusted text goes through textContent alone; nothing is fetched, sent or evaluated.
(() => {
  const data = JSON.parse(document.getElementById("questions-data").textContent);
  const [name, save, told, count, place, progress, question, choices, back, next] =
    ["name", "save", "told", "count", "place", "progress", "question", "choices", "back", "next"]
      .map((id) => document.getElementById(id));
  const asked = data.questions;
  const SAID = [["left", "1 · Left is better"], ["right", "2 · Right is better"], ["tie", "3 · Both are equal"], ["none", "4 · Cannot say"]];
  const VOTES = { a: [1, 0, 0], b: [0, 1, 0], tie: [0, 0, 1] };
  let answers = {}; // by a question's place: a, b, tie, or none
  let at = 0;
  let unsaved = false;
  let saved = ""; // under which name, until the next answer

  // Which answer stands on the left: drawn anew for each person and question (FNV-1a). Its high
  // bits hardly know the last byte, so they are mixed in the end.
  const person = () => name.value.trim();
  const swapped = (k) => {
    let hash = 0x811c9dc5;
    for (const c of new TextEncoder().encode(`${person()}\n${data.key}\n${k}`)) hash = Math.imul(hash ^ c, 0x01000193);
    for (const factor of [0x2c1b3c6d, 0x297a2d39]) hash = Math.imul(hash ^ (hash >>> 15), factor);
    return hash >>> 31 === 1;
  };
  const sideOf = (k, said) => (swapped(k) ? { left: "b", right: "a" } : { left: "a", right: "b" })[said] ?? said;

  // By name, so that a name that is corrected, or is another's, takes no answers with it.
  const people = new Map();
  let keeps = true;
  const SHELF = `cwpo-ask-${data.key}-`;
  const stored = (who) => {
    try {
      const kept = JSON.parse(localStorage.getItem(SHELF + who) ?? "{}");
      const known = [...asked.keys()].filter((k) => Object.hasOwn(VOTES, kept[k]) || kept[k] === "none");
      return Object.fromEntries(known.map((k) => [k, kept[k]]));
    } catch {
      return {}; // nothing of it can be read: the person begins anew
    }
  };
  const keep = (k) => {
    try {
      const all = { ...stored(person()), [k]: answers[k] }; // beside another tab's
      localStorage.setItem(SHELF + person(), JSON.stringify(all));
    } catch {
      keeps = false;
    }
  };
  const recall = () => {
    if (!people.has(person())) people.set(person(), person() === "" ? {} : stored(person()));
    answers = people.get(person());
    at = Math.max(0, asked.findIndex((_, k) => !(k in answers)));
  };
  const others = () =>
    [...people].filter(([who, said]) => who !== person() && Object.keys(said).length > 0)
      .map(([who, said]) => `${Object.keys(said).length} as ${visible(who)}`);

  const advice = (left) => {
    const kept = others().length ? ` Answers are kept here: ${others().join(", ")}.` : "";
    if (person() === "") return `Type your name first: it tells your answers from those of others.${kept}`;
    if (left === asked.length && kept) return kept;
    if (saved) return `Saved as ${saved}: give it to who asked you, and no earlier file of yours from this page.`;
    if (!keeps) return "This browser keeps nothing: save the file before you close the page.";
    if (left === 0) return "That was the last question: save the file, and thank you.";
    if (at === asked.length - 1 && at in answers) return `${left} left: go back to what you passed over.`;
    return "";
  };

  const draw = () => {
    const { prompt, response_a, response_b } = JSON.parse(asked[at].row);
    const [shown, a, b] = asked[at].shown ?? [prompt, response_a, response_b];
    const grid = element("div", "answers");
    for (const [title, text] of [["Left", swapped(at) ? b : a], ["Right", swapped(at) ? a : b]]) {
      const side = element("section", "answer");
      side.append(element("h5", "", title), prose(text, `${title} answer`));
      grid.append(side);
    }
    question.replaceChildren(element("h4", "", "Prompt"), prose(shown, "Prompt"), grid);
    question.hidden = choices.hidden = person() === ""; // else its sides would change as one types
    for (const button of choices.children) {
      button.setAttribute("aria-pressed", String(at in answers && answers[at] === sideOf(at, button.value)));
    }
    const said = Object.values(answers);
    const unclear = said.filter((each) => each === "none").length;
    count.textContent = `${said.length} of ${asked.length} answered` + (unclear ? `, ${unclear} of them "cannot say"` : "");
    place.textContent = `question ${at + 1} of ${asked.length}`;
    progress.max = asked.length;
    progress.value = said.length;
    back.disabled = at === 0;
    next.disabled = at === asked.length - 1;
    save.disabled = said.length === 0;
    told.textContent = advice(asked.length - said.length);
  };
  const go = (by) => {
    at = Math.min(Math.max(at + by, 0), asked.length - 1);
    draw();
    place.scrollIntoView({ block: "nearest" });
  };
  const say = (said) => {
    if (person() === "") return;
    answers[at] = sideOf(at, said);
    unsaved = true;
    saved = "";
    keep(at);
    go(1);
  };

  const lines = () =>
    asked.flatMap(({ row }, k) => {
      if (!Object.hasOwn(VOTES, answers[k] ?? "none")) return [];
      const [a, b, tie] = VOTES[answers[k]];
      const votes = JSON.stringify({ votes_a: a, votes_b: b, votes_tie: tie, annotator: person() });
      return [`${row.slice(0, -1)}, ${votes.slice(1)}\n`]; // the row's own text, digit by digit
    });
  save.addEventListener("click", () => {
    const link = element("a");
    link.href = URL.createObjectURL(new Blob(lines(), { type: "application/jsonl" }));
    const who = person().replace(/[^\p{L}\p{M}\p{N}]+/gu, "-").replace(/^-|-$/g, "");
    link.download = `answers-${who || "unnamed"}-${data.key.slice(0, 8)}.jsonl`; // another page's stays beside it
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    unsaved = false;
    saved = link.download;
    draw();
  });
  for (const [value, words] of SAID) {
    const button = element("button", "", words);
    button.type = "button";
    button.value = value;
    button.addEventListener("click", () => say(value));
    choices.append(button);
  }
  back.addEventListener("click", () => go(-1));
  next.addEventListener("click", () => go(1));
  name.addEventListener("input", () => { saved = ""; recall(); draw(); });
  name.addEventListener("keydown", (event) => { if (event.key === "Enter") name.blur(); });
  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.target === name || event.ctrlKey || event.metaKey || event.altKey) return;
    const said = { 1: "left", 2: "right", 3: "tie", 4: "none" }[event.key];
    if (said) say(said);
    else if (event.key === "ArrowLeft") go(-1);
    else if (event.key === "ArrowRight") go(1);
  });
  window.addEventListener("beforeunload", (event) => { if (unsaved) event.preventDefault(); });
  for (const key of Object.keys(localStorage)) if (key.startsWith(SHELF)) people.set(key.slice(SHELF.length), stored(key.slice(SHELF.length)));
  recall();
  draw();
  document.getElementById("questions").classList.add("ready");
  name.focus();
})();
