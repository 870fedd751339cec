"use strict";
const by = (id) => document.getElementById(id);
const ANSWERS = {
  image: [["pil", "image/png", "PNG"], ["pil", "image/jpeg", "JPEG"]],
  video: [["mp4", "video/mp4", "MP4"]],
  audio: [["wav", "audio/wav", "WAV"], ["flac", "audio/flac", "FLAC"]],
};
const STREAM = 'video/mp4; codecs="avc1.640028"'; // the profile that the server writes
const LOOK_EVERY_MS = 500, REFRESH_EVERY_MS = 15000;
// The page's address without the key that it may contain, because a browser refuses to fetch from an address with a key.
const here = `${location.origin}${location.pathname.replace(/[^/]*$/, "")}`;
let models = [], working = null, isTaking = false, isChosenByHand = false;

// ---- what the server says ----

// If the server requires a key, the browser asks for it, because the server offers Basic authentication.
const ask = (path, options) => fetch(here + path, options);

async function errorOf(response) {
  try {
    return new Error((await response.json()).error);
  } catch {
    return new Error(`the server answered with ${response.status}`);
  }
}

async function list() {
  const answer = await ask("models");
  if (!answer.ok) throw await errorOf(answer);
  const listed = await answer.json();
  const chosen = by("model").value || listed.default;
  models = listed.models;
  by("model").replaceChildren(...models.map(({ name, state }) => new Option(`${name} (${state})`, name)));
  by("model").value = models.some(({ name }) => name === chosen) ? chosen : listed.default;
  by("state").textContent = `${models.length} model${models.length > 1 ? "s" : ""}, default ${listed.default}.`;
  by("samples").hidden = !models.some(({ name }) => name === "demo");
}

// ---- what a file is ----

// The shape of the latents in a safetensors file: of the tensor `latents` (ComfyUI: `latent_tensor`), or of the only one.
async function latentsIn(file) {
  try {
    const length = new DataView(await file.slice(0, 8).arrayBuffer()).getBigUint64(0, true);
    if (length > 1n << 20n) return null;
    const { __metadata__: _, ...tensors } = JSON.parse(await file.slice(8, 8 + Number(length)).text());
    const names = Object.keys(tensors);
    const found = tensors.latents ?? tensors.latent_tensor ?? (names.length === 1 ? tensors[names[0]] : null);
    return found && { shape: found.shape, isUnscaled: "latent_format_version_0" in tensors, hasSound: "audio_latents" in tensors };
  } catch {
    return null;
  }
}

const runs = (model, direction) => (model.directions ?? ["decode", "encode"]).includes(direction);

function fits(model, shape) {
  const { kind, channels, patch_size: patch, is_usually_packed: packs, family } = model.latents ?? {};
  if (!channels || !runs(model, "decode")) return false;
  if (kind === "audio") return shape.length === (family === "ltx2_audio" ? 4 : 3) && shape.slice(1, 3).includes(channels);
  if (shape.length === 3) return (packs || family === "kl") && kind === "image" && shape[2] === channels * patch ** 2;
  return shape.length === (kind === "video" ? 5 : 4) && shape[1] === channels;
}

// Height and width for packed latents: the most square pair of sides whose product is the number of tokens.
function suggested(tokens, model) {
  let side = Math.floor(Math.sqrt(tokens));
  while (tokens % side) side--;
  const pixels = model.latents.patch_size * model.latents.vae_scale_factor;
  return [side * pixels, (tokens / side) * pixels];
}

const modelNamed = (name) => models.find((each) => each.name === name);

async function take(file) {
  if (working || isTaking) return say("One request at a time: cancel the one that runs, or wait for it.", true);
  isTaking = true;
  await handle(file).finally(() => { isTaking = false; });
}

async function handle(file) {
  by("choice").hidden = true;
  if (file.type.startsWith("image/") || file.type.startsWith("video/")) return reconstruct(file);
  const found = await latentsIn(file);
  if (!found) return decode(file, modelNamed(by("model").value), null); // the server says what is wrong with it
  const fitting = models.filter((model) => fits(model, found.shape));
  const chosen = fitting.find(({ name }) => name === by("model").value);
  if (chosen && isChosenByHand) return decode(file, chosen, found);
  if (fitting.length <= 1) return decode(file, fitting[0] ?? modelNamed(by("model").value), found);
  offer(`${file.name} fits ${fitting.length} models. Which one made it?`, fitting, chosen, (model) => decode(file, model, found));
}

function offer(question, fitting, first, go) {
  const near = ({ weights, state }) => (state === "loaded" ? 2 : weights?.is_here ? 1 : 0);
  const order = [...fitting].sort((a, b) => (b === first) - (a === first) || near(b) - near(a));
  by("choice-title").textContent = question;
  by("choice").querySelector(".choices").replaceChildren(...order.map((model) => {
    const button = document.createElement("button");
    button.textContent = model.weights?.is_here === false ? `${model.name} (not downloaded)` : model.name;
    button.addEventListener("click", () => { by("choice").hidden = true; go(model); });
    return button;
  }));
  by("choice").hidden = false;
  by("choice").focus();
}

// ---- one request ----

function say(text, failed = false) {
  by("said").textContent = text;
  by("said").classList.toggle("failed", failed);
}

// Send a request, watch its progress until it is answered, and let it be cancelled.
async function send(what, path, query, body, accept, read) {
  const id = `page-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`;
  const abort = new AbortController(), started = performance.now();
  working = abort;
  say(`${what} …`);
  by("cancel").hidden = by("progress").hidden = false;
  by("progress").removeAttribute("value");
  const looking = setInterval(() => look(id, what, abort), LOOK_EVERY_MS);
  try {
    const headers = { "Content-Type": body.type || "application/octet-stream", Accept: accept, "X-Request-Id": id };
    const response = await ask(`${path}?${query}`, { method: "POST", body, headers, signal: abort.signal });
    if (!response.ok) throw await errorOf(response);
    const made = await read(response);
    return { made, ms: performance.now() - started, timing: response.headers.get("Server-Timing") };
  } finally {
    clearInterval(looking);
    working = null;
    by("cancel").hidden = by("progress").hidden = true;
  }
}

async function look(id, what, request) {
  const answer = await ask(`requests/${id}/progress`).catch(() => null);
  if (!answer?.ok || working !== request) return;
  const { state, position, progress, seconds_left: left } = await answer.json();
  if (working !== request) return; // it was answered meanwhile
  const soon = left === null ? "" : `, about ${Math.max(1, Math.round(left))} s left`;
  say(state === "queued" ? `${what}: ${position} before it in the queue${soon} …` : `${what}${soon} …`);
  if (state === "running" && progress > 0) by("progress").value = progress;
}

function failed(what, error) {
  say(error.name === "AbortError" ? "Cancelled." : `${what}: ${error.message}`, error.name !== "AbortError");
}

const isPacked = (found) => found?.shape.length === 3 && modelNamed(by("model").value)?.latents?.kind !== "audio";

function decodeQuery(found) {
  const [outputType] = by("answer").value.split(" ");
  const query = new URLSearchParams({ output_type: outputType });
  if (!found?.isUnscaled) query.append("do_scaling", by("scaling").value);
  if (isPacked(found)) {
    query.append("height", by("height").value);
    query.append("width", by("width").value);
  }
  return query;
}

async function decode(file, model, found) {
  by("model").value = model.name;
  if (isPacked(found) && !sizeFits(found.shape[1], model)) {
    [by("height").value, by("width").value] = suggested(found.shape[1], model);
    choose(true);
    say("The latents are packed, so their file does not say the size. This is a guess; correct it if the picture looks cut.");
  } else choose(isPacked(found));
  const what = `Decoding ${file.name}`;
  try {
    const [, accept] = by("answer").value.split(" ");
    const query = decodeQuery(found), isVideo = !found?.hasSound && accept.startsWith("video/") && "MediaSource" in window && MediaSource.isTypeSupported(STREAM);
    if (isVideo) query.append("stream", "True");
    const figure = isVideo ? add(file.name) : null;
    const read = isVideo ? (response) => play(response, figure) : (response) => response.blob();
    const { made, ms, timing } = await send(what, model.name, query, file, accept, read).catch((error) => {
      figure?.remove();
      throw error;
    });
    finish(figure ?? add(file.name), file.name, model, made, ms, timing);
  } catch (error) {
    failed(`Cannot decode ${file.name}`, error);
  }
}

function sizeFits(tokens, model) {
  const pixels = model.latents.patch_size * model.latents.vae_scale_factor;
  return (by("height").value / pixels) * (by("width").value / pixels) === tokens && !document.querySelector(".packed").hidden;
}

async function reconstruct(file) {
  const kind = file.type.startsWith("video/") ? "video" : "image";
  const fitting = models.filter((model) => runs(model, "encode") && model.latents?.kind === kind && model.latents.has_encoder);
  const chosen = fitting.find(({ name }) => name === by("model").value) ?? fitting[0];
  if (!chosen) return say(`No model of this server encodes ${kind === "video" ? "videos" : "images"}.`, true);
  by("model").value = chosen.name;
  choose();
  try {
    const read = async (response) => [await response.blob(), JSON.parse(response.headers.get("shape")), response.headers.get("dtype")];
    const encoded = await send(`Encoding ${file.name}`, `${chosen.name}/encode`, new URLSearchParams(), file, "tensor/binary", read);
    const [latents, shape, dtype] = encoded.made;
    const [outputType, accept] = by("answer").value.split(" ");
    const query = new URLSearchParams({ output_type: outputType, dtype });
    shape.forEach((size) => query.append("shape", size));
    const body = new Blob([latents], { type: "tensor/binary" });
    const { made, ms, timing } = await send(`Decoding it again`, chosen.name, query, body, accept, (response) => response.blob());
    const figure = add(file.name, "single");
    finish(figure, `${file.name}, encoded to ${shape.join("x")} and decoded`, chosen, made, encoded.ms + ms, timing);
    figure.classList.remove("single");
    figure.querySelector(".pictures").prepend(shown(file, `${file.name}, the original`), "");
  } catch (error) {
    failed(`Cannot encode ${file.name}`, error);
  }
}

// ---- results ----

function add(name) {
  const figure = document.createElement("figure");
  figure.className = "single";
  figure.innerHTML = '<div class="pictures"></div><figcaption></figcaption>';
  by("result").prepend(figure);
  return figure;
}

function shown(blob, label) {
  const kind = blob.type.split("/")[0];
  const element = document.createElement(kind === "image" ? "img" : kind);
  element.src = URL.createObjectURL(blob);
  const playing = kind === "video" && { loop: true, autoplay: true, muted: true };
  Object.assign(element, { controls: true, alt: label, title: label, ...playing });
  return element;
}

// Play a video while it arrives, and return the whole of it.
async function play(response, figure) {
  const source = new MediaSource(), video = document.createElement("video"), pieces = [];
  Object.assign(video, { controls: true, autoplay: true, muted: true, src: URL.createObjectURL(source) });
  figure.querySelector(".pictures").replaceChildren(video);
  await new Promise((done) => source.addEventListener("sourceopen", done, { once: true }));
  const buffer = source.addSourceBuffer(STREAM), reader = response.body.getReader();
  let isPlaying = true;
  for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
    pieces.push(piece.value);
    if (!isPlaying) continue;
    try { // a player that cannot go on, or whose memory is full, must not lose the video
      buffer.appendBuffer(piece.value);
      await new Promise((done) => buffer.addEventListener("updateend", done, { once: true }));
    } catch {
      isPlaying = false;
    }
  }
  if (isPlaying) source.endOfStream();
  return new Blob(pieces, { type: "video/mp4" });
}

function finish(figure, name, model, blob, milliseconds, timing) {
  figure.querySelector(".pictures").replaceChildren(shown(blob, `${name}, decoded by ${model.name}`));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${name.replace(/\.[^.]*$|,.*/g, "")}.${blob.type.split("/")[1].replace("jpeg", "jpg")}`;
  link.textContent = "Download";
  const text = `${name}, ${model.name}: ${(milliseconds / 1000).toFixed(2)} s, ${Math.ceil(blob.size / 1024)} KiB `;
  figure.querySelector("figcaption").append(text, link);
  say(`Done in ${Math.round(milliseconds)} ms${timing ? ` (${timing})` : ""}.`);
  list().catch(() => {});
}

// ---- the form and the snippets ----

function choose(isPacked = false) {
  const model = modelNamed(by("model").value);
  const kind = model?.latents?.kind ?? "image";
  const chosen = by("answer").value;
  by("answer").replaceChildren(...ANSWERS[kind].map(([type, accept, label]) => new Option(label, `${type} ${accept}`)));
  if (ANSWERS[kind].some(([type, accept]) => `${type} ${accept}` === chosen)) by("answer").value = chosen;
  document.querySelectorAll(".packed").forEach((field) => { field.hidden = !isPacked; });
  if (!model) return;
  by("python").textContent = python(model, kind);
  by("curl").textContent = curl(model, kind);
  by("javascript").textContent = javascript(model, kind);
}

// Python code with diffusers' own client. Its do_scaling is deprecated, so the code sends the model's factors; for a model
// without a factor, the address asks the server to unscale with the model's statistics.
function python(model, kind) {
  if (kind === "audio") { // which diffusers' client does not know
    return [
      "from pathlib import Path",
      "",
      "import requests",
      "",
      'latents = Path("latents.safetensors").read_bytes()',
      `answer = requests.post("${here}${model.name}?${fileQuery(model, kind)}", data=latents)`,
      "answer.raise_for_status()",
      'Path("audio.wav").write_bytes(answer.content)',
    ].join("\n");
  }
  const { scaling_factor: factor, shift_factor: shift, latents_mean: mean } = model.latents ?? {};
  const hasFactor = typeof factor === "number" && factor !== 1 && !mean; // with 1, the statistics may be stored in the weights
  const scaling = !hasFactor ? "do_scaling=False" : `scaling_factor=${factor}` + (shift ? `, shift_factor=${shift}` : "");
  const size = model.latents?.is_usually_packed ? `, height=${by("height").value}, width=${by("width").value}` : "";
  const output = kind === "video" ? ', output_type="mp4", return_type="mp4"' : "";
  return [
    ...(kind === "video" ? ["from pathlib import Path"] : []),
    "from diffusers.utils.remote_utils import remote_decode",
    "",
    `url = "${here}${model.name}${hasFactor ? "" : "?do_scaling=True"}"`,
    `${kind} = remote_decode(url, latents.cpu().contiguous(), ${scaling}${size}${output})`,
    kind === "video" ? 'Path("video.mp4").write_bytes(video)' : 'image.save("image.jpg")',
  ].join("\n");
}

function fileQuery(model, kind) {
  const query = new URLSearchParams({ do_scaling: "True", ...(kind === "video" && { output_type: "mp4" }) });
  if (model.latents?.is_usually_packed) {
    query.append("height", by("height").value);
    query.append("width", by("width").value);
  }
  return query;
}

function curl(model, kind) {
  const out = { image: "image.jpg", video: "video.mp4", audio: "audio.wav" }[kind];
  return `curl --fail-with-body --data-binary @latents.safetensors \\\n  -H "Content-Type: application/octet-stream" -o ${out} \\\n  "${here}${model.name}?${fileQuery(model, kind)}"`;
}

function javascript(model, kind) {
  return [
    "// latents: a Blob or the bytes of a .safetensors file",
    `const response = await fetch("${here}${model.name}?${fileQuery(model, kind)}", {`,
    '  method: "POST", body: latents, headers: { "Content-Type": "application/octet-stream" },',
    "});",
    "if (!response.ok) throw new Error((await response.json()).error);",
    `const ${kind} = await response.blob();`,
  ].join("\n");
}

function showTab(tab) {
  for (const other of document.querySelectorAll("[role=tab]")) {
    const isChosen = other === tab;
    other.setAttribute("aria-selected", isChosen);
    other.tabIndex = isChosen ? 0 : -1;
    by(other.getAttribute("aria-controls")).hidden = !isChosen;
  }
}

// ---- events ----

const SAMPLES = ["astronaut", "chelsea", "china", "coffee"];
by("samples").querySelector(".samples").append(...SAMPLES.map((name) => {
  const button = document.createElement("button"), image = document.createElement("img");
  button.type = "button";
  Object.assign(image, { src: `${here}page/${name}.jpg`, alt: "", width: 96, height: 96 });
  button.append(image, name);
  button.addEventListener("click", async () => {
    if (working) return;
    const answer = await ask(`page/${name}.safetensors`);
    if (!answer.ok) return failed(`Cannot fetch ${name}`, await errorOf(answer));
    const latents = await answer.blob();
    by("scaling").value = "True";
    const file = new File([latents], `${name}.safetensors`);
    decode(file, modelNamed("demo"), await latentsIn(file));
  });
  return button;
}));
by("model").addEventListener("change", () => { isChosenByHand = true; });
["model", "height", "width"].forEach((id) => by(id).addEventListener("change", () => choose(id !== "model")));
by("file").addEventListener("change", ({ target }) => {
  const [file] = target.files;
  if (file) take(file);
  target.value = ""; // so that the same file can be chosen again
});
by("cancel").addEventListener("click", () => working?.abort());
by("how").addEventListener("submit", (event) => event.preventDefault());
by("copy").addEventListener("click", async () => {
  const text = document.querySelector("[role=tabpanel]:not([hidden])").textContent;
  await navigator.clipboard.writeText(text).then(() => say("Copied."), () => say("The browser does not allow to copy; select the text.", true));
});
const tabs = [...document.querySelectorAll("[role=tab]")];
tabs.forEach((tab, index) => {
  tab.addEventListener("click", () => showTab(tab));
  tab.addEventListener("keydown", ({ key }) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[key];
    if (!step) return;
    const next = tabs[(index + step + tabs.length) % tabs.length];
    showTab(next);
    next.focus();
  });
});
let overs = 0; // dragenter and dragleave come for every element inside the window
addEventListener("dragenter", () => { overs++; document.body.classList.add("over"); });
addEventListener("dragleave", () => { if (!--overs) document.body.classList.remove("over"); });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  overs = 0;
  document.body.classList.remove("over");
  if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
});

async function start() {
  try {
    await list();
    choose();
  } catch (error) {
    by("state").textContent = error.message;
  }
}
start();
setInterval(() => { if (!document.hidden && !working) list().catch(() => {}); }, REFRESH_EVERY_MS);
