// Elements and numbers as people read them. Texts are set as texts, never as markup, which the policy forbids as well.

const NUMBER = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const UNITS = ["bytes", "KiB", "MiB", "GiB"];

/** An element of the page. */
export function the(id) {
  return document.getElementById(id);
}

/** A new one. */
export function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** `2.31 MiB`. */
export function bytes(size) {
  const power = Math.min(UNITS.length - 1, Math.floor(Math.log2(Math.max(1, size)) / 10));
  return `${NUMBER.format(size / 1024 ** power)} ${UNITS[power]}`;
}

/** `12.5 %`. */
export function percent(share) {
  return `${NUMBER.format(100 * share)} %`;
}

/** `412 ms`, `1.35 s`; a dash where there is nothing to measure. */
export function milliseconds(duration) {
  if (duration === null) return "–";
  return duration < 1000 ? `${NUMBER.format(duration)} ms` : `${NUMBER.format(duration / 1000)} s`;
}
