//! The bytes beside the rows of jobs: pictures that were given, and what a clip under way has so far.
//!
//! Owns: where they lie, and that one is there as a whole or not at all. Durable when [`Objects::put`] returns, but for those in memory. Does not
//! know: what they are, or who refers to them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;

use super::JobId;

/// A place for them; clones are the same place.
#[derive(Debug, Clone)]
pub struct Objects(Arc<Place>);

#[derive(Debug)]
enum Place {
    Memory(Mutex<BTreeMap<String, Bytes>>),
    Folder(PathBuf),
}

impl Objects {
    /// In memory: gone with the process.
    pub fn in_memory() -> Self {
        Self(Arc::new(Place::Memory(Mutex::default())))
    }

    /// In a folder, which is made when it is not there. Several processes may share it.
    pub fn in_folder(path: &Path) -> io::Result<Self> {
        create_folder(path)?;
        Ok(Self(Arc::new(Place::Folder(path.to_owned()))))
    }

    /// Keeps `bytes` as the object `name` of a job, in place of one that was there.
    pub async fn put(&self, job: JobId, name: &str, bytes: Bytes) -> io::Result<()> {
        let name = name.to_owned();
        self.run(move |place| match place {
            Place::Memory(objects) => {
                lock(objects).insert(key(job, &name), bytes);
                Ok(())
            }
            Place::Folder(path) => write(&path.join(job.to_string()), &name, &bytes),
        })
        .await
    }

    /// The object `name` of a job.
    pub async fn get(&self, job: JobId, name: &str) -> io::Result<Bytes> {
        let name = name.to_owned();
        self.run(move |place| match place {
            Place::Memory(objects) => {
                lock(objects).get(&key(job, &name)).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
            }
            Place::Folder(path) => fs::read(path.join(job.to_string()).join(&name)).map(Bytes::from),
        })
        .await
    }

    /// Forgets the object `name` of a job.
    pub async fn remove(&self, job: JobId, name: &str) -> io::Result<()> {
        let name = name.to_owned();
        self.run(move |place| match place {
            Place::Memory(objects) => {
                lock(objects).remove(&key(job, &name));
                Ok(())
            }
            Place::Folder(path) => match fs::remove_file(path.join(job.to_string()).join(&name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            },
        })
        .await
    }

    /// Forgets the objects of a job whose names do not begin with `kept`.
    pub async fn remove_others(&self, job: JobId, kept: &str) -> io::Result<()> {
        let kept = kept.to_owned();
        self.run(move |place| match place {
            Place::Memory(objects) => {
                let (all, kept) = (key(job, ""), key(job, &kept));
                lock(objects).retain(|key, _| !key.starts_with(&all) || key.starts_with(&kept));
                Ok(())
            }
            Place::Folder(path) => {
                let entries = match fs::read_dir(path.join(job.to_string())) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                    entries => entries?,
                };
                for entry in entries {
                    let entry = entry?;
                    if !entry.file_name().to_string_lossy().starts_with(&kept) {
                        fs::remove_file(entry.path())?;
                    }
                }
                Ok(())
            }
        })
        .await
    }

    /// The jobs that have objects.
    pub async fn jobs(&self) -> io::Result<Vec<JobId>> {
        self.run(|place| match place {
            Place::Memory(objects) => {
                let ids =
                    lock(objects).keys().filter_map(|key| key.split_once('/')?.0.parse().ok()).collect::<BTreeSet<_>>();
                Ok(ids.into_iter().collect())
            }
            Place::Folder(path) => {
                let names = fs::read_dir(path)?.map(|entry| Ok(entry?.file_name().to_string_lossy().parse().ok()));
                names.filter_map(Result::transpose).collect()
            }
        })
        .await
    }

    /// Forgets all objects of a job.
    pub async fn remove_all(&self, job: JobId) -> io::Result<()> {
        self.run(move |place| match place {
            Place::Memory(objects) => {
                let prefix = key(job, "");
                lock(objects).retain(|key, _| !key.starts_with(&prefix));
                Ok(())
            }
            Place::Folder(path) => match fs::remove_dir_all(path.join(job.to_string())) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            },
        })
        .await
    }

    /// What waits for a disk waits on a thread for that.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Place) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        if matches!(*self.0, Place::Memory(_)) {
            return work(&self.0);
        }
        let place = self.0.clone();
        tokio::task::spawn_blocking(move || work(&place)).await.map_err(io::Error::other)?
    }
}

fn key(job: JobId, name: &str) -> String {
    format!("{job}/{name}")
}

fn lock(objects: &Mutex<BTreeMap<String, Bytes>>) -> MutexGuard<'_, BTreeMap<String, Bytes>> {
    objects.lock().expect("no code panics while it holds the objects: this is a bug")
}

fn create_folder(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Writes beside, then renames; both are on the disk before this returns.
fn write(folder: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    create_folder(folder)?;
    // Two nodes may write the same object, one of which does not know yet that it has lost the job.
    let beside = folder.join(format!(".{name}-{}", uuid::Uuid::now_v7().simple()));
    let written = (|| {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, folder.join(name))?;
        File::open(folder)?.sync_all()
    })();
    if written.is_err() {
        // Whatever is left of it; the first error is the one to tell.
        drop(fs::remove_file(&beside));
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::JobKind;

    #[tokio::test]
    async fn objects_come_and_go_with_their_job() {
        let dir = tempfile::tempdir().expect("made");
        for objects in [Objects::in_memory(), Objects::in_folder(&dir.path().join("objects")).expect("made")] {
            let (a, b) = (JobId::generate(JobKind::Video), JobId::generate(JobKind::Video));
            for (job, name, text) in
                [(a, "input-0", "old"), (a, "input-0", "new"), (a, "frames-1", "x"), (b, "input-0", "b")]
            {
                objects.put(job, name, Bytes::from_static(text.as_bytes())).await.expect("kept");
            }
            assert_eq!(objects.get(a, "input-0").await.expect("there"), "new");
            assert_eq!(
                objects.jobs().await.expect("there").into_iter().collect::<BTreeSet<_>>(),
                BTreeSet::from([a, b])
            );
            objects.remove_others(a, "input").await.expect("removed");
            objects.get(a, "frames-1").await.expect_err("gone");
            assert_eq!(objects.get(a, "input-0").await.expect("there"), "new");
            objects.remove_all(a).await.expect("removed");
            objects.remove_others(a, "input").await.expect("nothing to remove");
            objects.remove_all(a).await.expect("nothing to remove");
            let error = objects.get(a, "input-0").await.expect_err("gone");
            assert_eq!(error.kind(), io::ErrorKind::NotFound);
            assert_eq!(objects.get(b, "input-0").await.expect("there"), "b");
        }
        let left: Vec<_> = fs::read_dir(dir.path().join("objects")).expect("there").collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[tokio::test]
    async fn what_cannot_be_written_leaves_nothing() {
        let dir = tempfile::tempdir().expect("made");
        let objects = Objects::in_folder(dir.path()).expect("there");
        let job = JobId::generate(JobKind::Video);
        fs::create_dir_all(dir.path().join(job.to_string()).join("taken").join("by a folder")).expect("made");
        objects.put(job, "taken", Bytes::from_static(b"x")).await.expect_err("a folder is there");
        let left = fs::read_dir(dir.path().join(job.to_string())).expect("there").count();
        assert_eq!(left, 1, "the folder alone");
    }
}
