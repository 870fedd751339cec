"""The exact decoder and the exact encoder of AutoencoderKL (SD, SDXL, SD3, FLUX.1). Both compute in row bands."""
