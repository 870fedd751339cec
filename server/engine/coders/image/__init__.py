"""The exact coder of AutoencoderKL (SD, SDXL, SD3, FLUX.1), decoder and encoder, in row bands."""
