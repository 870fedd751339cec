// Show openapi.json, without the libraries of others.
const METHODS = ["get", "post", "delete"];
let description;

function made(tag, text = "", ...children) {
  const element = document.createElement(tag);
  element.textContent = text;
  element.append(...children);
  return element;
}

// Follow a reference within the description.
function resolved(node) {
  return node?.$ref ? node.$ref.slice(2).split("/").reduce((at, part) => at[part.replaceAll("~1", "/")], description) : node;
}

// A schema in a few words: its type, or the values that it allows.
function inWords(schema) {
  const found = resolved(schema) ?? {};
  if (found.enum) return found.enum.map((value) => JSON.stringify(value)).join(", ");
  if ("const" in found) return JSON.stringify(found.const);
  if (found.format === "binary") return "bytes";
  const type = [found.type ?? "object"].flat().join(" or ");
  const range = [found.minimum, found.maximum].some((bound) => bound !== undefined) ? ` from ${found.minimum ?? "…"} to ${found.maximum ?? "…"}` : "";
  return `${type}${found.items ? ` of ${inWords(found.items)}` : ""}${range}${"default" in found ? `, default ${JSON.stringify(found.default)}` : ""}`;
}

function table(heads, rows) {
  const head = made("tr", "", ...heads.map((text) => made("th", text)));
  const body = rows.map((cells) => made("tr", "", ...cells.map((text) => made("td", text))));
  const whole = made("table", "", made("thead", "", head), made("tbody", "", ...body));
  return made("div", "", whole);
}

function contents(content) {
  return Object.entries(content ?? {}).map(([type, { schema }]) => `${type}: ${inWords(schema)}`).join("; ");
}

function operation(path, method, found, shared) {
  const details = made("details", "", made("summary", `${method.toUpperCase()} ${path}`, made("small", ` ${found.summary ?? ""}`)));
  details.id = found.operationId;
  const parameters = [...(shared ?? []), ...(found.parameters ?? [])].map(resolved);
  if (found.description) details.append(made("p", found.description));
  if (parameters.length) {
    details.append(made("h3", "Parameters"), table(
      ["name", "in", "what", "values"],
      parameters.map(({ name, in: place, required, description: text, schema }) => [name, place + (required ? ", required" : ""), text ?? "", inWords(schema)]),
    ));
  }
  const body = resolved(found.requestBody);
  if (body) details.append(made("h3", "Body"), made("p", body.description ?? ""), table(["type", "content"], Object.entries(body.content).map(([type, { schema }]) => [type, inWords(schema)])));
  const answers = Object.entries(found.responses).map(([status, answer]) => [status, resolved(answer)]);
  details.append(made("h3", "Answers"), table(
    ["status", "what", "content", "headers"],
    answers.map(([status, answer]) => [status === "default" ? "an error" : status, answer.description ?? "", contents(answer.content), Object.keys(answer.headers ?? {}).join(", ")]),
  ));
  return details;
}

async function show() {
  const answer = await fetch("openapi.json");
  if (!answer.ok) throw new Error((await answer.json()).error);
  description = await answer.json();
  document.getElementById("about").textContent = description.info.description;
  for (const [path, item] of Object.entries(description.paths)) {
    for (const method of METHODS.filter((each) => item[each])) {
      document.getElementById("operations").append(operation(path, method, item[method], item.parameters));
    }
  }
  document.getElementById(location.hash.slice(1))?.setAttribute("open", "");
}

show().catch((error) => { document.getElementById("about").textContent = `The description did not load: ${error.message}`; });
