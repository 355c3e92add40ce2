//! GGUF files in parts: `NAME-00001-of-00003.gguf` and those that follow.
//!
//! Owns: what a part says of itself, the names of the others, and the check that they are one whole. Does not know: how a
//! part is read. Source: llama.cpp `src/llama.cpp` (`llama_split_path`), `src/llama-model-loader.cpp`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::mapped::Located;
use super::metadata::{Metadata, MetadataValue};
use crate::error::{Error, Result};

/// Most parts; published have some ten. llama.cpp's names have room for more.
const MAX_PARTS: usize = 1000;

/// What a part says of the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Split {
    /// Place among the parts, from 0.
    number: usize,
    /// Number of parts.
    count: usize,
    /// Tensors of all parts together.
    num_tensors: usize,
}

impl Split {
    /// What the metadata of the file at `path` says; `None` of a file that is not one of several parts.
    pub(super) fn of(path: &Path, metadata: &Metadata) -> Result<Option<Self>> {
        let number = |key: &str, max: usize| match metadata.get(key).map(MetadataValue::as_integer) {
            None => Ok(None),
            Some(value) => {
                let value = value.and_then(|value| usize::try_from(value).ok()).filter(|value| *value <= max);
                let problem = || format!("`{key}` is no whole number from 0 to {max}");
                value.map(Some).ok_or_else(|| Error::checkpoint(path, problem()))
            }
        };
        let Some(count) = number("split.count", MAX_PARTS)?.filter(|count| *count > 1) else { return Ok(None) };
        let needed = |key: &str, max| {
            let missing = || Error::checkpoint(path, format!("`{key}` is missing, which each of {count} parts has"));
            number(key, max)?.ok_or_else(missing)
        };
        Ok(Some(Self {
            number: needed("split.no", count - 1)?,
            count,
            num_tensors: needed("split.tensors.count", super::gguf::MAX_TENSORS)?,
        }))
    }

    /// The files with the other parts, in order. `path` is the first, which is the one that is given to a program.
    pub(super) fn others(self, path: &Path) -> Result<Vec<PathBuf>> {
        let Self { number, count, .. } = self;
        let own_name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let ending = |number: usize| format!("-{:05}-of-{count:05}.gguf", number + 1);
        let Some(name) = own_name.strip_suffix(&ending(number)) else {
            let (own, ending) = (number + 1, ending(number));
            let problem = format!("is part {own} of {count} by its metadata; its name must end with `{ending}`");
            return Err(Error::checkpoint(path, problem));
        };
        let part = |number: usize| path.with_file_name(format!("{name}{}", ending(number)));
        if number != 0 {
            let (own, first) = (number + 1, part(0));
            let problem = format!("is part {own} of {count}; the first is opened: {}", first.display());
            return Err(Error::checkpoint(path, problem));
        }
        Ok((1..count).map(part).collect())
    }

    /// Refuses the file at `path` as part `number` of this whole unless it says that it is.
    pub(super) fn check_part(self, number: usize, path: &Path, metadata: &Metadata) -> Result<()> {
        let expected = Self { number, ..self };
        match Self::of(path, metadata)? {
            Some(found) if found == expected => Ok(()),
            found => {
                let said = found.map_or("no part of anything".to_owned(), |found| found.to_string());
                Err(Error::checkpoint(path, format!("says that it is {said}; expected is {expected}")))
            }
        }
    }

    /// Refuses a whole of another number of tensors than the parts say.
    pub(super) fn check_whole(self, path: &Path, tensors: &BTreeMap<String, Located>) -> Result<()> {
        if tensors.len() == self.num_tensors {
            return Ok(());
        }
        let problem = format!("`split.tensors.count` is {}; its parts have {}", self.num_tensors, tensors.len());
        Err(Error::checkpoint(path, problem))
    }
}

impl std::fmt::Display for Split {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "part {} of {} with {} tensors together", self.number + 1, self.count, self.num_tensors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(number: i128, count: i128, num_tensors: i128) -> Metadata {
        [("split.no", number), ("split.count", count), ("split.tensors.count", num_tensors)]
            .into_iter()
            .map(|(key, value)| (key.to_owned(), MetadataValue::Integer(value)))
            .collect()
    }

    fn of(number: i128, count: i128) -> Result<Option<Split>> {
        Split::of(Path::new("m-00001-of-00003.gguf"), &metadata(number, count, 7))
    }

    #[test]
    fn a_file_says_which_part_it_is() {
        assert_eq!(of(0, 3).unwrap(), Some(Split { number: 0, count: 3, num_tensors: 7 }));
        assert_eq!(of(0, 1).unwrap(), None);
        assert_eq!(Split::of(Path::new("m.gguf"), &Metadata::new()).unwrap(), None);
        for (number, count, key) in
            [(3, 3, "split.no"), (-1, 3, "split.no"), (0, 1001, "split.count"), (0, -2, "split.count")]
        {
            let error = of(number, count).expect_err("no such part").to_string();
            assert!(error.contains(&format!("`{key}` is no whole number")), "{error}");
        }
        let mut incomplete = metadata(0, 3, 7);
        incomplete.remove("split.tensors.count");
        let error = Split::of(Path::new("m.gguf"), &incomplete).expect_err("incomplete").to_string();
        assert!(error.contains("`split.tensors.count` is missing"), "{error}");
    }

    #[test]
    fn the_names_of_the_others_follow_from_the_first() {
        let split = of(0, 3).unwrap().expect("a part");
        let others = split.others(Path::new("a/m-00001-of-00003.gguf")).expect("the first");
        assert_eq!(others, ["a/m-00002-of-00003.gguf", "a/m-00003-of-00003.gguf"].map(PathBuf::from));
        let error = split.others(Path::new("a/m.gguf")).expect_err("no name of a part").to_string();
        assert!(error.contains("must end with `-00001-of-00003.gguf`"), "{error}");
        let second = of(1, 3).unwrap().expect("a part");
        let error = second.others(Path::new("a/m-00002-of-00003.gguf")).expect_err("not the first").to_string();
        assert!(error.contains("is part 2 of 3; the first is opened: a/m-00001-of-00003.gguf"), "{error}");
    }

    #[test]
    fn parts_of_other_wholes_are_refused() {
        let split = of(0, 3).unwrap().expect("a part");
        let check = |found: &Metadata| split.check_part(1, Path::new("m-00002-of-00003.gguf"), found);
        check(&metadata(1, 3, 7)).expect("the second part");
        for (found, said) in [
            (metadata(0, 3, 7), "part 1 of 3 with 7 tensors together"),
            (metadata(1, 4, 7), "part 2 of 4"),
            (metadata(1, 3, 8), "with 8 tensors"),
            (Metadata::new(), "no part of anything"),
        ] {
            let error = check(&found).expect_err("another part").to_string();
            assert!(error.contains(said) && error.contains("expected is part 2 of 3"), "{error}");
        }
    }
}
