"""Our own forward passes: what a plain decode or encode gives, in row bands and with fused kernels.

`decoder`, `encoder` and `hunyuan_video` are the passes; the other files are the layers, plans and kernels of all three.
"""

from server.engine.exact.cpu import preferred_cpu_dtype
from server.engine.exact.decoder import ExactKLDecoder
from server.engine.exact.encoder import ExactKLEncoder
from server.engine.exact.hunyuan_video import ExactHunyuanVideoDecoder

__all__ = ["ExactHunyuanVideoDecoder", "ExactKLDecoder", "ExactKLEncoder", "preferred_cpu_dtype"]
