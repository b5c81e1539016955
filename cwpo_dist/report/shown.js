"use strict";
// How pages show what others wrote: as text, never as markup. It stands before each page's own script.
const element = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
// Marks that reorder text would lie to the reader: they are shown by their number.
const visible = (text) =>
  text.replace(/[\u202A-\u202E\u2066-\u2069\u0000-\u0008\u000B\u000C\u000E-\u001F\u007F]/g, (mark) =>
    `⟨U+${mark.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
const prose = (text, label) => {
  const made = element("div", "prose", visible(text) || "(empty)");
  made.dir = "auto";
  made.tabIndex = 0; // so that a long text can be scrolled from the keyboard
  made.setAttribute("role", "group");
  made.setAttribute("aria-label", label);
  return made;
};
