"""A user's program with the Python client that openapi-python-client generated.

Arguments: the server's URL, its key, and a folder with `latents` (float32, 1x4x8x8) and `image.png`. The answers are
written into this folder, and what the client says of them is printed as JSON.
"""

import json
import sys
from io import BytesIO
from pathlib import Path

from vae_decode_server_client import AuthenticatedClient
from vae_decode_server_client.api.default import decode, decode_with_model, encode, models
from vae_decode_server_client.models import Error, ImageFormat, LatentsDtype, Models, OutputType
from vae_decode_server_client.types import File

url, key, place = sys.argv[1:]
folder = Path(place)
client = AuthenticatedClient(base_url=url.rstrip("/"), token=key)
latents, image = ((folder / name).read_bytes() for name in ("latents", "image.png"))
shape = [1, 4, 8, 8]

png = decode.sync(
    client=client,
    body=File(payload=BytesIO(latents)),
    shape=shape,
    dtype=LatentsDtype.FLOAT32,
    scaling_factor=0.5,
    image_format=ImageFormat.PNG,
)
assert isinstance(png, File)
(folder / "decoded.png").write_bytes(png.payload.read())

tensor = decode_with_model.sync_detailed(
    "sd",
    client=client,
    body=File(payload=BytesIO(latents)),
    shape=shape,
    dtype=LatentsDtype.FLOAT32,
    output_type=OutputType.PT,
    x_request_id="from-python",
)
assert isinstance(tensor.parsed, File)
(folder / "tensor").write_bytes(tensor.parsed.payload.read())

encoded = encode.sync_detailed(client=client, body=File(payload=BytesIO(image)), do_scaling=True)
assert isinstance(encoded.parsed, File)
(folder / "encoded").write_bytes(encoded.parsed.payload.read())

refused = decode.sync(
    client=client, body=File(payload=BytesIO(latents)), shape=[1, 4, 8, 9], dtype=LatentsDtype.FLOAT32
)
assert isinstance(refused, Error)

listed = models.sync(client=client, name="sd-v1")
assert isinstance(listed, Models)

told = {
    "tensor": [tensor.headers["shape"], tensor.headers["dtype"], tensor.headers["X-Request-Id"]],
    "encoded": [encoded.headers["shape"], encoded.headers["dtype"]],
    "refused": refused.code,
    "models": [model.name for model in listed.models],
}
print(json.dumps(told))
