// An image through what was kept of it: `vlcache explain` draws the same.

// Kept by few KV heads to kept by all; the legend of page.css has the same colours.
const SCALE = [[255, 221, 87], [251, 146, 60], [220, 38, 38], [112, 26, 117]];
// What is left of the colours of a patch that few heads kept.
const FAINT = 0.2;
// Steps of the shares between which a line is drawn; pixels of a patch for one of its line's width, which has a limit.
const LEVELS = 6;
const PER_LINE = 11;
const WIDEST = 5;
const SIDE = 960;

/** Where image and grid lie on a paper that holds both, in pixels: models crop images, and pad them. */
export function layOut(bitmap, [left, top, right, bottom]) {
  const paper = { left: Math.min(0, left), top: Math.min(0, top) };
  const width = (Math.max(1, right) - paper.left) * bitmap.width;
  const height = (Math.max(1, bottom) - paper.top) * bitmap.height;
  const scale = SIDE / Math.max(width, height);
  const across = scale * bitmap.width;
  const down = scale * bitmap.height;
  return {
    width: Math.max(1, Math.round(scale * width)),
    height: Math.max(1, Math.round(scale * height)),
    image: [-paper.left * across, -paper.top * down, across, down],
    grid: [(left - paper.left) * across, (top - paper.top) * down, (right - left) * across, (bottom - top) * down],
  };
}

/** The image alone. */
export function drawImage(canvas, bitmap, layout) {
  const pen = sized(canvas, layout);
  pen.drawImage(bitmap, ...layout.image);
}

/** The kept patches alone, each as clear as its share, within lines around patches of like shares. */
export function drawKept(canvas, bitmap, layout, grid, shares) {
  const pen = sized(canvas, layout);
  const boxes = shares.map((_, patch) => box(layout.grid, grid, patch));
  boxes.forEach((each, patch) => {
    if (shares[patch] > 0) {
      pen.globalAlpha = FAINT + (1 - FAINT) * shares[patch];
      pen.fillRect(...each);
    }
  });
  pen.globalAlpha = 1;
  pen.globalCompositeOperation = "source-in";
  pen.drawImage(bitmap, ...layout.image);
  pen.globalCompositeOperation = "source-over";
  drawLines(pen, boxes, shares, grid.columns);
}

function sized(canvas, { width, height }) {
  // which clears it as well
  Object.assign(canvas, { width, height });
  return canvas.getContext("2d");
}

/** Whole pixels: left, top, width, height. */
function box([left, top, width, height], { rows, columns }, patch) {
  const x = (column) => Math.round(left + (width * column) / columns);
  const y = (row) => Math.round(top + (height * row) / rows);
  const column = patch % columns;
  const row = Math.floor(patch / columns);
  return [x(column), y(row), Math.max(1, x(column + 1) - x(column)), Math.max(1, y(row + 1) - y(row))];
}

/** A line belongs to its higher side. */
function drawLines(pen, boxes, shares, columns) {
  const level = (patch) => Math.ceil(shares[patch] * LEVELS);
  const line = Math.min(WIDEST, Math.max(1, Math.round(boxes[0][2] / PER_LINE)));
  boxes.forEach(([x, y, width, height], patch) => {
    const column = patch % columns;
    const lower = (there, neighbour) => level(patch) > (there ? level(neighbour) : 0);
    pen.fillStyle = heat(shares[patch]);
    if (lower(column > 0, patch - 1)) pen.fillRect(x, y, line, height);
    if (lower(column < columns - 1, patch + 1)) pen.fillRect(x + width - line, y, line, height);
    if (lower(patch >= columns, patch - columns)) pen.fillRect(x, y, width, line);
    if (lower(patch + columns < boxes.length, patch + columns)) pen.fillRect(x, y + height - line, width, line);
  });
}

function heat(share) {
  const at = Math.min(share, 1) * (SCALE.length - 1);
  const below = Math.min(Math.floor(at), SCALE.length - 2);
  const mixed = SCALE[below].map((low, each) => Math.round(low + (SCALE[below + 1][each] - low) * (at - below)));
  return `rgb(${mixed.join(" ")})`;
}
