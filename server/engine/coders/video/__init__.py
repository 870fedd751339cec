"""Decoders of video VAEs: the exact HunyuanVideo decoder, and diffusers' own decoders, run piece by piece."""
