"""Coders of video VAEs: the exact HunyuanVideo decoder, and diffusers' own decoders streamed in little memory."""
