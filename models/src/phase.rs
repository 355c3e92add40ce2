//! The kinds of device work, by which steps, reservations, errors and metrics are told apart.

/// Kind of a bounded piece of device work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// Language: prompt chunks, alone or beside decode tokens.
    Prefill,
    /// Language: one token per sequence.
    Decode,
    /// Diffusion: a part of networks that are not on the device all the time, read from their files.
    Load,
    /// Diffusion: text encoders, and the vision encoder of reference pictures.
    Encode,
    /// Diffusion: an input picture to latents.
    VaeEncode,
    /// Diffusion: one denoising step of a batch.
    Denoise,
    /// Diffusion: latents to pixels, one chunk.
    VaeDecode,
}

impl Phase {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Prefill, Self::Decode, Self::Load, Self::Encode, Self::VaeEncode, Self::Denoise, Self::VaeDecode];

    /// Lower-case name for events, logs and metric labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Prefill => "prefill",
            Phase::Decode => "decode",
            Phase::Load => "load",
            Phase::Encode => "encode",
            Phase::VaeEncode => "vae_encode",
            Phase::Denoise => "denoise",
            Phase::VaeDecode => "vae_decode",
        }
    }
}
