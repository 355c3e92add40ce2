//! Git LFS pointers: the short text files that stand in a repository for its large files until these are fetched.
//!
//! Owns: what a pointer looks like and what to say of one. Does not know: which file of a checkpoint it stands for.
//! Source of the format: git-lfs `docs/spec.md`.

use std::path::Path;

use crate::error::{Error, Result};

/// Beginnings of the first line, which names the specification: today's, and two names that it had before.
const VERSIONS: [&str; 3] = ["version https://git-lfs", "version https://hawser.", "version http://git-media.io/"];
/// A pointer is shorter than this, by its specification.
const MAX_POINTER_BYTES: usize = 1024;

/// What is wrong with a file whose first bytes are these, if it is a pointer. `bytes` may be longer than a pointer.
pub fn pointer_problem(bytes: &[u8]) -> Option<String> {
    if !VERSIONS.iter().any(|version| bytes.starts_with(version.as_bytes())) {
        return None;
    }
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_POINTER_BYTES)]);
    let size = text.lines().find_map(|line| line.strip_prefix("size ")?.trim().parse::<u64>().ok());
    let size = size.map_or(String::new(), |size| format!(" of {size} bytes"));
    Some(format!(
        "is a Git LFS pointer, which stands for a file{size} that was not fetched; run `git lfs pull` in the repository, \
         or download the file itself"
    ))
}

/// Refuses the content of the file at `path` if it is a pointer.
pub fn refuse_pointer(path: &Path, bytes: &[u8]) -> Result<()> {
    match pointer_problem(bytes) {
        Some(problem) => Err(Error::checkpoint(path, problem)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pointers_are_told_by_their_first_line() {
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4976698672\n";
        let problem = pointer_problem(pointer.as_bytes()).expect("is a pointer");
        assert!(problem.contains("is a Git LFS pointer") && problem.contains("4976698672 bytes"), "{problem}");
        let windows = pointer.replace('\n', "\r\n");
        assert!(pointer_problem(windows.as_bytes()).expect("is a pointer").contains("4976698672 bytes"));
        assert!(pointer_problem(b"version https://git-lfs.github.com/spec/v1\n").is_some(), "cut short");
        assert!(pointer_problem(b"version https://hawser.github.com/spec/v1\n").is_some(), "an old name");
        for other in [&b"GGUF"[..], b"{}", b"#version: 0.2", b"version", b""] {
            assert_eq!(pointer_problem(other), None);
        }
    }
}
