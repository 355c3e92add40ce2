//! The folder that holds finished clips, and whether it can take more.
//!
//! Owns: the folder, the names in it, what an earlier process left there, and the check of the disk under it. Does not know:
//! how clips are made, or whose they are.

use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use rustix::fs::{Access, access, statvfs};

use super::JobId;
use crate::media::{ClipFormat, PARTIAL_EXTENSION, Still, is_abandoned};

/// Bytes that must be free on the disk of finished clips when nothing else is configured.
pub const DEFAULT_MIN_FREE_BYTES: u64 = 256 << 20;

/// How often the removal of a folder is tried.
const REMOVE_ATTEMPTS: usize = 3;

/// A folder that only this user can enter. A temporary one is removed with everything in it when dropped.
#[derive(Debug)]
pub struct OutputDir {
    path: PathBuf,
    is_temporary: bool,
    min_free_bytes: u64,
    /// What the last check found.
    problem: Mutex<Option<StorageProblem>>,
}

/// Why no clip can be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StorageProblem {
    /// The folder is away, read-only, or not this user's to write in.
    #[error("the folder for finished clips cannot be written: {reason}")]
    NotWritable {
        /// The system's reason.
        reason: String,
    },
    /// Too little is free.
    #[error("the disk of finished clips has {free_bytes} bytes free; min_free_disk is {min_free_bytes}")]
    Full {
        /// Bytes that may be written.
        free_bytes: u64,
        /// The bound.
        min_free_bytes: u64,
    },
}

impl StorageProblem {
    fn not_writable(error: impl Into<io::Error>) -> Self {
        let error: io::Error = error.into();
        Self::NotWritable { reason: error.to_string() }
    }
}

impl OutputDir {
    /// A folder chosen by the operator; made when it is not there, never removed. Refused when no clip could be written.
    /// What an earlier process left unfinished is removed.
    pub fn at(path: &Path, min_free_bytes: u64) -> Result<Self, StorageProblem> {
        if !path.try_exists().map_err(StorageProblem::not_writable)? {
            create_private(path).map_err(StorageProblem::not_writable)?;
        }
        let output = Self::new(path.to_path_buf(), false, min_free_bytes);
        output.try_out()?;
        warn_of_readers(path).map_err(StorageProblem::not_writable)?;
        output.sweep().map_err(StorageProblem::not_writable)?;
        Ok(output)
    }

    /// A folder of this process alone.
    pub fn temporary(min_free_bytes: u64) -> Result<Self, StorageProblem> {
        // A random name in a world-writable place, and `create` fails when somebody was there first.
        let path = std::env::temp_dir().join(format!("tale-{}", uuid::Uuid::now_v7().simple()));
        create_private(&path).map_err(StorageProblem::not_writable)?;
        let output = Self::new(path, true, min_free_bytes);
        // Whatever is wrong is noted: a server of text alone needs no disk.
        let _ = output.probe();
        Ok(output)
    }

    fn new(path: PathBuf, is_temporary: bool, min_free_bytes: u64) -> Self {
        Self { path, is_temporary, min_free_bytes, problem: Mutex::default() }
    }

    /// Where the clip of a job lies that was claimed so often. Each claim writes a file of its own: a node that has lost the job without
    /// knowing it harms nobody's.
    pub fn file(&self, job: JobId, epoch: u64, format: ClipFormat) -> PathBuf {
        let format = format.as_str();
        self.path.join(if epoch <= 1 { format!("{job}.{format}") } else { format!("{job}-{epoch}.{format}") })
    }

    /// Where a file of this name lies; what stands before the name does not matter.
    pub fn named(&self, name: &str) -> PathBuf {
        self.path.join(Path::new(name).file_name().unwrap_or_default())
    }

    /// Whether a clip could be written now, by writing something; waits for the disk.
    pub fn probe(&self) -> Result<(), StorageProblem> {
        self.note(self.try_out())
    }

    fn try_out(&self) -> Result<(), StorageProblem> {
        self.write_probe().map_err(StorageProblem::not_writable)?;
        self.look()
    }

    /// Whether a clip could be written now, as far as the system says without writing; waits for the disk.
    pub fn check(&self) -> Result<(), StorageProblem> {
        self.note(self.look())
    }

    /// What the last check found. Does not wait.
    pub fn problem(&self) -> Option<StorageProblem> {
        self.lock().clone()
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

    fn write_probe(&self) -> io::Result<()> {
        let path = self.path.join(format!(".probe-{}", uuid::Uuid::now_v7().simple()));
        let written = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let written = written.and_then(|mut file| io::Write::write_all(&mut file, &[0; PROBE_BYTES]));
        let removed = std::fs::remove_file(&path);
        written.and(removed)
    }

    fn look(&self) -> Result<(), StorageProblem> {
        access(&self.path, Access::WRITE_OK | Access::EXEC_OK).map_err(StorageProblem::not_writable)?;
        let disk = statvfs(&self.path).map_err(StorageProblem::not_writable)?;
        let free_bytes = disk.f_bavail.saturating_mul(disk.f_frsize);
        match free_bytes < self.min_free_bytes {
            true => Err(StorageProblem::Full { free_bytes, min_free_bytes: self.min_free_bytes }),
            false => Ok(()),
        }
    }

    fn note(&self, found: Result<(), StorageProblem>) -> Result<(), StorageProblem> {
        let problem = found.clone().err();
        let mut last = self.lock();
        if last.is_some() != problem.is_some() {
            match &problem {
                Some(problem) => tracing::warn!(%problem, "clips are refused"),
                None => tracing::info!("clips can be written again"),
            }
        }
        *last = problem;
        found
    }

    fn lock(&self) -> MutexGuard<'_, Option<StorageProblem>> {
        self.problem.lock().expect("no code panics while it notes a problem: this is a bug")
    }

    /// Removes what earlier processes began and did not finish, and says what they finished: nobody asks for that again.
    fn sweep(&self) -> io::Result<()> {
        let (mut removed, mut clips, mut bytes) = (0, 0, 0);
        for entry in std::fs::read_dir(&self.path)? {
            let path = entry?.path();
            match kind_of(&path) {
                Some(Left::Unfinished) if is_abandoned(&path) => {
                    std::fs::remove_file(&path)?;
                    removed += 1;
                }
                Some(kind @ (Left::Clip | Left::Still)) => {
                    clips += usize::from(matches!(kind, Left::Clip));
                    bytes += std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
                }
                _ => (),
            }
        }
        if removed > 0 {
            tracing::info!(removed, "unfinished clips of an earlier process are removed");
        }
        if clips > 0 {
            tracing::info!(clips, bytes, "finished clips of earlier processes lie in the folder and stay there");
        }
        Ok(())
    }
}

/// Enough to need a block of the disk.
const PROBE_BYTES: usize = 4096;

/// What an earlier process may have left.
enum Left {
    Clip,
    Still,
    Unfinished,
}

/// What a file is by its name; `None` for one that is not ours.
fn kind_of(path: &Path) -> Option<Left> {
    let (id, kind) = path.file_name()?.to_str()?.split_once('.')?;
    let id = match id.split_once('-') {
        Some((id, epoch)) if epoch.bytes().all(|byte| byte.is_ascii_digit()) => id,
        Some(_) => return None,
        None => id,
    };
    id.parse::<JobId>().ok()?;
    let is_partial = Path::new(kind).extension().is_some_and(|extension| extension == PARTIAL_EXTENSION);
    let kind = if is_partial { kind.rsplit_once('.')?.0 } else { kind };
    let is_still = Still::ALL.iter().any(|still| still.extension() == kind);
    match ClipFormat::from_extension(kind) {
        None if !is_still => None,
        _ if is_partial => Some(Left::Unfinished),
        Some(_) => Some(Left::Clip),
        None => Some(Left::Still),
    }
}

fn create_private(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().mode(0o700).create(path)
}

/// The files are this user's alone whatever the folder is; its names are not. A folder that somebody chose stays as it is.
fn warn_of_readers(path: &Path) -> io::Result<()> {
    let metadata = std::fs::metadata(path)?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        let mode = format!("{mode:03o}");
        let owner = metadata.uid();
        tracing::warn!(path = %path.display(), mode, owner, "others may enter the folder of finished clips; 700 is private");
    }
    Ok(())
}

impl Drop for OutputDir {
    fn drop(&mut self) {
        self.remove_temporary();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::JobKind;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).expect("there").permissions().mode() & 0o777
    }

    #[test]
    fn a_temporary_folder_is_private_and_goes_away() {
        let output = OutputDir::temporary(0).expect("made");
        let path = output.path.clone();
        assert_eq!(mode(&path), 0o700);
        std::fs::write(path.join("x"), "y").expect("writable");
        drop(output);
        assert!(!path.exists());
    }

    #[test]
    fn a_chosen_folder_is_made_private_and_stays() {
        let dir = tempfile::tempdir().expect("made");
        let path = dir.path().join("clips");
        drop(OutputDir::at(&path, 0).expect("made"));
        assert_eq!(mode(&path), 0o700);
        assert_eq!(std::fs::read_dir(&path).expect("there").count(), 0, "the probe is gone");
    }

    #[test]
    fn a_folder_that_takes_no_clip_is_refused_in_one_line() {
        let dir = tempfile::tempdir().expect("made");
        let refusal =
            |path: &Path, min_free_bytes| OutputDir::at(path, min_free_bytes).expect_err("refused").to_string();
        let file = dir.path().join("file");
        std::fs::write(&file, "x").expect("writable");
        assert!(refusal(&file, 0).contains("Not a directory"), "{}", refusal(&file, 0));
        assert!(refusal(&dir.path().join("a/b"), 0).contains("No such file"));
        let full = refusal(dir.path(), u64::MAX);
        assert!(full.contains("bytes free; min_free_disk is 18446744073709551615"), "{full}");
        // Nobody can write there, not even root.
        assert!(refusal(Path::new("/proc/self"), 0).contains("cannot be written"));
    }

    #[test]
    fn a_folder_that_vanishes_is_noticed_and_so_is_its_return() {
        let dir = tempfile::tempdir().expect("made");
        let path = dir.path().join("clips");
        let output = OutputDir::at(&path, 0).expect("made");
        assert_eq!((output.check(), output.problem()), (Ok(()), None));
        std::fs::remove_dir(&path).expect("empty");
        let problem = output.check().expect_err("away");
        assert!(problem.to_string().contains("No such file"), "{problem}");
        assert_eq!(output.problem(), Some(problem));
        std::fs::create_dir(&path).expect("made");
        assert_eq!((output.probe(), output.problem()), (Ok(()), None));
    }

    #[test]
    fn unfinished_clips_of_an_earlier_process_are_removed_and_nothing_else() {
        let dir = tempfile::tempdir().expect("made");
        let job = JobId::generate(JobKind::Video);
        let names = [
            format!("{job}.mp4.partial"),
            format!("{job}.mp4"),
            "holiday.mp4.partial".to_owned(),
            format!("{job}.txt.partial"),
            format!("{job}.last.png.partial"),
            format!("{job}.last.png"),
        ];
        for name in &names {
            std::fs::write(dir.path().join(name), "x").expect("writable");
        }
        let writing = dir.path().join(format!("{}.webm.partial", JobId::generate(JobKind::Video)));
        let held = std::fs::File::create(&writing).expect("writable");
        held.lock().expect("nobody else has it");
        OutputDir::at(dir.path(), 0).expect("usable");
        let stays: Vec<bool> = names.iter().map(|name| dir.path().join(name).exists()).collect();
        assert_eq!(stays, [false, true, true, true, false, true]);
        assert!(writing.exists(), "another process writes it");
    }
}
