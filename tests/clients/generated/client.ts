// A user's program with the types that openapi-typescript generated, and openapi-fetch.
//
// Arguments: the server's URL, its key, and a folder with `latents` (float32, 1x4x8x8) and `image.png`. The answers are
// written into this folder, and what the client says of them is printed as JSON.
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import createClient from "openapi-fetch";
import type { paths } from "./schema.ts";

const [url, key, folder] = process.argv.slice(2) as [string, string, string];
const client = createClient<paths>({
  baseUrl: url,
  headers: { Authorization: `Bearer ${key}`, "Content-Type": "application/octet-stream" },
  bodySerializer: (body) => body, // the bytes as they are, instead of JSON
});
// In the generated types a binary body is a string, because openapi-typescript ignores `format: binary`.
const [latents, image] = ["latents", "image.png"].map((name) => readFileSync(join(folder, name)) as unknown as string) as [string, string];
const tensorQuery = { shape: [1, 4, 8, 8], dtype: "float32" as const };

function written(name: string, data: ArrayBuffer | undefined, error: { error: string } | undefined): void {
  if (data === undefined) throw new Error(error?.error);
  writeFileSync(join(folder, name), new Uint8Array(data));
}

const png = await client.POST("/", {
  params: { query: { ...tensorQuery, scaling_factor: 0.5, image_format: "png" } },
  body: latents,
  parseAs: "arrayBuffer",
});
written("decoded.png", png.data, png.error);

const tensor = await client.POST("/{model}", {
  params: {
    path: { model: "sd" },
    query: { ...tensorQuery, output_type: "pt" },
    header: { "X-Request-Id": "from-typescript" },
  },
  body: latents,
  parseAs: "arrayBuffer",
});
written("tensor", tensor.data, tensor.error);

const encoded = await client.POST("/encode", { params: { query: { do_scaling: true } }, body: image, parseAs: "arrayBuffer" });
written("encoded", encoded.data, encoded.error);

const refused = await client.POST("/", {
  params: { query: { ...tensorQuery, shape: [1, 4, 8, 9] } },
  body: latents,
  parseAs: "arrayBuffer",
});
const listed = await client.GET("/models", { params: { query: { name: "sd-v1" } } });

const said = (response: Response, ...names: string[]) => names.map((name) => response.headers.get(name));
console.log(
  JSON.stringify({
    tensor: said(tensor.response, "shape", "dtype", "X-Request-Id"),
    encoded: said(encoded.response, "shape", "dtype"),
    refused: refused.error?.code,
    models: listed.data?.models.map((model) => model.name),
  }),
);
