//! What a session that is under way needs to go on in another runner over the same weights: one blob, checked before it is used.
//!
//! Owns: the head, the checksum, what a blob must be of, and every refusal. Does not know: what state a runner keeps, where
//! blobs lie.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | [`MAGIC`] |
//! | 4 | [`refusal::FORMAT`] |
//! | 8 | bytes of the whole |
//! | 32 | SHA-256 of all that follows |
//! | the rest | version of the program, weights, device, request, frames that are out, the runner's state (`fields`) |
//!
//! Numbers are little-endian. The checksum finds damage; it keeps nobody from forging a blob, so that every number is held
//! against what is there before anything of its size is allocated.

use std::ops::Range;

use sha2::{Digest as _, Sha256};

use self::fields::{Reader, Writer};
use self::refusal::FORMAT;

pub mod fields;
mod of_request;
pub mod refusal;

pub use of_request::digest_of;
pub use refusal::Refusal;

/// What every blob begins with.
pub const MAGIC: [u8; 8] = *b"TALESESS";

/// SHA-256.
pub type Digest = [u8; 32];

const DIGEST_AT: usize = MAGIC.len() + size_of::<u32>() + size_of::<u64>();
const FIELDS_AT: usize = DIGEST_AT + size_of::<Digest>();

/// What a runner computes with: results of equal ones are equal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Of weights and configurations.
    pub weights: Digest,
    /// Kind of device and dtypes.
    pub device: String,
}

/// A session at a boundary between two of its steps. Cheap to share, not to copy.
#[derive(PartialEq, Eq)]
pub struct SessionCheckpoint {
    bytes: Vec<u8>,
    head: Head,
}

#[derive(Debug, PartialEq, Eq)]
struct Head {
    version: String,
    identity: Identity,
    request: Digest,
    frames_done: usize,
    /// Of the runner's state, in all bytes.
    state: Range<usize>,
}

// Megabytes that nobody reads.
impl std::fmt::Debug for SessionCheckpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SessionCheckpoint({} bytes, {} frames done)", self.bytes.len(), self.head.frames_done)
    }
}

impl SessionCheckpoint {
    /// Of a session of this runner and request that has given out so many frames.
    pub(crate) fn seal(identity: &Identity, request: Digest, frames_done: usize, state: &Writer) -> Self {
        let mut fields = Writer::default();
        fields.text(env!("CARGO_PKG_VERSION"));
        fields.bytes(&identity.weights);
        fields.text(&identity.device);
        fields.bytes(&request);
        fields.count(frames_done);
        let state_at = FIELDS_AT + fields.as_bytes().len();
        let len = state_at + state.as_bytes().len();
        let mut bytes = Vec::with_capacity(len);
        bytes.extend(MAGIC);
        bytes.extend(FORMAT.to_le_bytes());
        bytes.extend((len as u64).to_le_bytes());
        let digest = Sha256::new().chain_update(fields.as_bytes()).chain_update(state.as_bytes()).finalize();
        bytes.extend(digest);
        bytes.extend_from_slice(fields.as_bytes());
        bytes.extend_from_slice(state.as_bytes());
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let head = Head { version, identity: identity.clone(), request, frames_done, state: state_at..len };
        Self { bytes, head }
    }

    /// Reads what [`SessionCheckpoint::as_bytes`] gave. Errors: whatever was done to the bytes since then.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, Refusal> {
        let mut reader = Reader::new(&bytes);
        if reader.array::<8>().ok() != Some(MAGIC) {
            return Err(Refusal::NoCheckpoint);
        }
        let cut_off = || Refusal::Length { says: FIELDS_AT as u64, has: bytes.len() as u64 };
        let found = u32::from_le_bytes(reader.array().map_err(|_| cut_off())?);
        if found != FORMAT {
            return Err(Refusal::Format { found });
        }
        let says = u64::from_le_bytes(reader.array().map_err(|_| cut_off())?);
        let has = bytes.len() as u64;
        if says != has {
            return Err(Refusal::Length { says, has });
        }
        let digest: Digest = reader.array().map_err(|_| cut_off())?;
        if Sha256::digest(&bytes[FIELDS_AT..])[..] != digest {
            return Err(Refusal::Checksum);
        }
        let version = reader.text()?.to_owned();
        let weights = reader.digest()?;
        let device = reader.text()?.to_owned();
        let request = reader.digest()?;
        let frames_done = reader.count()?;
        let state = bytes.len() - reader.left()..bytes.len();
        let head = Head { version, identity: Identity { weights, device }, request, frames_done, state };
        Ok(Self { bytes, head })
    }

    /// All of it, to be kept.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Frames that the session had given out before: it gives out those that follow.
    pub fn frames_done(&self) -> usize {
        self.head.frames_done
    }

    /// The state, once [`SessionCheckpoint::state_for`] has let it pass.
    pub(crate) fn state(&self) -> Reader<'_> {
        Reader::new(&self.bytes[self.head.state.clone()])
    }

    /// The state for a runner of this identity and a request of this digest; for others the error.
    pub(crate) fn state_for(&self, own: &Identity, request: Digest) -> Result<Reader<'_>, Refusal> {
        let Head { version, identity, request: of, .. } = &self.head;
        if version != env!("CARGO_PKG_VERSION") {
            return Err(Refusal::Version { found: version.clone() });
        }
        if identity.weights != own.weights {
            return Err(Refusal::Weights);
        }
        if identity.device != own.device {
            return Err(Refusal::Device { found: identity.device.clone(), own: own.device.clone() });
        }
        if *of != request {
            return Err(Refusal::Request);
        }
        Ok(self.state())
    }
}

#[cfg(test)]
mod tests;
