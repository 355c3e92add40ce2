//! Tensors that are made ready in bounded parts, before the network is built that asks for them.
//!
//! A network is built twice: over a dry view, which notes what it asks for, and then over the real one, which finds it
//! ready. What a network asks for that was not noted is read there and then.
//! Owns: the list, and how it is cut into steps. Does not know: components, what is built of the tensors.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::{DType, Device, Tensor};

use super::mapped::elements;
use super::names::Place;
use super::source::Source;
use crate::error::Result;

/// Bytes of a file that are converted at a time where a tensor is too large for a step.
const PIECE_BYTES: usize = 4 << 20;

/// What networks have asked for, and what of it is ready.
pub struct Ahead {
    state: Mutex<State>,
}

struct State {
    /// Where tensors will live.
    device: Device,
    wanted: VecDeque<Wanted>,
    ready: HashMap<Key, VecDeque<Made>>,
}

/// A tensor, or what a layer makes of the bytes of one.
pub(super) type Made = Box<dyn Any + Send>;

/// Makes something of the bytes of a tensor, where it will live.
pub(super) type Make = Box<dyn FnOnce(&[u8], &Device) -> Result<Made> + Send>;

/// Which component asks for which tensor, by the network's name, and in which dtype: bytes as they are have none.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) component: Arc<str>,
    pub(super) tensor: String,
    pub(super) dtype: Option<DType>,
}

/// Something that a network has asked for.
pub(super) struct Wanted {
    pub(super) asked: Asked,
    pub(super) how: How,
}

/// What it is, and how much of it has been read.
pub(super) struct Asked {
    pub(super) key: Key,
    pub(super) source: Arc<Source>,
    pub(super) place: Place,
    pub(super) shape: Vec<usize>,
    /// That are read for it.
    pub(super) bytes: usize,
    pub(super) bytes_done: usize,
}

/// How it is made, and as far as it is.
pub(super) enum How {
    /// As values in the dtype of the key.
    Values(DType),
    /// As values, the first rows of which are there.
    Rows(DType, Tensor),
    /// By whoever wants its bytes.
    Bytes(Make),
    /// It is.
    Made(Made),
}

impl Ahead {
    /// Nothing yet, for tensors on `device`.
    pub fn new(device: &Device) -> Self {
        let state = State { device: device.clone(), wanted: VecDeque::new(), ready: HashMap::new() };
        Self { state: Mutex::new(state) }
    }

    /// Tensors will live on this device; none is ready yet.
    pub fn will_live_on(&self, device: &Device) {
        self.state().device = device.clone();
    }

    /// Reads the next tensors, as far as they have `budget_bytes` in their files; a larger one in parts of that size.
    /// Whether something is left.
    pub fn advance(&self, budget_bytes: usize) -> Result<bool> {
        let device = self.state().device.clone();
        let mut room = budget_bytes;
        while let Some(next) = self.take_next(room, budget_bytes) {
            let (next, read) = next.read_on(room, &device)?;
            room = room.saturating_sub(read);
            let mut state = self.state();
            match next.how {
                How::Made(made) => state.ready.entry(next.asked.key).or_default().push_back(made),
                _ => state.wanted.push_front(next),
            }
        }
        Ok(!self.state().wanted.is_empty())
    }

    /// Calls of [`Ahead::advance`] until nothing is left.
    pub fn num_steps(&self, budget_bytes: usize) -> usize {
        let mut steps = 0;
        let mut room = 0;
        for wanted in &self.state().wanted {
            let mut left = wanted.asked.bytes_left();
            while left > 0 {
                if left > room && room < budget_bytes {
                    steps += 1;
                    room = budget_bytes;
                }
                let read = wanted.part(left, room);
                left -= read;
                room = room.saturating_sub(read);
            }
        }
        steps
    }

    /// Bytes that are still to be read.
    pub fn bytes_left(&self) -> usize {
        self.state().wanted.iter().map(|wanted| wanted.asked.bytes_left()).sum()
    }

    pub(super) fn note(&self, wanted: Wanted) {
        self.state().wanted.push_back(wanted);
    }

    /// What is ready of this, which is then the caller's.
    pub(super) fn take<T: 'static>(&self, key: &Key) -> Option<T> {
        let made = self.state().ready.get_mut(key)?.pop_front()?;
        made.downcast().ok().map(|made| *made)
    }

    /// The next one, if it has room in this step. One that is larger than a step has a step of its own to begin with.
    fn take_next(&self, room: usize, budget_bytes: usize) -> Option<Wanted> {
        let mut state = self.state();
        let next = state.wanted.front()?;
        let has_room = next.asked.bytes_left() <= room || room == budget_bytes;
        if has_room { state.wanted.pop_front() } else { None }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no code panics while it holds the list: this is a bug")
    }
}

impl Wanted {
    /// Of `left` bytes those that are read where there is `room`: whole rows of the first dimension, one at least.
    fn part(&self, left: usize, room: usize) -> usize {
        if left <= room || !self.can_be_parted() {
            return left;
        }
        left.min((room / self.asked.row_bytes()).max(1) * self.asked.row_bytes())
    }

    /// What a layer makes of bytes is made all at once.
    fn can_be_parted(&self) -> bool {
        let Asked { shape, bytes, .. } = &self.asked;
        let has_rows = shape.first().is_some_and(|rows| *rows > 1 && bytes.is_multiple_of(*rows));
        has_rows && matches!(self.how, How::Values(_) | How::Rows(..))
    }

    /// Reads a part, and says how many bytes it had.
    fn read_on(self, room: usize, device: &Device) -> Result<(Self, usize)> {
        let part = self.part(self.asked.bytes_left(), room);
        let Self { mut asked, how } = self;
        let Asked { source, place, shape, .. } = &asked;
        let how = match how {
            How::Bytes(make) => {
                let (files, slice) = source.find_in_files(place, shape, None)?;
                let made = make(&files.bytes(&slice), device)?;
                files.drop_pages(&slice);
                How::Made(made)
            }
            How::Values(dtype) if part == asked.bytes => {
                let found = source.find(place, shape, None)?;
                How::Made(Box::new(found.read(&asked.key.tensor, shape, dtype, device)?))
            }
            How::Values(dtype) => {
                let whole = Tensor::zeros(elements(shape), dtype, device)?;
                asked.read_rows(part, &whole)?;
                How::Rows(dtype, whole)
            }
            How::Rows(dtype, whole) => {
                asked.read_rows(part, &whole)?;
                match part == asked.bytes_left() {
                    true => How::Made(Box::new(whole.reshape(shape.as_slice())?)),
                    false => How::Rows(dtype, whole),
                }
            }
            How::Made(made) => How::Made(made),
        };
        asked.bytes_done += part;
        Ok((Self { asked, how }, part))
    }
}

impl Asked {
    fn bytes_left(&self) -> usize {
        self.bytes - self.bytes_done
    }

    /// Of a row of the first dimension.
    fn row_bytes(&self) -> usize {
        self.bytes / self.shape[0]
    }

    /// The next rows of a tensor that is too large for a step: a piece at a time, each copied to its place.
    fn read_rows(&self, bytes: usize, whole: &Tensor) -> Result<()> {
        let row_bytes = self.row_bytes();
        let row_values = elements(&self.shape) / self.shape[0];
        let found = self.source.find(&self.place, &self.shape, None)?;
        let rows_per_piece = (PIECE_BYTES / row_bytes).max(1);
        let first_row = self.bytes_done / row_bytes;
        let last_row = first_row + bytes / row_bytes;
        for row in (first_row..last_row).step_by(rows_per_piece) {
            let rows = row..last_row.min(row + rows_per_piece);
            let piece = found.read_rows(&self.key.tensor, &self.shape, rows, whole.dtype(), whole.device())?;
            whole.slice_set(&piece, 0, row * row_values)?;
        }
        Ok(())
    }
}
