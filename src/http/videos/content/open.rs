//! Files of videos that are being read: each open once, however many read it.
//!
//! Does not know: who reads which part.

use std::collections::HashMap;
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Deref;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, Weak};

use super::READS;
use crate::http::error::ApiError;
use crate::job::{ClipFile, JobId};

/// The files.
pub(super) struct OpenFiles {
    files: LazyLock<Mutex<HashMap<JobId, Weak<OpenFile>>>>,
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
    pub(super) async fn open(&'static self, id: JobId, file: ClipFile) -> Result<Arc<OpenFile>, ApiError> {
        if let Some(open) = self.lock().get(&id).and_then(Weak::upgrade) {
            return Ok(open);
        }
        READS.run(move || self.open_now(id, &file)).await?
    }

    fn open_now(&self, id: JobId, clip: &ClipFile) -> Result<Arc<OpenFile>, ApiError> {
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
        if let Some(open) = files.get(&id).and_then(Weak::upgrade) {
            return Ok(open);
        }
        files.retain(|_, file| file.strong_count() > 0);
        if files.len() >= self.max {
            return Err(ApiError::busy(format!("{} videos are being read", self.max)));
        }
        let open = Arc::new(OpenFile(file));
        files.insert(id, Arc::downgrade(&open));
        Ok(open)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<JobId, Weak<OpenFile>>> {
        self.files.lock().expect("no code panics while it holds the files: this is a bug")
    }
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse;

    use super::*;

    #[tokio::test]
    async fn a_file_is_opened_once_and_so_many_at_a_time() {
        static FILES: OpenFiles = OpenFiles::new(2);
        let dir = tempfile::tempdir().expect("made");
        let path = dir.path().join("clip");
        std::fs::write(&path, "clip").expect("writable");
        let clip = || ClipFile { path: path.clone(), bytes: 4 };
        let status = async |id, clip| FILES.open(id, clip).await.err().map(|error| error.into_response().status());
        let (first, second, third) = (JobId::generate(), JobId::generate(), JobId::generate());
        let open = FILES.open(first, clip()).await.expect("there");
        assert!(Arc::ptr_eq(&open, &FILES.open(first, clip()).await.expect("open already")));
        let other = FILES.open(second, clip()).await.expect("there");
        assert_eq!(status(third, clip()).await.map(|status| status.as_u16()), Some(429));
        drop(other);
        assert_eq!(status(third, clip()).await, None);
        let grown = ClipFile { bytes: 5, ..clip() };
        assert_eq!(status(second, grown).await.map(|status| status.as_u16()), Some(410));
        std::fs::remove_file(&path).expect("there");
        assert_eq!(status(second, clip()).await.map(|status| status.as_u16()), Some(410));
        assert!(FILES.open(first, clip()).await.is_ok(), "it is open");
    }
}
