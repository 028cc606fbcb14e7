//! Bodies of the messages about forked children and about groups: clients that share one budget.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::messages::ClientStats;

/// A secret that the daemon gives out: whoever shows it may join a group, or is a forked child that was announced.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Token(pub [u8; 16]);

impl fmt::Display for Token {
    /// 32 hexadecimal digits, as in the environment.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Token {
    /// A secret does not belong into logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

/// Text that is not a token.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("a token has 32 hexadecimal digits")]
pub struct NotAToken;

impl FromStr for Token {
    type Err = NotAToken;

    fn from_str(text: &str) -> Result<Self, NotAToken> {
        // No sign, which the parser would take.
        let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = digits.then(|| u128::from_str_radix(text, 16).ok()).flatten();
        number.map(|number| Self(number.to_be_bytes())).ok_or(NotAToken)
    }
}

/// Body of [`crate::messages::Reply::ForkPrepared`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForkPrepared {
    /// With it the child says whose child it is.
    pub token: Token,
}

/// Body of [`crate::messages::Request::Adopt`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopt {
    /// What the parent was given.
    pub token: Token,
}

/// Body of [`crate::messages::Request::Ready`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// Thread id of the child's agent in its pid namespace, as `gettid` gives it.
    pub agent_tid: u32,
}

/// Body of [`crate::messages::Request::GroupStats`] and of [`crate::messages::Reply::Group`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupToken {
    /// The group's.
    pub token: Token,
}

/// Body of [`crate::messages::Reply::GroupStats`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupStats {
    /// Clients in it now.
    pub members: u64,
    /// Clients that ever were in it.
    pub members_ever: u64,
    /// Sums over all who ever were in it; `peak_resident_pages` is the most that the group held at once, `budget_bytes`
    /// the group's budget.
    pub stats: ClientStats,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_environment_and_show_in_no_log() {
        let token = Token([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255]);
        let text = token.to_string();
        assert_eq!(text, "000102030405060708090a0b0c0d0eff");
        assert_eq!(text.parse(), Ok(token));
        assert!(!format!("{token:?}").contains("0e"));
        for wrong in ["", "00", "+00102030405060708090a0b0c0d0eff", "g00102030405060708090a0b0c0d0eff"] {
            assert_eq!(wrong.parse::<Token>(), Err(NotAToken), "{wrong}");
        }
    }
}
