//! What came of a job, as its row keeps it.
//!
//! Owns: the text of a row's result. Files are named within the folder of finished clips, which nodes may have at different places.
//! Does not know: who made the files.

use serde::{Deserialize, Serialize};

use super::files::{ClipFiles, StoredFile};
use super::output::OutputDir;
use crate::media::Still;

/// A finished clip.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct ClipResult {
    clip: FileText,
    stills: Vec<StillText>,
    /// Predictions that a cache took from ones before them.
    pub(super) skipped_passes: usize,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct FileText {
    name: String,
    bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct StillText {
    kind: String,
    #[serde(flatten)]
    file: FileText,
}

impl From<&StoredFile> for FileText {
    fn from(file: &StoredFile) -> Self {
        let name = file.path.file_name().map_or(String::new(), |name| name.to_string_lossy().into_owned());
        Self { name, bytes: file.bytes }
    }
}

impl ClipResult {
    pub(super) fn new(files: &ClipFiles, skipped_passes: usize) -> Self {
        let still =
            |(still, file): (Still, &StoredFile)| StillText { kind: still.extension().into(), file: file.into() };
        Self { clip: (&files.clip).into(), stills: files.stills().map(still).collect(), skipped_passes }
    }

    /// The files, which lie in `outputs`. A kind of still that is not known is left out.
    pub(super) fn files(&self, outputs: &OutputDir) -> ClipFiles {
        let stored = |file: &FileText| StoredFile { path: outputs.named(&file.name), bytes: file.bytes };
        let known = |kind: &str| Still::ALL.into_iter().find(|still| still.extension() == kind);
        let stills = self.stills.iter().filter_map(|still| Some((known(&still.kind)?, stored(&still.file))));
        ClipFiles::of(stored(&self.clip), stills.collect())
    }

    pub(super) fn to_text(&self) -> String {
        serde_json::to_string(self).expect("numbers and text are always JSON: this is a bug")
    }

    pub(super) fn from_text(text: &str) -> serde_json::Result<Self> {
        serde_json::from_str(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_moves_with_its_folder() {
        let dir = tempfile::tempdir().expect("made");
        let outputs = |name: &str| OutputDir::at(&dir.path().join(name), 0).expect("made");
        let (here, there) = (outputs("here"), outputs("there"));
        let files = |outputs: &OutputDir| {
            let file = |name: &str, bytes| StoredFile { path: outputs.named(name), bytes };
            ClipFiles::of(file("a.mp4", 10), vec![(Still::First, file("a.first.png", 3))])
        };
        let text = ClipResult::new(&files(&here), 7).to_text();
        let read = ClipResult::from_text(&text).expect("our own");
        assert_eq!((read.files(&there), read.skipped_passes), (files(&there), 7));
        let elsewhere = text.replace("a.mp4", "../../etc/passwd");
        let path = ClipResult::from_text(&elsewhere).expect("JSON").files(&here).clip.path;
        assert_eq!(path, here.named("passwd"), "a row names no file outside of the folder");
    }
}
