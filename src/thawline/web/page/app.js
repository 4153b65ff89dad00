// The page: choose an image or the webcam, see boxes and frames per second.

import { Detector } from "./detector.js";

// Threads of WebAssembly need headers that static servers do not send; the service worker adds them.
if (!self.crossOriginIsolated && "serviceWorker" in navigator && !sessionStorage.isolating) {
  sessionStorage.isolating = "1";
  await navigator.serviceWorker.register("isolate.js");
  await navigator.serviceWorker.ready;
  location.reload();
  await new Promise(() => {});
}
delete sessionStorage.isolating;

const get = (id) => document.getElementById(id);
const canvas = get("canvas"), context = canvas.getContext("2d", { willReadFrequently: true });
const threshold = get("threshold"), button = get("webcam"), video = document.createElement("video");
let image = null, stream = null;

const detector = await Detector.open(document.baseURI).catch((error) => {
  get("status").textContent = `The detector cannot be loaded: ${error.message}`;
  throw error;
});
const runtime = detector.provider === "webgpu" ? "WebGPU" : `WebAssembly, ${detector.threads} threads`;
get("status").textContent = `Ready: ${runtime}. ${detector.note}`;
get("file").disabled = button.disabled = false;

// Show an image or a frame with its detections; returns them.
export async function show(source, width, height) {
  const start = performance.now();
  canvas.width = width;
  canvas.height = height;
  context.drawImage(source, 0, 0);
  const found = await detector.detect(context.getImageData(0, 0, width, height), Number(threshold.value));
  draw(found);
  const seconds = (performance.now() - start) / 1000;
  get("status").textContent = `${found.length} detections, ${(1 / seconds).toFixed(1)} frames/s, ${runtime}. ${detector.note}`;
  return found;
}

function draw(found) {
  const line = Math.max(2, canvas.width / 300), font = Math.max(12, canvas.width / 45);
  context.lineWidth = line;
  context.font = `${font}px system-ui, sans-serif`;
  context.textBaseline = "bottom";
  for (const { box: [left, top, right, bottom], score, class_name: name } of found) {
    const colour = `hsl(${(detector.about.class_names.indexOf(name) * 137.5) % 360} 85% 35%)`;
    const text = `${name} ${score.toFixed(2)}`, end = Math.max(top, font + 4);
    context.strokeStyle = context.fillStyle = colour;
    context.strokeRect(left, top, right - left, bottom - top);
    context.fillRect(left - line / 2, end - font - 4, context.measureText(text).width + 6, font + 4);
    context.fillStyle = "white";
    context.fillText(text, left + 3, end - 1);
  }
}

async function showImage() {
  if (image) await show(image, image.width, image.height);
}

function stop() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = null;
  button.textContent = "Start webcam";
}

get("file").onchange = async ({ target }) => {
  stop();
  try {
    image = await createImageBitmap(target.files[0], { colorSpaceConversion: "none" });
  } catch {
    image = null;
    get("status").textContent = `${target.files[0].name} is no image that this browser can read.`;
  }
  await showImage();
};

threshold.oninput = async () => {
  get("shown").value = Number(threshold.value).toFixed(2);
  if (!stream) await showImage();
};

button.onclick = async () => {
  if (stream) return stop();
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { width: 640, height: 480 } });
  } catch (error) {
    get("status").textContent = `No webcam: ${error.message}`;
    return;
  }
  button.textContent = "Stop webcam";
  video.srcObject = stream;
  await video.play();
  while (stream) {
    await show(video, video.videoWidth, video.videoHeight);
    await new Promise(requestAnimationFrame);
  }
};

self.thawline = { detector, show };
