// The images of the next question: chosen, dropped or pasted.

import { element, the } from "./words.js";

const TYPES = ["image/png", "image/jpeg", "image/webp"];

/** A list of images with a button each that takes it away. */
export class Images {
  /** `onTrouble` hears in words what was no image. */
  constructor(onTrouble) {
    this.all = [];
    /** Fulfilled once all that was added is open. */
    this.ready = Promise.resolve();
    this.onTrouble = onTrouble;
    the("files").addEventListener("change", (event) => {
      this.add([...event.target.files]);
      // the same file may be chosen again
      event.target.value = "";
    });
    document.addEventListener("paste", (event) => this.add([...event.clipboardData.files]));
    for (const kind of ["dragover", "dragleave", "drop"]) {
      // anywhere: a browser would otherwise leave the page for a file that misses
      document.addEventListener(kind, (event) => {
        event.preventDefault();
        the("drop").classList.toggle("over", kind === "dragover");
        if (kind === "drop") this.add([...event.dataTransfer.files]);
      });
    }
  }

  add(files) {
    // one after another, in the order of their coming
    this.ready = this.ready.then(() => this.open(files));
  }

  async open(files) {
    for (const file of files) {
      try {
        this.all = [...this.all, await opened(file)];
      } catch {
        this.onTrouble(`${file.name} is no PNG, JPEG or WebP image.`);
      }
    }
    this.show();
  }

  remove(image) {
    this.all = this.all.filter((each) => each !== image);
    this.show();
    the("files").focus();
  }

  show() {
    the("images").replaceChildren(
      ...this.all.map((image) => {
        const button = element("button", { type: "button", textContent: "×", ariaLabel: `Remove ${image.name}` });
        button.addEventListener("click", () => this.remove(image));
        return element("li", { title: image.name }, thumbnail(image), button);
      }),
    );
  }
}

/** A small picture of an image, cut to a square. */
export function thumbnail({ name, bitmap }) {
  const side = 144;
  const canvas = element("canvas", { width: side, height: side, role: "img", ariaLabel: name });
  const scale = side / Math.min(bitmap.width, bitmap.height);
  const [width, height] = [scale * bitmap.width, scale * bitmap.height];
  canvas.getContext("2d").drawImage(bitmap, (side - width) / 2, (side - height) / 2, width, height);
  return canvas;
}

async function opened(file) {
  if (!TYPES.includes(file.type)) throw new TypeError(file.type);
  const bitmap = await createImageBitmap(file);
  return { name: file.name, bitmap, uri: await dataUri(file) };
}

function dataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
