//! The files of a completed job: the clip, and the stills beside it. They come and go together.
//!
//! Owns: which files there are, and their removal. Does not know: who made them.

use std::io;
use std::path::{Path, PathBuf};

use crate::media::Still;

/// A file that is whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredFile {
    /// Where it lies.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
}

/// All files of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClipFiles {
    /// The clip itself.
    pub clip: StoredFile,
    stills: Vec<(Still, StoredFile)>,
}

impl StoredFile {
    /// The file that lies at `path` now.
    pub fn at(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_path_buf(), bytes: std::fs::metadata(path)?.len() })
    }

    fn remove(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

impl ClipFiles {
    /// A clip without stills yet.
    pub fn new(clip: StoredFile) -> Self {
        Self { clip, stills: Vec::new() }
    }

    /// A clip with the stills beside it.
    pub fn of(clip: StoredFile, stills: Vec<(Still, StoredFile)>) -> Self {
        Self { clip, stills }
    }

    /// The stills beside the clip.
    pub fn stills(&self) -> impl Iterator<Item = (Still, &StoredFile)> {
        self.stills.iter().map(|(still, file)| (*still, file))
    }

    /// A still lies beside the clip now.
    pub fn add(&mut self, still: Still) -> io::Result<()> {
        let file = StoredFile::at(&self.clip.path.with_extension(still.extension()))?;
        self.stills.push((still, file));
        Ok(())
    }

    /// The file of a still.
    pub fn still(&self, still: Still) -> Option<&StoredFile> {
        self.stills.iter().find(|(of, _)| *of == still).map(|(_, file)| file)
    }

    /// Bytes of all of them.
    pub fn total_bytes(&self) -> u64 {
        self.iter().map(|file| file.bytes).sum()
    }

    /// Removes all of them. One that is not there any more is removed; of several that cannot be the first is told.
    pub fn remove(&self) -> io::Result<()> {
        let results: Vec<io::Result<()>> = self.iter().map(StoredFile::remove).collect();
        results.into_iter().collect()
    }

    fn iter(&self) -> impl Iterator<Item = &StoredFile> {
        std::iter::once(&self.clip).chain(self.stills.iter().map(|(_, file)| file))
    }
}
