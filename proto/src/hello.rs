//! The first packet in each direction. Its bytes never change, so that every version can tell every other
//! what it speaks.
//!
//! ```text
//! Hello       0 magic "FMALLOC\0" | 8 lowest version u16 | 10 highest version u16 | 12 role u16 | 14 zero u16
//! HelloReply  0 magic "FMALLOC\0" | 8 chosen version u16, 0 = refused | 10 lowest u16 | 12 highest u16 | 14 zero u16
//! ```

use thiserror::Error;

use crate::limits::{VERSION_MAX, VERSION_MIN};

/// First bytes of either packet.
pub const MAGIC: [u8; 8] = *b"FMALLOC\0";
/// Length of either packet in bytes.
pub const HELLO_LEN: usize = 16;

/// What the connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A process whose memory is to be paged.
    Pager,
    /// A tool that inspects and controls.
    Control,
}

/// A peer's first packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// Lowest version that the peer speaks.
    pub min: u16,
    /// Highest version that the peer speaks.
    pub max: u16,
    /// What the connection is for.
    pub role: Role,
}

/// The daemon's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HelloReply {
    /// The version spoken from here on, or none if there is no common one.
    pub version: Option<u16>,
    /// Lowest version that the daemon speaks.
    pub min: u16,
    /// Highest version that the daemon speaks.
    pub max: u16,
}

/// Why a first packet is not a hello.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum HelloError {
    /// Not [`HELLO_LEN`] bytes.
    #[error("hello of {0} bytes, expected {HELLO_LEN}")]
    Length(usize),
    /// Not fmalloc's protocol.
    #[error("not an fmalloc hello")]
    Magic,
    /// Role, versions or the reserved field make no sense.
    #[error("hello has an invalid field")]
    Field,
}

impl Hello {
    /// The hello of this build.
    #[must_use]
    pub fn new(role: Role) -> Self {
        Self { min: VERSION_MIN, max: VERSION_MAX, role }
    }

    /// The packet.
    #[must_use]
    pub fn encode(&self) -> [u8; HELLO_LEN] {
        let role = match self.role {
            Role::Pager => 1,
            Role::Control => 2,
        };
        pack([self.min, self.max, role, 0])
    }

    /// Reads the packet.
    ///
    /// # Errors
    /// [`HelloError`] for anything but a hello.
    pub fn decode(bytes: &[u8]) -> Result<Self, HelloError> {
        let [min, max, role, zero] = unpack(bytes)?;
        let role = match role {
            1 => Role::Pager,
            2 => Role::Control,
            _ => return Err(HelloError::Field),
        };
        if min == 0 || min > max || zero != 0 {
            return Err(HelloError::Field);
        }
        Ok(Self { min, max, role })
    }
}

impl HelloReply {
    /// Answers `hello` with the highest common version.
    #[must_use]
    pub fn to(hello: &Hello) -> Self {
        let version = hello.max.min(VERSION_MAX);
        let common = version >= hello.min && version >= VERSION_MIN;
        Self { version: common.then_some(version), min: VERSION_MIN, max: VERSION_MAX }
    }

    /// The packet.
    #[must_use]
    pub fn encode(&self) -> [u8; HELLO_LEN] {
        pack([self.version.unwrap_or(0), self.min, self.max, 0])
    }

    /// Reads the packet.
    ///
    /// # Errors
    /// [`HelloError`] for anything but an answer to a hello.
    pub fn decode(bytes: &[u8]) -> Result<Self, HelloError> {
        let [version, min, max, zero] = unpack(bytes)?;
        let refused = version == 0;
        if min == 0 || min > max || zero != 0 || (!refused && !(min..=max).contains(&version)) {
            return Err(HelloError::Field);
        }
        Ok(Self { version: (!refused).then_some(version), min, max })
    }
}

fn pack(fields: [u16; 4]) -> [u8; HELLO_LEN] {
    let mut bytes = [0; HELLO_LEN];
    let (magic, rest) = bytes.split_at_mut(MAGIC.len());
    magic.copy_from_slice(&MAGIC);
    for (place, field) in rest.chunks_exact_mut(2).zip(fields) {
        place.copy_from_slice(&field.to_le_bytes());
    }
    bytes
}

fn unpack(bytes: &[u8]) -> Result<[u16; 4], HelloError> {
    if bytes.len() != HELLO_LEN {
        return Err(HelloError::Length(bytes.len()));
    }
    let (magic, rest) = bytes.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(HelloError::Magic);
    }
    let mut fields = [0; 4];
    for (field, place) in fields.iter_mut().zip(rest.chunks_exact(2)) {
        *field = u16::from_le_bytes([place[0], place[1]]);
    }
    Ok(fields)
}
