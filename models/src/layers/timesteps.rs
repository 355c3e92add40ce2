//! Sinusoidal embeddings of timesteps.
