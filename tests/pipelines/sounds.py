"""The pipelines that make sound: what they return as latents, and as a waveform."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AceStepPipeline,
    AceStepTransformer1DModel,
    AutoencoderKLLTX2Audio,
    AutoencoderKLMiniMaxH3Audio,
    AutoencoderOobleck,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
)
from diffusers.modular_pipelines.minimax_h3.decoders import MiniMaxH3AudioDecodeStep
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder
from diffusers.pipelines.ltx2.vocoder import LTX2VocoderWithBWE
from diffusers.pipelines.stable_audio import StableAudioProjectionModel

from tests.pipelines import ltx2, vaes
from tests.pipelines.sample import noise, ones, quiet, seeded

BIG_VOCODER: dict[str, Any] = {
    **{key: value for key, value in ltx2.VOCODER.items() if key != "output_sampling_rate"},
    **{f"bwe_{key}": value for key, value in ltx2.VOCODER.items() if key != "output_sampling_rate"},
    **{"bwe_upsample_factors": [4, 3], "bwe_upsample_kernel_sizes": [8, 7]},
    **{"hop_length": 4, "filter_length": 32, "window_length": 32, "num_mel_channels": 8},
    **{"input_sampling_rate": 400, "output_sampling_rate": 1200},
}
"""Like the vocoder of LTX-2.3, which makes three samples of each that the first stage makes."""


@dataclass(frozen=True)
class Sound:
    """One sound: what a user would send to the server, and what the pipeline makes of it locally.

    parts: the VAE and what else decodes, by the name of its folder; the first one is the VAE.
    latents: as the pipeline returns them, or holds them in its loop. is_scaled: whether they are to be unscaled.
    waveform: `[B, channels, samples]`, float32. family: for the entry in models.yaml; None if the class tells it.
    """

    parts: dict[str, Any]
    latents: torch.Tensor
    waveform: torch.Tensor
    sampling_rate: int
    is_scaled: bool = False
    family: str | None = None

    def save(self, folder: Path) -> Path:
        """Save all parts as a pipeline does, and return the folder of the VAE."""
        for name, part in self.parts.items():
            part.save_pretrained(folder / name)
        return folder / next(iter(self.parts))


def oobleck(**config: Any) -> Any:
    """Stereo, 8 samples for each step of the latents. Its Snake activations start at 0, where a lost one would not show."""
    sizes = {"encoder_hidden_size": 4, "decoder_channels": 4, "decoder_input_channels": 6, "channel_multiples": [1, 2]}
    vae = seeded(AutoencoderOobleck, **{"downsampling_ratios": [2, 4], "sampling_rate": 1000} | sizes | config)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "snake" in name:
                parameter.normal_(std=0.3)
    return vae


def stable_audio() -> Sound:
    """Stable Audio's own pipeline, whose latents are not scaled."""
    sizes = {"num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2, "num_key_value_attention_heads": 2}
    channels = {"in_channels": 6, "out_channels": 6, "cross_attention_dim": 4, "cross_attention_input_dim": 4}
    transformer = seeded(
        StableAudioDiTModel, sample_size=12, time_proj_dim=8, global_states_input_dim=8, **sizes, **channels
    )
    projection = seeded(StableAudioProjectionModel, text_encoder_dim=4, conditioning_dim=4, min_value=0, max_value=32)
    vae = oobleck()
    pipe = StableAudioPipeline(
        vae=vae,
        text_encoder=None,
        projection_model=projection,
        tokenizer=None,
        transformer=transformer,
        scheduler=EulerDiscreteScheduler(),
    )
    latents, waveform = (
        _call(pipe, output_type, prompt_embeds=noise(1, 3, 4), negative_prompt_embeds=noise(1, 3, 4))
        for output_type in ("latent", "pt")
    )
    return Sound({"vae": vae}, latents, waveform, 1000)


def ace_step() -> Sound:
    """ACE-Step's own pipeline, which makes every waveform equally loud. Its latents are `[B, L, C]`."""
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "hidden_size": 8,
        "intermediate_size": 8,
    }
    layers = {"num_lyric_encoder_hidden_layers": 1, "num_timbre_encoder_hidden_layers": 1}
    vae = oobleck(sampling_rate=2000)
    pipe = AceStepPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=seeded(
            AceStepTransformer1DModel, **heads, num_hidden_layers=1, in_channels=18, audio_acoustic_hidden_dim=6
        ),
        condition_encoder=seeded(AceStepConditionEncoder, **heads, **layers, text_hidden_dim=8, timbre_hidden_dim=6),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )
    pipe.encode_prompt = lambda **_: (noise(1, 3, 8), ones(1, 3), noise(1, 4, 8), ones(1, 4))
    latents, waveform = (
        _call(pipe, output_type, prompt="a song", audio_duration=0.1, guidance_scale=1.0)
        for output_type in ("latent", "pt")
    )
    return Sound({"vae": vae}, latents, waveform, 2000, family="ace_step")


def ltx2_audio(*, is_packed: bool) -> Sound:
    """The sound of LTX-2's pipeline. The latents in its loop are packed and scaled, those that it returns are not."""
    pipe = ltx2.pipeline(vaes.ltx2())
    with torch.no_grad():
        pipe.audio_vae.latents_mean.normal_(std=0.5)
        pipe.audio_vae.latents_std.uniform_(0.5, 3)
    seen: list[torch.Tensor] = []
    unscale = pipe._denormalize_audio_latents

    def watched(latents: torch.Tensor, *statistics: torch.Tensor) -> torch.Tensor:
        seen.append(latents)
        return unscale(latents, *statistics)

    pipe._denormalize_audio_latents = watched
    returned, waveform = (_call(pipe, output_type, index=1, **ltx2.INPUTS) for output_type in ("latent", "pt"))
    parts = {"audio_vae": pipe.audio_vae, "vocoder": pipe.vocoder}
    latents = seen[-1] if is_packed else returned
    return Sound(parts, latents, waveform, ltx2.VOCODER["output_sampling_rate"], is_scaled=is_packed)


def ltx23_audio() -> Sound:
    """LTX-2.3's sound, whose vocoder has a second stage for the high frequencies."""
    vae, vocoder = seeded(AutoencoderKLLTX2Audio, **ltx2.AUDIO), seeded(LTX2VocoderWithBWE, **BIG_VOCODER)
    with torch.no_grad():  # the file has a Fourier basis and a filter bank here, of which the class has only the shapes
        vocoder.mel_stft.mel_basis.uniform_(0, 1)
        vocoder.mel_stft.stft_fn.forward_basis.normal_()
        latents = noise(1, 2, 5, 2)
        waveform = vocoder(vae.decode(latents).sample)
    return Sound({"audio_vae": vae, "vocoder": vocoder}, latents, waveform, 1200)


def minimax_h3_audio() -> Sound:
    """A stereo sound of MiniMax-H3: two items of a batch."""
    sizes = {"encoder_dim": 4, "latent_dim": 16, "latent_channels": 4, "num_attention_heads": 2, "decoder_dim": 16}
    rates = {"encoder_rates": (2, 4), "decoder_rates": (4, 2), "decoder_kernel_sizes": (8, 4), "sampling_rate": 1000}
    blocks = {"resblock_kernel_sizes": (3,), "resblock_dilation_sizes": ((1, 3),)}
    statistics = {"latents_mean": [0.5, -0.5, 0.2, 0.0], "latents_std": [0.5, 2.0, 1.0, 0.7]}
    vae = seeded(AutoencoderKLMiniMaxH3Audio, **sizes, **rates, **blocks, **statistics)
    latents = noise(2, 4, 9)
    with quiet():
        pipe = MiniMaxH3AudioDecodeStep().init_pipeline()
        pipe.update_components(audio_vae=vae)
        waveform = pipe(audio_latents=latents, output="audio")
    return Sound({"audio_vae": vae}, latents, waveform, 1000, is_scaled=True)


def _call(pipe: Any, output_type: str, index: int = 0, **inputs: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    with quiet(), torch.inference_mode():
        made = pipe(
            **{"num_inference_steps": 2} | inputs,
            generator=torch.Generator().manual_seed(0),
            output_type=output_type,
            return_dict=False,
        )
    found: torch.Tensor = made[index] if index or output_type != "latent" or isinstance(made, tuple) else made.audios
    return found.clone()


SOUNDS: dict[str, Callable[[], Sound]] = {
    "stable-audio": stable_audio,
    "ace-step": ace_step,
    "ltx2-audio": lambda: ltx2_audio(is_packed=False),
    "ltx2-audio-packed": lambda: ltx2_audio(is_packed=True),
    "ltx2.3-audio": ltx23_audio,
    "minimax-h3-audio": minimax_h3_audio,
}
