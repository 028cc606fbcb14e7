//! Users and groups as people write them: by name or by number.

use std::fmt;
use std::str::FromStr;

use nix::unistd::{Group, User};
use serde::{Deserialize, Deserializer, de};

/// A user, found by name or number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uid(pub u32);

/// A group, found by name or number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gid(pub u32);

impl FromStr for Uid {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let find = |name: &str| User::from_name(name).map(|user| user.map(|user| user.uid.as_raw()));
        resolve(text, "user", "getent passwd", find).map(Self)
    }
}

impl FromStr for Gid {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let find = |name: &str| Group::from_name(name).map(|group| group.map(|group| group.gid.as_raw()));
        resolve(text, "group", "getent group", find).map(Self)
    }
}

fn resolve(
    text: &str,
    what: &str,
    list: &str,
    find: impl Fn(&str) -> nix::Result<Option<u32>>,
) -> Result<u32, String> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    match find(text) {
        Ok(Some(number)) => Ok(number),
        Ok(None) => {
            Err(format!("there is no {what} {text:?}; `{list}` lists them, and numbers will do as well"))
        }
        Err(errno) => Err(format!("{what} {text:?} cannot be looked up: {errno}; a number will do as well")),
    }
}

impl<'de> Deserialize<'de> for Uid {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        id(deserializer, "a user's name or number", Self, str::parse)
    }
}

impl<'de> Deserialize<'de> for Gid {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        id(deserializer, "a group's name or number", Self, str::parse)
    }
}

fn id<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    wanted: &'static str,
    from_number: fn(u32) -> T,
    from_text: fn(&str) -> Result<T, String>,
) -> Result<T, D::Error> {
    struct Visitor<T> {
        wanted: &'static str,
        from_number: fn(u32) -> T,
        from_text: fn(&str) -> Result<T, String>,
    }

    impl<T> de::Visitor<'_> for Visitor<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.wanted)
        }

        fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
            let id = u32::try_from(number);
            id.map(self.from_number).map_err(|_| E::invalid_value(de::Unexpected::Signed(number), &self))
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
            (self.from_text)(text).map_err(E::custom)
        }
    }

    deserializer.deserialize_any(Visitor { wanted, from_number, from_text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_found() {
        assert_eq!("root".parse(), Ok(Uid(0)));
        assert_eq!("root".parse(), Ok(Gid(0)));
        assert_eq!("65534".parse(), Ok(Uid(65534)));
        assert!("no-such-one".parse::<Gid>().unwrap_err().contains("getent group"));
        for text in ["-1", "4294967296", ""] {
            assert!(text.parse::<Uid>().is_err(), "{text}");
        }
    }
}
