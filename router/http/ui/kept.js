// Which tokens were kept (`usage.kv.kept`), as shares of patches and layers.

/** The block with its layers as bytes: per token, how many KV heads kept it. */
export function decode(kept) {
  const layers = kept.layers.map((layer) => Uint8Array.from(atob(layer), (byte) => byte.charCodeAt(0)));
  return { ...kept, layers };
}

/** Per patch of an image, row after row, the share of those that could keep it: a layer's KV heads, or all layers'. */
export function shares(kept, grid, layer) {
  const asked = layer === null ? kept.layers : [kept.layers[layer]];
  const most = asked.length * kept.num_kv_heads;
  return Array.from({ length: grid.rows * grid.columns }, (_, patch) => {
    return asked.reduce((sum, tokens) => sum + tokens[grid.first_token + patch], 0) / most;
  });
}

/** Tokens of a layer, or of all on average: kept visual and text ones, mean of the KV heads. */
export function budget(kept, layer) {
  if (layer === null) {
    const all = kept.layers.map((_, each) => budget(kept, each));
    return { visual: mean(all.map((each) => each.visual)), text: mean(all.map((each) => each.text)) };
  }
  const tokens = kept.layers[layer];
  const visual = kept.images.map(({ first_token, rows, columns }) => {
    return total(tokens.subarray(first_token, first_token + rows * columns));
  });
  const kinds = { visual: total(visual), text: total(tokens) - total(visual) };
  return { visual: kinds.visual / kept.num_kv_heads, text: kinds.text / kept.num_kv_heads };
}

/** The share of the post-vision attention on kept tokens, of a layer or of all on average. */
export function attention(kept, layer) {
  return layer === null ? mean(kept.attention) : kept.attention[layer];
}

function total(numbers) {
  return numbers.reduce((sum, each) => sum + each, 0);
}

function mean(numbers) {
  return total(numbers) / numbers.length;
}
