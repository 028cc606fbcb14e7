//! Sizes as people write them: `512M`, `64GiB`, `1.5G`, `65536`. All units are powers of 1024.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// A number of bytes that is written and read with units.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size(pub u64);

/// Text that is not a size.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{0:?} is not a size; write bytes or a number with K, M, G or T, such as 512M or 64GiB")]
pub struct SizeError(pub String);

const UNITS: [(&str, u64); 4] = [("t", 1 << 40), ("g", 1 << 30), ("m", 1 << 20), ("k", 1 << 10)];

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        parse(text).map(Self).ok_or_else(|| SizeError(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<u64> {
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let unit = unit.trim_start();
    let factor = match unit {
        "" | "b" => 1,
        _ => UNITS.iter().find_map(|(name, factor)| {
            let rest = unit.strip_prefix(name)?;
            matches!(rest, "" | "b" | "ib").then_some(*factor)
        })?,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = whole.parse().ok()?;
    let mut bytes = whole.checked_mul(factor)?;
    if !fraction.is_empty() {
        if factor == 1 || fraction.len() > 6 {
            return None;
        }
        let scale = 10_u64.checked_pow(u32::try_from(fraction.len()).ok()?)?;
        let part: u64 = fraction.parse().ok()?;
        bytes = bytes.checked_add(part.checked_mul(factor)? / scale)?;
    }
    Some(bytes)
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, factor) = UNITS.into_iter().find(|(_, factor)| self.0 >= *factor).unwrap_or(("", 1));
        if factor == 1 {
            return f.pad(&format!("{} B", self.0));
        }
        let tenths = u128::from(self.0) * 10 / u128::from(factor);
        let unit = unit.to_ascii_uppercase();
        if tenths.is_multiple_of(10) {
            f.pad(&format!("{} {unit}iB", tenths / 10))
        } else {
            f.pad(&format!("{}.{} {unit}iB", tenths / 10, tenths % 10))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_units_parse() {
        for (text, bytes) in [
            ("0", 0),
            ("65536", 65536),
            ("512M", 512 << 20),
            ("64GiB", 64 << 30),
            ("64gb", 64 << 30),
            ("1.5G", 3 << 29),
            (" 2 TiB ", 2 << 40),
            ("7k", 7 << 10),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "M", "-1", "1.5", "1..5G", "12Q", "99999999999T", "1.0000001G", "0x10", "1 2"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_print_with_the_largest_unit() {
        assert_eq!(Size(512 << 20).to_string(), "512 MiB");
        assert_eq!(Size(3 << 29).to_string(), "1.5 GiB");
        assert_eq!(Size(100).to_string(), "100 B");
    }
}
