"""The exact coders of video VAEs: one engine for causal decoders and encoders, and the decoder of LTX."""
