//! Prompts that are read from a file or from standard input: what stands on a command line, every user of the machine sees.

use std::fs::File;
use std::io::{Read, stdin};
use std::path::{Path, PathBuf};

use super::CliError;

/// Most bytes that are read; a prompt has fewer.
const MAX_PROMPT_FILE_BYTES: u64 = 8 << 20;

/// The value that stands for standard input.
pub const STDIN: &str = "-";

/// Where a text stands that does not stand on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Standard input, to its end.
    Stdin,
    /// A file.
    File(PathBuf),
}

impl Source {
    /// The text, without the line end behind it. `flag` is what the user gave, for errors.
    pub fn read(&self, flag: &str) -> Result<String, CliError> {
        let bytes = match self {
            Self::Stdin => read(stdin().lock()).map_err(|source| CliError::Io { what: "stdin".into(), source })?,
            Self::File(path) => read_file(path)?,
        };
        if bytes.len() as u64 > MAX_PROMPT_FILE_BYTES {
            return Err(CliError::Argument(format!("{flag}: the text has more than {MAX_PROMPT_FILE_BYTES} bytes")));
        }
        // The error of the conversion holds the text.
        let text = String::from_utf8(bytes);
        let mut text = text.map_err(|_| CliError::Argument(format!("{flag}: the text is not UTF-8")))?;
        if text.ends_with('\n') {
            text.truncate(text.len() - if text.ends_with("\r\n") { 2 } else { 1 });
        }
        Ok(text)
    }
}

fn read_file(path: &Path) -> Result<Vec<u8>, CliError> {
    File::open(path).and_then(read).map_err(|source| CliError::File { path: path.into(), source })
}

fn read(from: impl Read) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(MAX_PROMPT_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_without_its_last_line_end() {
        let dir = tempfile::tempdir().expect("made");
        let path = dir.path().join("prompt.txt");
        let source = Source::File(path.clone());
        for (bytes, text) in
            [(&b"a boat"[..], "a boat"), (b"a boat\n", "a boat"), (b"a\n\n", "a\n"), (b"a\r\n", "a"), (b"", "")]
        {
            std::fs::write(&path, bytes).expect("writable");
            assert_eq!(source.read("--prompt-file").expect("read"), text);
        }
        let refusal = |bytes: &[u8]| {
            std::fs::write(&path, bytes).expect("writable");
            source.read("--prompt-file").expect_err("refused").to_string()
        };
        assert_eq!(refusal(b"secret \xff"), "--prompt-file: the text is not UTF-8");
        let large = refusal(&vec![b'a'; MAX_PROMPT_FILE_BYTES as usize + 1]);
        assert_eq!(large, "--prompt-file: the text has more than 8388608 bytes");
    }
}
