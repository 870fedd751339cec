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
// The bytes at the beginning of the images and videos that the server encodes, by which it knows them too. AVIF and HEIC
// have the same container as MP4.
const PIXELS = [
  ["image", /^(\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF[^]{4}WEBP)/],
  ["video", /^[^]{4}ftyp(?!avi[fs]|hei[cxms]|mif1|msf1)/],
];
const FEW_SECONDS = 5;
let models = [], defaultModel = "", needsKey = false, isChosenByHand = false;
let working = null; // aborts the request that runs
let taking = null; // resolves when what is taken is done
let dismiss = null; // takes back the question that is shown

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
  [models, defaultModel, needsKey] = [listed.models, listed.default, listed.needs_key];
  by("model").replaceChildren(...models.map(({ name, state }) => new Option(`${name} (${state})`, name)));
  by("model").value = models.some(({ name }) => name === chosen) ? chosen : listed.default;
  by("state").textContent = `${models.length} model${models.length > 1 ? "s" : ""}, default ${listed.default}.`;
  by("samples").hidden = !models.some(({ name }) => name === "demo");
}

// ---- what a file is ----

// Whether the file is an image or a video that the server reads; null for anything else.
async function pixelsIn(file) {
  const head = String.fromCharCode(...new Uint8Array(await file.slice(0, 12).arrayBuffer()));
  return PIXELS.find(([, begin]) => begin.test(head))?.[0] ?? null;
}

// The header of a safetensors file: the tensors by name. null for any other file.
async function tensorsIn(file) {
  try {
    const length = new DataView(await file.slice(0, 8).arrayBuffer()).getBigUint64(0, true);
    if (length > 1n << 20n) return null;
    const { __metadata__: _, ...tensors } = JSON.parse(await file.slice(8, 8 + Number(length)).text());
    return tensors;
  } catch {
    return null;
  }
}

// The latents among the tensors of a file: the tensor `latents` (ComfyUI: `latent_tensor`), or the only one.
function latentsAmong(tensors) {
  const names = Object.keys(tensors);
  const found = tensors.latents ?? tensors.latent_tensor ?? (names.length === 1 ? tensors[names[0]] : null);
  return found && { shape: found.shape, isUnscaled: "latent_format_version_0" in tensors, hasSound: "audio_latents" in tensors };
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

// Models in the order in which they are offered: loaded ones, downloaded ones, the one that the form shows, the default, full models.
function ranked(fitting) {
  const merits = (model) => [near(model), model.name === by("model").value, model.name === defaultModel, !model.latents.is_preview];
  return [...fitting].sort((a, b) => merits(b).map((merit, index) => merit - merits(a)[index]).find((difference) => difference) ?? 0);
}

const near = ({ weights, state }) => (state === "loaded" ? 2 : weights?.is_here ? 1 : 0);

// Run one task at a time, and say why it failed. A question that is not answered gives way to the next task.
async function alone(task) {
  if (dismiss) {
    dismiss();
    await taking;
  }
  if (taking) return say("One request at a time: cancel the one that runs, or wait for it.", true);
  say("");
  taking = task().catch(tell).finally(() => { taking = null; });
  await taking;
}

// Take files one after the other. A file that fails does not stop the others; cancelling does.
async function takeAll(files) {
  if (files.length === 1) return take(files[0]);
  const failures = [];
  let before = null;
  for (const [index, file] of files.entries()) {
    try {
      before = await take(file, ` (${index + 1} of ${files.length})`, before);
    } catch (error) {
      if (error.name === "AbortError") {
        const left = files.slice(index + 1).map(({ name }) => name).join(", ");
        return say(`Cancelled.${left && ` Not taken: ${left}.`}`);
      }
      failures.push(error.message);
    }
  }
  say([`${files.length - failures.length} of ${files.length} files are done.`, ...failures].join(" "), failures.length > 0);
}

// Decode or encode a file, and return the model that did it. place: of the file among those that were dropped with it.
// before: the model of the file before it, which is used again if it fits.
async function take(file, place = "", before = null) {
  const kind = await pixelsIn(file).catch(() => null);
  if (kind) return reconstruct(file, kind, place);
  const tensors = await tensorsIn(file);
  if (!tensors) {
    throw new Error(`${file.name} is none of the files that this page takes: latents (.safetensors, ComfyUI's .latent), photos (PNG, JPEG, WebP) and MP4.`);
  }
  const found = latentsAmong(tensors), selected = modelNamed(by("model").value);
  if (!found?.shape) return decode(file, selected, null, place); // the server says what is wrong with it
  const fitting = ranked(models.filter((model) => fits(model, found.shape)));
  const known = fitting.find(({ name }) => name === before?.name) ?? (isChosenByHand && fitting.includes(selected) ? selected : null);
  if (known || fitting.length <= 1) return decode(file, known ?? fitting[0] ?? selected, found, place);
  const others = place && " It also decodes the files after it that fit.";
  const model = await offer(`${file.name}${place} fits ${fitting.length} models. Which one made it?${others}`, fitting);
  return decode(file, model, found, place);
}

// Let the user choose a model. Rejects with an AbortError if the question is dismissed.
function offer(question, offered) {
  by("choice-title").textContent = question;
  const chosen = new Promise((resolve, reject) => {
    dismiss = () => reject(new DOMException(question, "AbortError"));
    by("choice").querySelector(".choices").replaceChildren(...offered.map((model) => {
      const button = document.createElement("button");
      button.textContent = model.weights?.is_here === false ? `${model.name} (not downloaded)` : model.name;
      button.addEventListener("click", () => resolve(model));
      return button;
    }));
  });
  by("choice").hidden = false;
  by("choice").focus();
  return chosen.finally(() => {
    dismiss = null;
    by("choice").hidden = true;
  });
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
  const shown = { seconds: Infinity };
  const looking = setInterval(() => look(id, what, abort, shown), LOOK_EVERY_MS);
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

// shown: the seconds that the page has shown for this request. A new estimate may be longer, but the page never shows more.
async function look(id, what, request, shown) {
  const answer = await ask(`requests/${id}/progress`).catch(() => null);
  if (!answer?.ok || working !== request) return;
  const { state, position, progress, seconds_left: left } = await answer.json();
  if (working !== request) return; // it was answered meanwhile
  shown.seconds = Math.min(shown.seconds, left === null ? Infinity : Math.round(left));
  const time = shown.seconds > FEW_SECONDS ? `about ${shown.seconds} s` : "a few seconds";
  const soon = left === null ? "" : `, ${time} left`;
  say(state === "queued" ? `${what}: ${position} before it in the queue${soon} …` : `${what}${soon} …`);
  if (state === "running" && progress > 0) by("progress").value = progress;
}

function tell(error) {
  const isCancelled = error.name === "AbortError";
  say(isCancelled ? "Cancelled." : error.message, !isCancelled);
}

const because = (what, error) => (error.name === "AbortError" ? error : new Error(`${what}: ${error.message}`));

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

async function decode(file, model, found, place = "") {
  by("model").value = model.name;
  if (isPacked(found) && !sizeFits(found.shape[1], model)) {
    [by("height").value, by("width").value] = suggested(found.shape[1], model);
    choose(true);
    say("The latents are packed, so their file does not say the size. This is a guess; correct it if the picture looks cut.");
  } else choose(isPacked(found));
  const what = `Decoding ${file.name}${place}`;
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
    return model;
  } catch (error) {
    throw because(`Cannot decode ${file.name}`, error);
  }
}

function sizeFits(tokens, model) {
  const pixels = model.latents.patch_size * model.latents.vae_scale_factor;
  return (by("height").value / pixels) * (by("width").value / pixels) === tokens && !document.querySelector(".packed").hidden;
}

async function reconstruct(file, kind, place) {
  const fitting = ranked(models.filter((model) => runs(model, "encode") && model.latents?.kind === kind && model.latents.has_encoder));
  if (!fitting.length) throw new Error(`No model of this server encodes ${kind}s.`);
  const selected = isChosenByHand && fitting.find(({ name }) => name === by("model").value);
  const question = `No model that encodes ${kind}s is downloaded. Which one shall the server download for ${file.name}${place}?`;
  const chosen = selected || (near(fitting[0]) || fitting.length === 1 ? fitting[0] : await offer(question, fitting));
  by("model").value = chosen.name;
  choose();
  try {
    const read = async (response) => [await response.blob(), JSON.parse(response.headers.get("shape")), response.headers.get("dtype")];
    const encoded = await send(`Encoding ${file.name}${place}`, `${chosen.name}/encode`, new URLSearchParams(), file, "tensor/binary", read);
    const [latents, shape, dtype] = encoded.made;
    const [outputType, accept] = by("answer").value.split(" ");
    const query = new URLSearchParams({ output_type: outputType, dtype });
    shape.forEach((size) => query.append("shape", size));
    const body = new Blob([latents], { type: "tensor/binary" });
    const { made, ms, timing } = await send(`Decoding ${file.name}${place} again`, chosen.name, query, body, accept, (response) => response.blob());
    const figure = add(file.name, "single");
    finish(figure, `${file.name}, encoded to ${shape.join("x")} and decoded`, chosen, made, encoded.ms + ms, timing);
    figure.classList.remove("single");
    figure.querySelector(".pictures").prepend(shown(file, `${file.name}, the original`, kind), "");
    return chosen;
  } catch (error) {
    throw because(`Cannot encode ${file.name}`, error);
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

function shown(blob, label, kind = blob.type.split("/")[0]) {
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
  link.download = `${name.replace(/\.[^.]*$|,.*/g, "")}.${suffixOf(blob.type)}`;
  link.textContent = "Download";
  const text = `${name}, ${model.name}: ${(milliseconds / 1000).toFixed(2)} s, ${Math.ceil(blob.size / 1024)} KiB `;
  figure.querySelector("figcaption").append(text, link);
  say(`Done in ${Math.round(milliseconds)} ms${timing ? ` (${timing})` : ""}.`);
  list().catch(() => {});
}

// ---- the form and the snippets ----

const suffixOf = (type) => type.split("/")[1].replace("jpeg", "jpg");

const kindOf = (model) => model?.latents?.kind ?? "image";

function choose(isPacked = false) {
  const answers = ANSWERS[kindOf(modelNamed(by("model").value))];
  const chosen = by("answer").value;
  by("answer").replaceChildren(...answers.map(([type, accept, label]) => new Option(label, `${type} ${accept}`)));
  if (answers.some(([type, accept]) => `${type} ${accept}` === chosen)) by("answer").value = chosen;
  document.querySelectorAll(".packed").forEach((field) => { field.hidden = !isPacked; });
  writeSnippets();
}

// Write the snippets, which ask for what the form says.
function writeSnippets() {
  const model = modelNamed(by("model").value);
  if (!model) return;
  const [outputType, accept] = by("answer").value.split(" ");
  const asked = { model, kind: kindOf(model), address: here + model.name, outputType, suffix: suffixOf(accept), isUnscaling: by("scaling").value === "True" };
  by("python").textContent = python(asked);
  by("curl").textContent = curl(asked);
  by("javascript").textContent = javascript(asked);
}

// Python code with diffusers' own client. Its do_scaling is deprecated, so the code sends the model's factors; for a model
// without a factor, the address asks the server to unscale with the model's statistics. The client sends no headers, so the
// address has the key.
function python(asked) {
  const { model, kind, address, suffix, isUnscaling } = asked;
  if (kind === "audio") { // which diffusers' client does not know
    return [
      ...(needsKey ? ["import os"] : []),
      "from pathlib import Path",
      "",
      "import requests",
      "",
      'latents = Path("latents.safetensors").read_bytes()',
      `url = "${address}?${fileQuery(asked)}"`,
      `answer = requests.post(url, data=latents${needsKey ? ', headers={"X-API-Key": os.environ["VAE_SERVER_KEY"]}' : ""})`,
      "answer.raise_for_status()",
      `Path("audio.${suffix}").write_bytes(answer.content)`,
    ].join("\n");
  }
  const { scaling_factor: factor, shift_factor: shift, latents_mean: mean } = model.latents ?? {};
  const hasFactor = typeof factor === "number" && factor !== 1 && !mean; // with 1, the statistics may be stored in the weights
  const scaling = isUnscaling && hasFactor ? `scaling_factor=${factor}` + (shift ? `, shift_factor=${shift}` : "") : "do_scaling=False";
  const size = model.latents?.is_usually_packed ? `, height=${by("height").value}, width=${by("width").value}` : "";
  const output = kind === "video" ? ', output_type="mp4", return_type="mp4"' : `, image_format="${suffix}"`;
  const url = address + (isUnscaling && !hasFactor ? "?do_scaling=True" : "");
  return [
    ...(needsKey ? ["import os"] : []),
    ...(kind === "video" ? ["from pathlib import Path"] : []),
    ...(needsKey ? ["from urllib.parse import quote"] : []),
    ...(needsKey || kind === "video" ? [""] : []),
    "from diffusers.utils.remote_utils import remote_decode",
    "",
    ...(needsKey ? ['key = quote(os.environ["VAE_SERVER_KEY"], safe="")'] : []),
    needsKey ? `url = f"${url.replace("://", "://user:{key}@")}"` : `url = "${url}"`,
    `${kind} = remote_decode(url, latents.cpu().contiguous(), ${scaling}${size}${output})`,
    kind === "video" ? 'Path("video.mp4").write_bytes(video)' : `image.save("image.${suffix}")`,
  ].join("\n");
}

function fileQuery({ model, kind, outputType, suffix, isUnscaling }) {
  const query = new URLSearchParams({ do_scaling: isUnscaling ? "True" : "False" });
  query.append(...(kind === "image" ? ["image_format", suffix] : ["output_type", outputType]));
  if (model.latents?.is_usually_packed) {
    query.append("height", by("height").value);
    query.append("width", by("width").value);
  }
  return query;
}

function curl(asked) {
  return [
    "curl --fail-with-body --data-binary @latents.safetensors",
    ...(needsKey ? ['-H "X-API-Key: $VAE_SERVER_KEY"'] : []),
    `-H "Content-Type: application/octet-stream" -o ${asked.kind}.${asked.suffix}`,
    `"${asked.address}?${fileQuery(asked)}"`,
  ].join(" \\\n  ");
}

function javascript(asked) {
  return [
    `// latents: a Blob or the bytes of a .safetensors file${needsKey ? "; key: an API key of the server" : ""}`,
    `const response = await fetch("${asked.address}?${fileQuery(asked)}", {`,
    `  method: "POST", body: latents, headers: { "Content-Type": "application/octet-stream"${needsKey ? ', "X-API-Key": key' : ""} },`,
    "});",
    "if (!response.ok) throw new Error((await response.json()).error);",
    `const ${asked.kind} = await response.blob();`,
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
  button.addEventListener("click", () => alone(async () => {
    const answer = await ask(`page/${name}.safetensors`);
    if (!answer.ok) throw because(`Cannot fetch ${name}`, await errorOf(answer));
    const latents = await answer.blob();
    by("scaling").value = "True";
    const file = new File([latents], `${name}.safetensors`);
    await decode(file, modelNamed("demo"), latentsAmong(await tensorsIn(file)));
  }));
  return button;
}));
by("model").addEventListener("change", () => { isChosenByHand = true; });
by("model").addEventListener("change", () => choose());
["answer", "scaling", "height", "width"].forEach((id) => by(id).addEventListener("change", writeSnippets));
by("file").addEventListener("change", ({ target }) => {
  const files = [...target.files];
  if (files.length) alone(() => takeAll(files));
  target.value = ""; // so that the same files can be chosen again
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
  const files = [...event.dataTransfer.files];
  if (files.length) alone(() => takeAll(files));
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
