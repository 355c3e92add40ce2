//! Why a checkpoint is refused: one line each, which follows "the checkpoint".

/// Of the layout of all that follows it: raised with every change of it.
pub const FORMAT: u32 = 1;

/// Why a checkpoint is of no use here. Its work has to begin anew.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Something else altogether.
    #[error("is no checkpoint of a session")]
    NoCheckpoint,
    /// Written by a program that lays it out in another way.
    #[error("has format {found}, this program reads {FORMAT}")]
    Format {
        /// What it says.
        found: u32,
    },
    /// Cut off, or longer than it was.
    #[error("says that it has {says} bytes and has {has}")]
    Length {
        /// What it says.
        says: u64,
        /// What it has.
        has: u64,
    },
    /// A byte is not what it was.
    #[error("is damaged: its checksum is another one")]
    Checksum,
    /// Of a program that may compute otherwise.
    #[error("was made by version {found}, this is {}", env!("CARGO_PKG_VERSION"))]
    Version {
        /// What it says.
        found: String,
    },
    /// Of other weights or configurations.
    #[error("was made with other weights")]
    Weights,
    /// Of another kind of device, or other dtypes.
    #[error("was made on {found}, this is {own}")]
    Device {
        /// What it says.
        found: String,
        /// What this is.
        own: String,
    },
    /// Of other parameters, pictures or LoRA files.
    #[error("was made for another request")]
    Request,
    /// Of a model that has none.
    #[error("is for a model whose sessions go on from checkpoints, which this one's do not")]
    Unsupported,
    /// What it says of a session cannot be.
    #[error("has a state that does not fit: {0}")]
    State(&'static str),
}
