//! How the program fails: one line, and an exit code that is not 0.

use std::fmt;

/// What went wrong.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line makes no sense: exit code 2.
    Request(String),
    /// A file, the device or the library: exit code 1.
    Failed(String),
}

impl Failure {
    pub(crate) fn request(text: impl Into<String>) -> Self {
        Failure::Request(text.into())
    }

    pub(crate) fn failed(text: impl Into<String>) -> Self {
        Failure::Failed(text.into())
    }

    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Failure::Request(_) => 2,
            Failure::Failed(_) => 1,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Failure::Request(text) | Failure::Failed(text)) = self;
        f.write_str(text)
    }
}

impl From<nextscale::Error> for Failure {
    fn from(error: nextscale::Error) -> Self {
        Failure::Failed(format!("nextscale: {error}"))
    }
}

impl From<lexopt::Error> for Failure {
    fn from(error: lexopt::Error) -> Self {
        Failure::Request(error.to_string())
    }
}

pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;
