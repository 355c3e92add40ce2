//! Where jobs live between requests and between processes.
//!
//! Owns: how that is written, and what is usual. Does not know: what lies there.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The folder of a server's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StateDir {
    /// This one.
    Folder(PathBuf),
    /// None: jobs end with the process.
    None,
}

impl FromStr for StateDir {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" => Err("expected a folder, or none".into()),
            "none" => Ok(Self::None),
            path => Ok(Self::Folder(path.into())),
        }
    }
}

impl StateDir {
    /// A folder that is not said from the root on is below `folder`.
    pub(super) fn relative_to(self, folder: &Path) -> Self {
        match self {
            Self::Folder(path) => Self::Folder(folder.join(path)),
            Self::None => Self::None,
        }
    }

    /// `tale` in the user's folder of states, as the XDG base directory specification has it; `None` for a user without a home.
    pub(super) fn usual(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> Option<Self> {
        let folder = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let states = folder("XDG_STATE_HOME").or_else(|| folder("HOME").map(|home| home.join(".local/state")))?;
        Some(Self::Folder(states.join("tale")))
    }
}

/// The address of a database, with what opens it; never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct DatabaseUrl(String);

impl DatabaseUrl {
    /// The address.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DatabaseUrl(..)")
    }
}

impl FromStr for DatabaseUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_known = text.starts_with("postgres://") || text.starts_with("postgresql://");
        // What was given is not repeated: there may be a password in it.
        if is_known { Ok(Self(text.to_owned())) } else { Err("expected postgres://USER@HOST/DATABASE".into()) }
    }
}

/// Where jobs live.
#[derive(Debug, Clone)]
pub struct JobsConfig {
    /// The folder of rows, where they are in no database, and of what lies beside them; `None` where it is not known.
    pub state_dir: Option<StateDir>,
    /// The database of several nodes.
    pub database_url: Option<DatabaseUrl>,
    /// The name of this node among them.
    pub node_name: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_folder_is_the_users() {
        let usual = |variables: &[(&str, &str)]| {
            let of = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into());
            StateDir::usual(of)
        };
        let folder = |path: &str| Some(StateDir::Folder(path.into()));
        assert_eq!(usual(&[("HOME", "/home/ada")]), folder("/home/ada/.local/state/tale"));
        assert_eq!(usual(&[("HOME", "/home/ada"), ("XDG_STATE_HOME", "/states")]), folder("/states/tale"));
        assert_eq!(usual(&[("HOME", "/home/ada"), ("XDG_STATE_HOME", "here")]), folder("/home/ada/.local/state/tale"));
        assert_eq!(usual(&[]), None);
    }

    #[test]
    fn a_password_is_not_printed() {
        let url: DatabaseUrl = "postgres://tale:secret@db/tale".parse().expect("known");
        assert!(!format!("{url:?}").contains("secret"));
        let refused = "mysql://tale:secret@db/tale".parse::<DatabaseUrl>().expect_err("unknown");
        assert!(!refused.contains("secret"));
    }
}
