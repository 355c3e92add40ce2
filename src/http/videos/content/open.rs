//! Files of videos that are being read: each open once, however many read it.
//!
//! Does not know: who reads which part.

use std::collections::HashMap;
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, Weak};

use super::READS;
use crate::http::error::ApiError;
use crate::job::JobId;
use crate::job::files::StoredFile;

/// The files.
pub(super) struct OpenFiles {
    files: LazyLock<Mutex<HashMap<PathBuf, Weak<OpenFile>>>>,
    max: usize,
}

/// A file that stays open while somebody reads it.
pub(super) struct OpenFile(File);

impl Deref for OpenFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

impl OpenFiles {
    /// At most so many at a time.
    pub(super) const fn new(max: usize) -> Self {
        Self { files: LazyLock::new(Mutex::default), max }
    }

    /// The file of a job, opened now unless somebody reads it. Refused when it is not there as it was made, or when too
    /// many others are open.
    pub(super) async fn open(&'static self, id: JobId, file: StoredFile) -> Result<Arc<OpenFile>, ApiError> {
        if let Some(open) = self.lock().get(&file.path).and_then(Weak::upgrade) {
            return Ok(open);
        }
        READS.run(move || self.open_now(id, &file)).await?
    }

    fn open_now(&self, id: JobId, clip: &StoredFile) -> Result<Arc<OpenFile>, ApiError> {
        let opened = File::open(&clip.path).and_then(|file| Ok((file.metadata()?.len(), file)));
        let (bytes, file) = opened.map_err(|error| {
            tracing::warn!(job = %id, %error, "the file of a video cannot be opened");
            match error.kind() {
                ErrorKind::NotFound => ApiError::removed(),
                _ => ApiError::internal("the file of this video cannot be opened"),
            }
        })?;
        if bytes != clip.bytes {
            tracing::warn!(job = %id, bytes, expected = clip.bytes, "the file of a video was changed");
            return Err(ApiError::removed());
        }
        let mut files = self.lock();
        if let Some(open) = files.get(&clip.path).and_then(Weak::upgrade) {
            return Ok(open);
        }
        files.retain(|_, file| file.strong_count() > 0);
        if files.len() >= self.max {
            return Err(ApiError::busy(format!("{} videos are being read", self.max)));
        }
        let open = Arc::new(OpenFile(file));
        files.insert(clip.path.clone(), Arc::downgrade(&open));
        Ok(open)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PathBuf, Weak<OpenFile>>> {
        self.files.lock().expect("no code panics while it holds the files: this is a bug")
    }
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse;

    use super::*;
    use crate::job::JobKind;

    #[tokio::test]
    async fn a_file_is_opened_once_and_so_many_at_a_time() {
        static FILES: OpenFiles = OpenFiles::new(2);
        let dir = tempfile::tempdir().expect("made");
        let file = |name: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, "clip").expect("writable");
            StoredFile { path, bytes: 4 }
        };
        let status = async |file| {
            let opened = FILES.open(JobId::generate(JobKind::Video), file).await;
            opened.err().map(|error| error.into_response().status().as_u16())
        };
        let (first, second, third) = (file("first"), file("second"), file("third"));
        let id = JobId::generate(JobKind::Video);
        let open = FILES.open(id, first.clone()).await.expect("there");
        assert!(Arc::ptr_eq(&open, &FILES.open(id, first.clone()).await.expect("open already")));
        let other = FILES.open(id, second.clone()).await.expect("there");
        assert_eq!(status(third.clone()).await, Some(429));
        drop(other);
        assert_eq!(status(third).await, None);
        assert_eq!(status(StoredFile { bytes: 5, ..second.clone() }).await, Some(410));
        std::fs::remove_file(&second.path).expect("there");
        assert_eq!(status(second).await, Some(410));
        std::fs::remove_file(&first.path).expect("there");
        assert!(FILES.open(id, first).await.is_ok(), "it is open");
    }
}
