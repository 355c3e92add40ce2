//! A clip as a folder of lossless PNG frames: `frame_0000.png`, `frame_0001.png`, ...

use std::fs;
use std::path::{Path, PathBuf};

use tale_models::request::Frame;

use super::picture::{PictureFormat, encode_picture};
use super::{MediaError, Result};

/// Most frames of one folder: four digits.
pub const MAX_FOLDER_FRAMES: usize = 10_000;

/// Writes frames into a folder as they come. They get their names in [`FrameFolder::finish`]; dropped before, nothing of
/// them stays, and what was in the folder is as it was.
#[derive(Debug)]
pub struct FrameFolder {
    dir: PathBuf,
    /// Whether the folder was not there before.
    created: bool,
    num_frames: usize,
    finished: bool,
}

impl FrameFolder {
    /// Creates the folder (and its parents) if it is not there.
    pub fn create(dir: &Path) -> Result<Self> {
        let created = !dir.exists();
        fs::create_dir_all(dir).map_err(MediaError::io(dir))?;
        Ok(Self { dir: dir.to_path_buf(), created, num_frames: 0, finished: false })
    }

    /// Writes the next frame.
    pub fn push(&mut self, frame: &Frame) -> Result<()> {
        if self.num_frames == MAX_FOLDER_FRAMES {
            return Err(MediaError::TooManyFrames);
        }
        let path = self.partial_path(self.num_frames);
        let png = encode_picture(frame, PictureFormat::Png, None, None)?;
        // Counted first: a half-written file is removed like the others.
        self.num_frames += 1;
        fs::write(&path, png).map_err(MediaError::io(&path))
    }

    /// Gives the frames their names; fails when there is none. Frames that a longer clip left here are removed, so that
    /// the new clip does not end in the old one's tail.
    pub fn finish(mut self) -> Result<()> {
        if self.num_frames == 0 {
            return Err(MediaError::Empty);
        }
        for index in 0..self.num_frames {
            let path = self.path(index);
            fs::rename(self.partial_path(index), &path).map_err(MediaError::io(&path))?;
        }
        self.finished = true;
        self.remove_old_tail()
    }

    fn remove_old_tail(&self) -> Result<()> {
        for index in self.num_frames..MAX_FOLDER_FRAMES {
            let path = self.path(index);
            match fs::remove_file(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => break,
                Err(source) => return Err(MediaError::Io { path, source }),
            }
        }
        Ok(())
    }

    fn path(&self, index: usize) -> PathBuf {
        self.dir.join(format!("frame_{index:04}.png"))
    }

    fn partial_path(&self, index: usize) -> PathBuf {
        self.dir.join(format!("frame_{index:04}.png.partial"))
    }
}

impl Drop for FrameFolder {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        for index in 0..self.num_frames {
            // Nobody is left to tell; a frame that cannot be removed stays.
            let _ = fs::remove_file(self.partial_path(index));
        }
        if self.created {
            // Fails, rightly, when somebody else has put something into it.
            let _ = fs::remove_dir(&self.dir);
        }
    }
}

/// Writes a whole clip into the folder `dir`.
pub fn write_frames<'a>(dir: &Path, frames: impl IntoIterator<Item = &'a Frame>) -> Result<()> {
    let mut folder = FrameFolder::create(dir)?;
    for frame in frames {
        folder.push(frame)?;
    }
    folder.finish()
}
