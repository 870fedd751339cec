"""Jobs, as the parser makes them, for tests of what is behind it."""

from __future__ import annotations

from server.model_info import Direction
from server.values import Geometry, Job, Layout, RenderOptions, Scaling

PNG = RenderOptions(fps=10, quality=None, media_type="image/png")


def decode_job(
    model: str,
    geometry: Geometry,
    *,
    format_name: str = "png",
    render: RenderOptions = PNG,
    direction: Direction = Direction.DECODE,
) -> Job:
    """A decode of float32 latents to pixels, or the encode with the same sizes."""
    return Job(
        model=model,
        direction=direction,
        shape=geometry.latent_shape,
        dtype="float32",
        geometry=geometry,
        scaling=Scaling(),
        format=format_name,
        render=render,
        layout=Layout.PIXELS,
    )
