//! Files under a temporary name until they are whole.
//!
//! Owns: the name, who may read the file, and the lock that says that it is being written. Does not know: what is in it.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::{MediaError, Result, ffmpeg};

/// Extension of a file that is not whole yet, behind its own.
pub const PARTIAL_EXTENSION: &str = "partial";

/// Who may read a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readers {
    /// Those whom the process's `umask` lets.
    AsUsual,
    /// This user alone.
    Owner,
}

/// Whether nobody writes a file under a temporary name any more, in this process or another one.
pub fn is_abandoned(partial: &Path) -> bool {
    File::open(partial).is_ok_and(|file| file.try_lock().is_ok())
}

/// A file under a temporary name beside its final one; removed on drop unless kept.
pub(super) struct PartialFile {
    path: PathBuf,
    partial: PathBuf,
    kept: bool,
    /// Locked, so that others see that it is being written.
    file: File,
}

impl PartialFile {
    pub(super) fn create(path: &Path, readers: Readers) -> Result<Self> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".");
        name.push(PARTIAL_EXTENSION);
        let partial = path.with_file_name(name);
        let mode = match readers {
            Readers::AsUsual => 0o666,
            Readers::Owner => 0o600,
        };
        // FFmpeg opens it again; here the system's reason is still known when it cannot be made.
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&partial);
        let file = file.map_err(MediaError::io(&partial))?;
        // Where a file system has no locks, an earlier process's files stay.
        let _ = file.try_lock();
        Ok(Self { path: path.to_path_buf(), partial, kept: false, file })
    }

    /// The path as FFmpeg takes it.
    pub(super) fn url(&self) -> Result<String> {
        ffmpeg::url(&self.partial)
    }

    /// Adds bytes, of files that FFmpeg does not write.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(MediaError::io(&self.partial))
    }

    pub(super) fn keep(mut self) -> Result<()> {
        fs::rename(&self.partial, &self.path).map_err(MediaError::io(&self.path))?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        if !self.kept {
            // Nobody is left to tell.
            let _ = fs::remove_file(&self.partial);
        }
    }
}
