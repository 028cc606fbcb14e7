//! FMALLOC_DISABLE: features of the kernel that a process shall do without although they are there, for tests and
//! diagnosis of what happens on older kernels. Read at start by each side; a word that means nothing to a side is ignored
//! by it, a word that nobody knows is an error.

use std::str::FromStr;

use thiserror::Error;

/// The environment variable: words of [`Disabled`], separated by commas.
pub const DISABLE: &str = "FMALLOC_DISABLE";

/// What is switched off.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Disabled {
    /// `move`: UFFDIO_MOVE (Linux 6.8). Clients evict by write-protection instead.
    pub move_pages: bool,
    /// `poison`: UFFDIO_POISON (Linux 6.6). Lost pages lose all access instead: SIGSEGV, not SIGBUS.
    pub poison: bool,
    /// `peerpidfd`: SO_PEERPIDFD (Linux 6.5). The daemon looks up its clients by number instead.
    pub peer_pidfd: bool,
    /// `io_uring`: the daemon transfers one by one instead.
    pub io_uring: bool,
}

/// A word that names nothing.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{0:?} is not one of move, poison, peerpidfd, io_uring")]
pub struct UnknownWord(pub String);

impl FromStr for Disabled {
    type Err = UnknownWord;

    fn from_str(text: &str) -> Result<Self, UnknownWord> {
        let mut disabled = Self::default();
        for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            match word {
                "move" => disabled.move_pages = true,
                "poison" => disabled.poison = true,
                "peerpidfd" => disabled.peer_pidfd = true,
                "io_uring" => disabled.io_uring = true,
                other => return Err(UnknownWord(other.to_owned())),
            }
        }
        Ok(disabled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_switch_features_off_and_unknown_ones_are_named() {
        assert_eq!("".parse(), Ok(Disabled::default()));
        let all = Disabled { move_pages: true, poison: true, peer_pidfd: true, io_uring: true };
        assert_eq!("move, poison,peerpidfd,,io_uring".parse(), Ok(all));
        assert_eq!("poison".parse(), Ok(Disabled { poison: true, ..Disabled::default() }));
        let error = "move,moev".parse::<Disabled>().unwrap_err();
        assert!(error.to_string().contains("moev") && error.to_string().contains("peerpidfd"), "{error}");
    }
}
