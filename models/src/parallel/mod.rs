//! One network on several devices: ranks that compute its parts side by side and add up what they have.
//!
//! Owns: what a rank is to the layers ([`Rank`]), sums and exchanges between ranks (`exchange`), the threads of all ranks but the
//! first, and what becomes of a group of which one fails (`following`). Does not know: any network, or which part of one a rank has.
//!
//! A tensor never leaves the thread of its device. Rank 0 leads: it computes on the thread of whoever asks, and tells the others
//! what is computed in words and numbers of the host. All ranks then run the same code up to the same sums.

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::device::DeviceSpec;
use crate::error::{Error, Result};

mod exchange;
mod following;

pub use exchange::{Exchange, MemoryLink};
pub use following::{Follow, Followers, Seat};

/// Most devices of one network.
pub const MAX_RANKS: usize = 8;

/// Refuses devices that cannot share a network: too few or many of them, one that is named twice, or GPUs beside processors, which
/// compute in other dtypes.
pub fn check_devices(devices: &[DeviceSpec]) -> Result<()> {
    let of = devices.len();
    let named = devices.iter().map(DeviceSpec::to_string).collect::<Vec<_>>().join(", ");
    let refuse = |problem: String| Err(Error::Device(format!("{named} cannot share a network: {problem}")));
    if !(2..=MAX_RANKS).contains(&of) {
        return refuse(format!("2 to {MAX_RANKS} devices can, these are {of}"));
    }
    if let Some(twice) = (1..of).find(|index| devices[..*index].contains(&devices[*index])) {
        return refuse(format!("{} is named twice", devices[twice]));
    }
    let is_gpu = |device: &DeviceSpec| matches!(device, DeviceSpec::Cuda(_));
    match devices.iter().all(|device| is_gpu(device) == is_gpu(&devices[0])) {
        true => Ok(()),
        false => refuse("they are of two kinds".into()),
    }
}

/// One of the devices of a network, as its layers see it. Cheap to clone; stays on the thread of its device.
#[derive(Debug, Clone)]
pub struct Rank {
    index: usize,
    of: usize,
    link: Arc<dyn Link>,
}

/// What ranks do together. Every rank of a group makes the same calls in the same order; each fails, and does not wait, once
/// a rank of the group has failed.
pub trait Link: Debug + Send + Sync {
    /// The sum of the tensors of all ranks, which have one shape: in the order of ranks, so that all get the same bits.
    fn sum(&self, x: &Tensor) -> Result<Tensor>;

    /// The tensors of all ranks, which have one shape, in the order of ranks: `[of, ...]`.
    fn gather(&self, x: &Tensor) -> Result<Tensor>;

    /// The tensor of rank 0, for the others: they have one of its shape and dtype, whose values do not matter.
    fn of_leader(&self, x: &Tensor) -> Result<Tensor>;
}

impl Rank {
    /// Rank `index` of `of` ranks.
    pub fn new(index: usize, of: usize, link: Arc<dyn Link>) -> Self {
        Self { index, of, link }
    }

    /// A rank of a network that is only looked at: it has its part, and computes nothing.
    pub fn dry(index: usize, of: usize) -> Self {
        Self::new(index, of, Arc::new(Nobody))
    }

    /// From 0, which leads.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Number of ranks.
    pub fn of(&self) -> usize {
        self.of
    }

    /// See [`Link::sum`].
    pub fn sum(&self, x: &Tensor) -> Result<Tensor> {
        self.link.sum(x)
    }

    /// The columns of all ranks side by side: `[rows, n]` of each to `[rows, of * n]`.
    pub fn columns(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, columns) = x.dims2()?;
        // [of, rows, n] to [rows, of, n]
        let by_row = self.link.gather(x)?.transpose(0, 1)?.contiguous()?;
        Ok(by_row.reshape((rows, self.of * columns))?)
    }

    /// What the leading rank has, `Some` there alone, of this shape and dtype.
    pub fn of_leader(&self, x: Option<&Tensor>, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        match x {
            Some(x) => self.link.of_leader(x),
            None => self.link.of_leader(&Tensor::zeros(shape, dtype, device)?),
        }
    }
}

/// The link of a rank without others.
#[derive(Debug)]
struct Nobody;

impl Nobody {
    fn refuse(&self) -> Result<Tensor> {
        Err(Error::Device("a rank that is only looked at computes nothing".into()))
    }
}

impl Link for Nobody {
    fn sum(&self, _x: &Tensor) -> Result<Tensor> {
        self.refuse()
    }

    fn gather(&self, _x: &Tensor) -> Result<Tensor> {
        self.refuse()
    }

    fn of_leader(&self, _x: &Tensor) -> Result<Tensor> {
        self.refuse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_cannot_share_a_network_are_refused() {
        let devices = |names: &str| names.split(' ').map(|name| name.parse().expect("a device")).collect::<Vec<_>>();
        check_devices(&devices("cpu:0/2 cpu:1/2")).expect("two parts");
        check_devices(&devices("cuda:3 cuda:0 cuda:1 cuda:2")).expect("four GPUs");
        for (names, problem) in [
            ("cuda:0", "cuda:0 cannot share a network: 2 to 8 devices can, these are 1"),
            ("cuda:0 cuda:1 cuda:0", "cuda:0 is named twice"),
            ("cpu cuda:0", "they are of two kinds"),
        ] {
            let error = check_devices(&devices(names)).expect_err("refused").to_string();
            assert!(error.contains(problem), "{error}");
        }
    }
}
