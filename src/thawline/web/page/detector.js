// A detector in the browser: the exported model on onnxruntime-web, with images resized as in training.

const TOLERANCE = { pixels: 0.5, score: 0.002 };

export class Detector {
  // Load model and runtime from a folder of the site. WebGPU is taken if it gives the stored detections.
  static async open(base, { allowWebGPU = true } = {}) {
    const about = await (await fetch(new URL("model.json", base))).json();
    const model = new Uint8Array(await (await fetch(new URL("model.onnx", base))).arrayBuffer());
    const check = new Uint8Array(await (await fetch(new URL("check.bin", base))).arrayBuffer());
    let note = "";
    if (allowWebGPU && navigator.gpu && (await navigator.gpu.requestAdapter())) {
      try {
        const detector = await Detector.#create(base, about, model, "webgpu");
        if (equal(await detector.run(check), about)) return detector;
        note = "WebGPU is not used: on this device its detections differ.";
      } catch (error) {
        note = `WebGPU is not used: ${error.message}`;
      }
    }
    const detector = await Detector.#create(base, about, model, "wasm");
    if (!equal(await detector.run(check), about)) note += " These detections differ from the exported model's.";
    detector.note = note.trim();
    return detector;
  }

  static async #create(base, about, model, provider) {
    const ort = await import(new URL(`ort/ort.${provider}.min.mjs`, base));
    ort.env.wasm.wasmPaths = new URL("ort/", base).href;
    ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 8) : 1;
    const session = await ort.InferenceSession.create(model, { executionProviders: [provider] });
    return Object.assign(new Detector(), {
      ort, session, provider, about, note: "", threads: ort.env.wasm.numThreads,
    });
  }

  // Detections of an ImageData, best first: [{box: [x1, y1, x2, y2], score, class_name}], boxes in its pixels.
  async detect(image, threshold = 0.4) {
    const [height, width] = this.about.image_size;
    const found = await this.run(resize(image.data, image.width, image.height, width, height));
    return found.filter(({ score }) => score >= threshold).map(({ box, score, label }) => ({
      box: box.map((edge, i) => clamp(edge, 1) * (i % 2 ? image.height : image.width)),
      score,
      class_name: this.about.class_names[label],
    })).filter(({ box }) => box[2] > box[0] && box[3] > box[1]);
  }

  // Detections of bytes (3, H, W) of the model's size; boxes in 0-1.
  async run(bytes) {
    const [height, width] = this.about.image_size;
    const tensor = new this.ort.Tensor("float32", Float32Array.from(bytes, (byte) => byte / 255), [1, 3, height, width]);
    const { labels, boxes, scores } = await this.session.run({ images: tensor });
    return Array.from(scores.data, (score, i) => ({
      box: Array.from(boxes.data.slice(4 * i, 4 * i + 4)), score, label: Number(labels.data[i]),
    }));
  }
}

// Whether each expected detection was found, in any order: equal scores may come in another.
function equal(found, { check, image_size: [height, width] }) {
  return check.every((one) => found.some((other) =>
    other.label === one.label && Math.abs(other.score - one.score) < TOLERANCE.score &&
    other.box.every((edge, i) => Math.abs(edge - one.box[i]) * (i % 2 ? height : width) < TOLERANCE.pixels)));
}

// Pillow's antialiased bilinear filter, in its fixed-point arithmetic: RGBA bytes to (3, height, width).
export function resize(rgba, fromWidth, fromHeight, width, height) {
  const across = weights(fromWidth, width), down = weights(fromHeight, height);
  const rows = new Uint8Array(3 * fromHeight * width), out = new Uint8Array(3 * height * width);
  for (let y = 0; y < fromHeight; y++) {
    for (let x = 0; x < width; x++) {
      const { first, values } = across[x];
      let red = HALF, green = HALF, blue = HALF, at = 4 * (y * fromWidth + first);
      for (let k = 0; k < values.length; k++, at += 4) {
        red += rgba[at] * values[k];
        green += rgba[at + 1] * values[k];
        blue += rgba[at + 2] * values[k];
      }
      const to = 3 * (y * width + x);
      rows[to] = red >> BITS;
      rows[to + 1] = green >> BITS;
      rows[to + 2] = blue >> BITS;
    }
  }
  const plane = width * height;
  for (let y = 0; y < height; y++) {
    const { first, values } = down[y];
    for (let x = 0; x < width; x++) {
      let red = HALF, green = HALF, blue = HALF, at = 3 * (first * width + x);
      for (let k = 0; k < values.length; k++, at += 3 * width) {
        red += rows[at] * values[k];
        green += rows[at + 1] * values[k];
        blue += rows[at + 2] * values[k];
      }
      const to = y * width + x;
      out[to] = red >> BITS;
      out[plane + to] = green >> BITS;
      out[2 * plane + to] = blue >> BITS;
    }
  }
  return out;
}

const BITS = 22, HALF = 1 << (BITS - 1);

// For each pixel of the output: the first pixel of the input that it is made of, and the weight of each.
function weights(from, to) {
  const scale = from / to, support = Math.max(scale, 1);
  return Array.from({ length: to }, (_, index) => {
    const centre = (index + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(from, Math.trunc(centre + support + 0.5));
    const raw = Array.from({ length: end - first }, (_, k) =>
      Math.max(0, 1 - Math.abs((k + first - centre + 0.5) / support)));
    const sum = raw.reduce((a, b) => a + b, 0);
    return { first, values: raw.map((value) => Math.trunc((value / sum) * (1 << BITS) + 0.5)) };
  });
}

function clamp(value, most) {
  return Math.min(Math.max(value, 0), most);
}
