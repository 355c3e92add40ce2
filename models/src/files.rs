//! Opening the files of a checkpoint, which is done nowhere else in this crate.
//!
//! Owns: what may be opened (regular files, without waiting for anybody) and how much of one is read. Does not know: what
//! a file means. A checkpoint comes from strangers: what lies under the name of a configuration may be a pipe that nobody
//! writes to, a device without an end, or more text than there is memory.

use std::fs::{File, FileType, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use memmap2::Mmap;

use crate::error::{Error, Result};
use crate::lfs;

/// Most bytes of a `config.json`, `tokenizer_config.json`, index of shards, chat template and the like: five times the
/// largest that is published (a `tokenizer_config.json` with 65,536 added tokens).
pub const MAX_CONFIG_BYTES: u64 = 64 << 20;
/// Most values in one, each of which takes some hundred bytes once it is read. The same file has 460,000.
pub const MAX_CONFIG_VALUES: usize = 2 << 20;
/// Most objects in one, each of which takes half a kilobyte more. The same file has 65,536.
pub const MAX_CONFIG_OBJECTS: usize = 1 << 18;
/// Most bytes of a tokenizer's file; the largest published has 33 MB.
pub const MAX_TOKENIZER_BYTES: u64 = 128 << 20;
/// Most values in one; the largest published has two million, most of them merges.
pub const MAX_TOKENIZER_VALUES: usize = 8 << 20;
/// Most objects in one; published are 65,536 (added tokens).
pub const MAX_TOKENIZER_OBJECTS: usize = 1 << 19;
/// Most bytes of the header of a safetensors file; the largest published have some megabytes, most of them notes of
/// trainers.
pub const MAX_HEADER_BYTES: u64 = 64 << 20;
/// Most values in one, of which a tensor has about ten.
pub const MAX_HEADER_VALUES: usize = 4 << 20;

/// How large a file of one kind may be.
#[derive(Debug, Clone, Copy)]
pub struct Limit {
    /// The kind, in words.
    what: &'static str,
    bytes: u64,
    values: usize,
    objects: usize,
}

impl Limit {
    /// Configurations, templates, and whatever else is small.
    pub const CONFIG: Self = Self {
        what: "a configuration",
        bytes: MAX_CONFIG_BYTES,
        values: MAX_CONFIG_VALUES,
        objects: MAX_CONFIG_OBJECTS,
    };
    /// Vocabularies and merges in all forms.
    pub const TOKENIZER: Self = Self {
        what: "a tokenizer's file",
        bytes: MAX_TOKENIZER_BYTES,
        values: MAX_TOKENIZER_VALUES,
        objects: MAX_TOKENIZER_OBJECTS,
    };
    /// What stands before the tensors of a safetensors file.
    pub const HEADER: Self =
        Self { what: "a header", bytes: MAX_HEADER_BYTES, values: MAX_HEADER_VALUES, objects: MAX_HEADER_VALUES / 8 };

    /// Most bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What is wrong with JSON text that would take more memory than its kind may, whatever it says. Reading it keeps
    /// some hundred bytes for each value of a few bytes, so that the length alone is no bound.
    pub fn problem(&self, json: &[u8]) -> Option<String> {
        let Census { values, objects } = Census::of(json);
        let Self { what, .. } = self;
        if json.len() as u64 > self.bytes {
            return Some(format!("has {} bytes; {what} may have {}", json.len(), self.bytes));
        }
        if values > self.values {
            return Some(format!("has {values} values; {what} may have {}", self.values));
        }
        (objects > self.objects).then(|| format!("has {objects} objects; {what} may have {}", self.objects))
    }
}

/// What JSON text consists of, counted and not read.
#[derive(Debug, PartialEq, Eq)]
struct Census {
    /// Or a few more.
    values: usize,
    objects: usize,
}

impl Census {
    fn of(json: &[u8]) -> Self {
        let (mut values, mut objects) = (1, 0);
        let (mut is_in_string, mut is_escaped) = (false, false);
        for &byte in json {
            match (is_in_string, byte) {
                (true, _) if is_escaped => is_escaped = false,
                (true, b'\\') => is_escaped = true,
                (_, b'"') => is_in_string = !is_in_string,
                (false, b',' | b'[') => values += 1,
                (false, b'{') => (values, objects) = (values + 1, objects + 1),
                _ => (),
            }
        }
        Self { values, objects }
    }
}

/// The content of a file, at most as many bytes as its kind may have. A Git LFS pointer is refused.
pub fn read(path: &Path, limit: &Limit) -> Result<Vec<u8>> {
    let (file, mut bytes) = (open(path)?, Vec::new());
    file.take(limit.bytes + 1).read_to_end(&mut bytes).map_err(|error| Error::checkpoint(path, error))?;
    if bytes.len() as u64 > limit.bytes {
        let problem = format!("has more than {} bytes, the most that {} may have", limit.bytes, limit.what);
        return Err(Error::checkpoint(path, problem));
    }
    lfs::refuse_pointer(path, &bytes)?;
    Ok(bytes)
}

/// As [`read`]; `None` where there is nothing of this name.
pub fn read_if_present(path: &Path, limit: &Limit) -> Result<Option<Vec<u8>>> {
    if is_present(path) { read(path, limit).map(Some) } else { Ok(None) }
}

/// Whether there is anything of this name, be it no file or a link that leads nowhere: whoever put it there meant a file.
pub fn is_present(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Opens a regular file for reading. Whatever else lies there is refused, and never waited for.
pub fn open(path: &Path) -> Result<File> {
    open_regular(path).map_err(|problem| Error::checkpoint(path, problem))
}

/// As [`open`], with the problem alone.
pub fn open_regular(path: &Path) -> std::result::Result<File, String> {
    let words = |error: std::io::Error| match error.kind() {
        ErrorKind::NotFound => "there is no such file".to_owned(),
        _ => error.to_string(),
    };
    // Asked first, since a socket cannot even be opened, and of the opened file once more: it may be another one by now.
    check_regular(path.metadata().map_err(words)?.file_type())?;
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(words)?;
    check_regular(file.metadata().map_err(words)?.file_type())?;
    Ok(file)
}

fn check_regular(kind: FileType) -> std::result::Result<(), String> {
    if kind.is_file() {
        return Ok(());
    }
    let what = if kind.is_dir() {
        "a folder"
    } else if kind.is_fifo() {
        "a pipe"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a device"
    };
    Err(format!("is {what}, not a regular file"))
}

/// Maps a file for reading; a Git LFS pointer is refused, and so is a file without content.
pub fn map(path: &Path) -> Result<Mmap> {
    let file = open(path)?;
    if file.metadata().map_err(|error| Error::checkpoint(path, error))?.len() == 0 {
        return Err(Error::checkpoint(path, "is empty"));
    }
    // SAFETY: checkpoints are immutable while they are served; the map is dropped once the weights are copied.
    let mmap = unsafe { Mmap::map(&file) }.map_err(|error| Error::checkpoint(path, error))?;
    lfs::refuse_pointer(path, &mmap)?;
    Ok(mmap)
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    const SMALL: Limit = Limit { what: "a toy", bytes: 16, values: 4, objects: 2 };

    #[test]
    fn only_regular_files_are_opened_and_nobody_is_waited_for() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let at = |name: &str| dir.path().join(name);
        let fifo = CString::new(at("pipe").as_os_str().as_bytes()).expect("no zero byte");
        // SAFETY: the path is a string that ends in zero.
        assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
        let _socket = UnixListener::bind(at("socket")).expect("bound");
        std::fs::create_dir(at("folder")).expect("created");
        std::os::unix::fs::symlink("/dev/zero", at("link")).expect("linked");
        for (name, what) in [("pipe", "a pipe"), ("socket", "a socket"), ("folder", "a folder"), ("link", "a device")] {
            let path = at(name);
            let expected = format!("{}: is {what}, not a regular file", path.display());
            let errors = [
                read(&path, &Limit::CONFIG).expect_err("no file").to_string(),
                read_if_present(&path, &Limit::CONFIG).expect_err("no file").to_string(),
                map(&path).expect_err("no file").to_string(),
            ];
            assert!(errors.iter().all(|error| *error == expected), "{errors:?}");
        }
        std::os::unix::fs::symlink(at("circle"), at("circle")).expect("linked");
        std::os::unix::fs::symlink(at("gone"), at("nowhere")).expect("linked");
        for name in ["circle", "nowhere"] {
            assert!(read_if_present(&at(name), &Limit::CONFIG).is_err(), "{name}");
        }
        assert!(read(&at("absent"), &Limit::CONFIG).expect_err("absent").to_string().contains("no such file"));
        assert!(read_if_present(&at("absent"), &Limit::CONFIG).expect("may be absent").is_none());
    }

    #[test]
    fn no_more_is_read_than_a_file_may_have() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("config.json");
        std::fs::write(&path, [b' '; 16]).expect("written");
        assert_eq!(read(&path, &SMALL).expect("as long as allowed").len(), 16);
        // Terabytes, of which the disk holds none.
        File::create(&path).and_then(|file| file.set_len(1 << 42)).expect("written");
        let error = read(&path, &SMALL).expect_err("too long").to_string();
        assert!(error.contains("config.json: has more than 16 bytes, the most that a toy may have"), "{error}");
    }

    #[test]
    fn json_is_counted_before_it_is_read() {
        let count = |json: &str| (Census::of(json.as_bytes()).values, Census::of(json.as_bytes()).objects);
        assert_eq!(count(r#"{"a": [1, 2], "b": {}}"#), (6, 2));
        assert_eq!(count(r#"["\"{,[\\", "[[{{,,"]"#), (3, 0), "what stands in strings does not count");
        for (json, expected) in [
            ("[1,2,3,4]", "has 5 values; a toy may have 4"),
            ("{{{", "has 3 objects; a toy may have 2"),
            ("                 ", "has 17 bytes; a toy may have 16"),
        ] {
            assert_eq!(SMALL.problem(json.as_bytes()).as_deref(), Some(expected), "{json}");
        }
        assert_eq!(SMALL.problem(br#"{"a": [1]}"#), None);
    }
}
