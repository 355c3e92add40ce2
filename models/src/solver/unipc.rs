//! UniPCMultistep.
