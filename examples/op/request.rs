//! What a request is made of: the description of an op, its settings, and how a request fails.

use std::collections::BTreeMap;
use std::fmt;

use nextscale::verification::Rule;
use nextscale::{Access, DType};

use crate::runner::Runner;
use crate::tensors::Tensors;

/// An op as this program offers it.
pub(crate) struct Op {
    pub(crate) name: &'static str,
    /// One line.
    pub(crate) about: &'static str,
    pub(crate) inputs: &'static [TensorHelp],
    pub(crate) settings: &'static [SettingHelp],
    pub(crate) outputs: &'static [TensorHelp],
    /// From the input tensors to the output tensors.
    pub(crate) run: fn(&Runner, &Tensors, &Settings) -> Result<Tensors, Failure>,
}

/// A tensor in the help.
pub(crate) struct TensorHelp {
    pub(crate) name: &'static str,
    pub(crate) dtypes: &'static str,
    /// Shape and layout, outermost dimension first.
    pub(crate) shape: &'static str,
    pub(crate) about: &'static str,
}

/// A setting in the help.
pub(crate) struct SettingHelp {
    pub(crate) name: &'static str,
    pub(crate) values: &'static str,
    pub(crate) about: &'static str,
}

impl Op {
    pub(crate) fn help(&self) -> String {
        let mut text = self.about.to_owned();
        for (title, tensors) in [("input tensors", self.inputs), ("output tensors", self.outputs)] {
            text += &format!("\n\n{title} (contiguous, outermost dimension first):");
            for TensorHelp { name, dtypes, shape, about } in tensors {
                text += &format!("\n  {name:<16}{dtypes:<16}{shape}\n{:34}{about}", "");
            }
            if tensors.is_empty() {
                text += " none";
            }
        }
        text += "\n\nsettings (--set key=value):";
        for SettingHelp { name, values, about } in self.settings {
            text += &format!("\n  {name:<16}{values:<26}{about}");
        }
        text
    }
}

/// The `--set key=value` pairs, all of keys that the op knows.
pub(crate) struct Settings(BTreeMap<String, String>);

impl Settings {
    pub(crate) fn parse(op: &Op, pairs: &[String]) -> Result<Self, Failure> {
        let mut settings = BTreeMap::new();
        for pair in pairs {
            let (key, value) =
                pair.split_once('=').ok_or_else(|| Failure::request(format!("--set {pair}: not key=value")))?;
            if !op.settings.iter().any(|setting| setting.name == key) {
                let known: Vec<_> = op.settings.iter().map(|setting| setting.name).collect();
                return Err(Failure::request(format!("{} has no setting {key:?}, but {}", op.name, known.join(", "))));
            }
            if settings.insert(key.to_owned(), value.to_owned()).is_some() {
                return Err(Failure::request(format!("{key} is set twice")));
            }
        }
        Ok(Settings(settings))
    }

    /// `None` if it is not set.
    pub(crate) fn get<T: Setting>(&self, key: &str) -> Result<Option<T>, Failure> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        match T::parse(value) {
            Some(parsed) => Ok(Some(parsed)),
            None => Err(Failure::request(format!("{key}={value}: not {}", T::WHAT))),
        }
    }

    pub(crate) fn require<T: Setting>(&self, key: &str) -> Result<T, Failure> {
        self.get(key)?.ok_or_else(|| Failure::request(format!("the setting {key} is missing")))
    }
}

/// What a setting's text can become.
pub(crate) trait Setting: Sized {
    const WHAT: &'static str;
    fn parse(text: &str) -> Option<Self>;
}

macro_rules! integers {
    ($($type:ty => $what:literal),*) => {$(
        impl Setting for $type {
            const WHAT: &'static str = $what;
            fn parse(text: &str) -> Option<Self> {
                match text.strip_prefix("0x") {
                    Some(hexadecimal) => <$type>::from_str_radix(hexadecimal, 16).ok(),
                    None => text.parse().ok(),
                }
            }
        }
    )*};
}
integers!(usize => "a size", u32 => "a 32-bit unsigned integer", u64 => "a 64-bit unsigned integer", i64 => "a 64-bit integer");

impl Setting for f32 {
    const WHAT: &'static str = "a number";
    fn parse(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

impl Setting for bool {
    const WHAT: &'static str = "true or false";
    fn parse(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

impl Setting for String {
    const WHAT: &'static str = "a word";
    fn parse(text: &str) -> Option<Self> {
        Some(text.to_owned())
    }
}

impl Setting for DType {
    const WHAT: &'static str = "a dtype";
    fn parse(text: &str) -> Option<Self> {
        crate::tensors::DTYPES.iter().map(|&(dtype, _)| dtype).find(|dtype| dtype.to_string() == text)
    }
}

impl Setting for Rule {
    const WHAT: &'static str = "greedy, match, reject or block";
    fn parse(text: &str) -> Option<Self> {
        match text {
            "greedy" => Some(Rule::Greedy),
            "match" => Some(Rule::Match),
            "reject" => Some(Rule::Reject),
            "block" => Some(Rule::Block),
            _ => None,
        }
    }
}

impl Setting for Access {
    const WHAT: &'static str = "auto, narrow or wide";
    fn parse(text: &str) -> Option<Self> {
        match text {
            "auto" => Some(Access::Auto),
            "narrow" => Some(Access::Narrow),
            "wide" => Some(Access::Wide),
            _ => None,
        }
    }
}

/// Why there is no output.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The request makes no sense.
    Request(String),
    /// nextscale refused it.
    Op(nextscale::Error),
    /// The device or a file failed.
    Failed(String),
}

impl Failure {
    pub(crate) fn request(message: impl Into<String>) -> Self {
        Failure::Request(message.into())
    }

    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Failure::Request(_) => 2,
            Failure::Op(_) | Failure::Failed(_) => 1,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Request(message) | Failure::Failed(message) => f.write_str(message),
            Failure::Op(error) => error.fmt(f),
        }
    }
}

impl From<lexopt::Error> for Failure {
    fn from(error: lexopt::Error) -> Self {
        Failure::Request(error.to_string())
    }
}

impl From<nextscale::Error> for Failure {
    fn from(error: nextscale::Error) -> Self {
        Failure::Op(error)
    }
}
