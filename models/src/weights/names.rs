//! The names that a tensor has elsewhere: from what a network calls it (diffusers' names) to where a file of the original
//! implementation keeps it.
//!
//! Owns: how a place is described. Does not know: any family; each has its own map beside its network.

/// Where a tensor lies in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Name of the tensor that holds it.
    pub name: String,
    /// How much of that.
    pub part: Extent,
}

/// How much of a file's tensor a network's tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// All of it.
    Whole,
    /// Some of its rows, which lie side by side with those of other tensors (fused projections).
    Rows(Rows),
    /// All of it, with the first half of the rows after the second.
    SwappedHalves,
    /// All of it, where the rows of each of so many heads alternate between those of the network's first half and its
    /// second: rotations of neighbouring rows, where the network rotates a half against the other.
    AlternatingHalves {
        /// Number of heads, each with an even number of rows.
        heads: usize,
    },
    /// All of it, with so many dimensions of one before those that the network's tensor has.
    Batched {
        /// Number of them.
        dims: usize,
    },
}

/// Of `of` parts with equally many rows, `count` parts from `first` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// The first part.
    pub first: usize,
    /// Number of parts.
    pub count: usize,
    /// Number of parts of the whole.
    pub of: usize,
}

impl Place {
    /// A tensor under another name.
    pub fn whole(name: impl Into<String>) -> Self {
        Self { name: name.into(), part: Extent::Whole }
    }
}

/// The names of one component in one layout.
pub trait Names: Send + Sync {
    /// A tensor that every file in this layout has, and no file in the network's own.
    fn mark(&self) -> &'static str;

    /// Where the tensor lies that the network calls `name`; `None` where a file in this layout has none such.
    fn place(&self, name: &str) -> Option<Place>;

    /// The beginning, up to a dot, of the names of all tensors that the network calls `beginning...` (likewise up to a
    /// dot), if they have one in common.
    fn below(&self, beginning: &str) -> Option<String> {
        let _ = beginning;
        None
    }

    /// As [`Names::place`], for the layer whose `weight` it is: the name has no `.weight` at its end. LoRA files name
    /// layers.
    fn layer(&self, name: &str) -> Option<Place> {
        let place = self.place(&format!("{name}.weight"))?;
        Some(Place { name: place.name.strip_suffix(".weight")?.to_owned(), ..place })
    }
}

/// `3.conv1.weight` is 3 and `conv1.weight`.
pub fn split_index(name: &str) -> Option<(usize, &str)> {
    let (index, rest) = name.split_once('.')?;
    Some((index.parse().ok()?, rest))
}
