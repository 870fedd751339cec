"""The nodes."""

from __future__ import annotations

from typing import Any

from . import host
from .found import Neighbors
from .latents import Model, decode_to_file, encode, find_model
from .preview import with_previews
from .remote import Menu, RemoteError, Server, find_server
from .vae import RemoteVAE, decode_or_keep, fail

DEFAULT = "default"
"""In the place of a model: the one that the address names, or else the server's own default."""

menu = Menu(lambda: find_server("", "", host.settings_file()))
neighbors = Neighbors()


def model_input(kinds: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """Return the input of the name of a model: a menu, or a text while the server cannot be reached."""
    about = {
        "default": DEFAULT,
        "tooltip": "A model of the server. 'default': the one that the address names, or its own default.",
    }
    models = menu.models()
    if models is None:
        return "STRING", about
    fitting = [model for model in models if model.get("kind", kinds[0]) in kinds]
    fitting.sort(key=lambda model: "kind" in model and kinds.index(model["kind"]))
    return [DEFAULT, *(model["name"] for model in fitting)], about


SERVER = {
    "address": (
        "STRING",
        {
            "default": "",
            "tooltip": "Such as http://host:8000 or http://host:8000/flux. Empty: VAE_SERVER_URL, or `url` in "
            "remote_vae.json in ComfyUI's user folder, or http://127.0.0.1:8000.",
        },
    ),
    "key": (
        "STRING",
        {
            "default": "",
            "tooltip": "Is saved with the workflow and in images; better leave it empty and set VAE_SERVER_KEY, or "
            "`key` in remote_vae.json in ComfyUI's user folder.",
        },
    ),
}


class Node:
    """The common part of the nodes."""

    CATEGORY = "latent/remote"
    FUNCTION = "run"
    KINDS: tuple[str, ...] = ("image", "video")
    INPUTS: dict[str, Any] = {}  # noqa: RUF012  # as ComfyUI has it
    OPTIONS: dict[str, Any] = {}  # noqa: RUF012  # never changed

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  # ComfyUI's name
        """Return the inputs, with the models that the server has now."""
        return {"required": {**cls.INPUTS, "model": model_input(cls.KINDS)}, "optional": {**cls.OPTIONS, **SERVER}}

    @classmethod
    def VALIDATE_INPUTS(cls, model: str) -> bool:  # noqa: N802  # the name that ComfyUI calls
        """Accept any name, because the address may be of another server. A wrong name gets the server's sentence."""
        return True

    @classmethod
    def IS_CHANGED(cls, model: str = DEFAULT, address: str | None = "", key: str | None = "", **_: Any) -> str:  # noqa: N802  # the name that ComfyUI calls
        """Return another value when the settings name another server, so that the node runs again.

        An input that another node gives is None here; ComfyUI then compares that node.
        """
        return str(hash(server_of(model, address or "", key or "")))

    @classmethod
    def model_of(cls, model: str, address: str, key: str) -> Model:
        """Return the model that the inputs and the settings name. Raises RemoteError, also for one of another kind."""
        found = find_model(server_of(model, address, key), host.check_cancelled)
        if found.kind_in_list not in cls.KINDS:
            needed = ", ".join(cls.KINDS)
            advice = "; it takes latents as the sampler has them: use Remote VAE Preview" if found.is_preview else ""
            raise RemoteError(
                f"{found.name} is a model of kind {found.kind_in_list}, and this node takes {needed}{advice}"
            )
        return found


def server_of(model: str, address: str, key: str) -> Server:
    """Return the server that a node's inputs and the settings name. Raises RemoteError."""
    chosen = None if model in ("", DEFAULT) else model
    return find_server(address, key, host.settings_file(), model=chosen)


def first_of(samples: dict[str, Any]) -> Any:
    """Return the latents of a LATENT; those of the video where a model samples its sound too."""
    latents = samples["samples"]
    return latents.unbind()[0] if latents.is_nested else latents


class Decode(Node):
    """Latents to images."""

    DESCRIPTION = "Decodes latents on a VAE decode server. A video becomes a batch of images."
    INPUTS = {"samples": ("LATENT",)}  # noqa: RUF012  # never changed
    RETURN_TYPES = ("IMAGE",)

    def run(self, samples: dict[str, Any], model: str, address: str = "", key: str = "") -> tuple[Any]:
        """Decode."""
        latents = first_of(samples)
        try:
            found = self.model_of(model, address, key)
        except RemoteError as error:
            fail(error, latents)
        pixels = decode_or_keep(found, latents)
        return (pixels.flatten(0, 1) if pixels.ndim == 5 else pixels,)


class Encode(Node):
    """Images to latents."""

    DESCRIPTION = "Encodes images on a VAE decode server. A video model takes the whole batch for one video."
    INPUTS = {"pixels": ("IMAGE",)}  # noqa: RUF012  # never changed
    RETURN_TYPES = ("LATENT",)

    def run(self, pixels: Any, model: str, address: str = "", key: str = "") -> tuple[dict[str, Any]]:
        """Encode."""
        return ({"samples": encode(self.model_of(model, address, key), pixels, host.Bar().show)},)


class Load(Node):
    """A VAE for other nodes."""

    DESCRIPTION = "A VAE on a server, for VAE Decode, VAE Encode and other nodes that take a VAE."
    KINDS = ("image", "video", "audio")
    RETURN_TYPES = ("VAE",)

    def run(self, model: str, address: str = "", key: str = "") -> tuple[RemoteVAE]:
        """Make the VAE."""
        return (RemoteVAE(self.model_of(model, address, key)),)


class DecodeToVideo(Node):
    """Latents to an MP4."""

    DESCRIPTION = "Decodes the latents of a video on a VAE decode server, which sends an MP4 instead of every pixel."
    INPUTS = {"samples": ("LATENT",)}  # noqa: RUF012  # never changed
    OPTIONS = {  # noqa: RUF012  # never changed
        "fps": ("FLOAT", {"default": 0, "min": 0, "max": 120, "tooltip": "Frames per second. 0: those of the model."}),
        "quality": ("INT", {"default": 5, "min": 1, "max": 10, "tooltip": "10 is best and largest."}),
    }
    KINDS = ("video",)
    RETURN_TYPES = ("VIDEO",)
    OUTPUT_IS_LIST = (True,)

    def run(
        self,
        samples: dict[str, Any],
        model: str,
        fps: float = 0,
        quality: int = 5,
        address: str = "",
        key: str = "",
    ) -> tuple[list[Any]]:
        """Decode each video of the batch."""
        latents = first_of(samples)
        params = [
            ("output_type", "mp4"),
            ("stream", "True"),
            ("quality", quality),
            *([("fps", f"{fps:g}")] if fps else []),
        ]
        try:
            found = self.model_of(model, address, key)
            files = decode_to_file(found, latents, params, "video/mp4", host.Bar().show)
        except RemoteError as error:
            fail(error, latents)
        return ([host.video(file) for file in files],)


class Find:
    """The address of a server of the local network."""

    DESCRIPTION = "The address of a server on the local network that was started with --advertise, for other nodes."
    CATEGORY = Node.CATEGORY
    FUNCTION = "run"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("address",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  # ComfyUI's name
        """Return the input: a menu of the servers that were found until now."""
        tooltip = "Servers that were found on the local network. Anyone in it can offer one."
        return {"required": {"server": (neighbors.names(), {"tooltip": tooltip})}}

    @classmethod
    def VALIDATE_INPUTS(cls, server: str) -> bool:  # noqa: N802  # the name that ComfyUI calls
        """Accept any name, because the server may be found when the node runs."""
        return True

    @classmethod
    def IS_CHANGED(cls, server: str) -> str:  # noqa: N802  # the name that ComfyUI calls
        """Return the address, so that the nodes that use it run again when it has changed. Raises RemoteError."""
        return neighbors.address(server)

    def run(self, server: str) -> tuple[str]:
        """Return the address. Raises RemoteError, and ComfyUI's exception if the user cancels."""
        return (neighbors.address(server, host.check_cancelled),)


class Preview(Node):
    """Previews while sampling."""

    DESCRIPTION = "Shows what a preview model of the server makes of the latents while they are sampled."
    INPUTS = {"diffusion_model": ("MODEL",)}  # noqa: RUF012  # never changed
    KINDS = ("preview", "image", "video")
    RETURN_TYPES = ("MODEL",)

    def run(self, diffusion_model: Any, model: str, address: str = "", key: str = "") -> tuple[Any]:
        """Add the previews."""
        return (with_previews(diffusion_model, self.model_of(model, address, key)),)


NODES = {
    "VAEServerDecode": (Decode, "Remote VAE Decode"),
    "VAEServerEncode": (Encode, "Remote VAE Encode"),
    "VAEServerLoad": (Load, "Remote VAE"),
    "VAEServerDecodeToVideo": (DecodeToVideo, "Remote VAE Decode to Video"),
    "VAEServerFind": (Find, "Remote VAE Server on the Network"),
    "VAEServerPreview": (Preview, "Remote VAE Preview"),
}
NODE_CLASS_MAPPINGS = {name: node for name, (node, _) in NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {name: shown for name, (_, shown) in NODES.items()}
