//! The folder that holds finished clips.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::JobId;
use crate::media::ClipFormat;

/// How often the removal of a folder is tried.
const REMOVE_ATTEMPTS: usize = 3;

/// A folder that only this user can enter. A temporary one is removed with everything in it when dropped.
#[derive(Debug)]
pub struct OutputDir {
    path: PathBuf,
    is_temporary: bool,
}

impl OutputDir {
    /// A folder chosen by the operator; made when it is not there, never removed.
    pub fn at(path: &Path) -> io::Result<Self> {
        if !path.is_dir() {
            create_private(path)?;
        }
        Ok(Self { path: path.to_path_buf(), is_temporary: false })
    }

    /// A folder of this process alone.
    pub fn temporary() -> io::Result<Self> {
        // A random name in a world-writable place, and `create` fails when somebody was there first.
        let path = std::env::temp_dir().join(format!("tale-{}", uuid::Uuid::now_v7().simple()));
        create_private(&path)?;
        Ok(Self { path, is_temporary: true })
    }

    /// Removes a temporary folder with everything in it; another is left as it is.
    pub fn remove_temporary(&self) {
        if !self.is_temporary {
            return;
        }
        for attempt in 1.. {
            match std::fs::remove_dir_all(&self.path) {
                Ok(()) => return,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return,
                // A clip that is being written may begin its file meanwhile.
                Err(_) if attempt < REMOVE_ATTEMPTS => (),
                Err(error) => {
                    tracing::warn!(path = %self.path.display(), %error, "the folder of finished clips stays");
                    return;
                }
            }
        }
    }

    /// Where the clip of a job lies.
    pub fn file(&self, job: JobId, format: ClipFormat) -> PathBuf {
        self.path.join(format!("{job}.{}", format.as_str()))
    }
}

fn create_private(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().mode(0o700).create(path)
}

impl Drop for OutputDir {
    fn drop(&mut self) {
        self.remove_temporary();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_temporary_folder_is_private_and_goes_away() {
        let output = OutputDir::temporary().expect("made");
        let path = output.path.clone();
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o700);
        std::fs::write(path.join("x"), "y").expect("writable");
        drop(output);
        assert!(!path.exists());
    }
}
