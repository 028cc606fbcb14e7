//! Frames: `number: u16 | reserved: u16 = 0 | id: u32 | body`, little endian, the body in bincode's standard
//! configuration. This is the only file that names bincode.

use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;

use crate::limits::MAX_MESSAGE;

/// Bytes before the body.
pub const HEADER: usize = 8;

/// Why bytes are not a message.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CodecError {
    /// Shorter than a header.
    #[error("message of {0} bytes is shorter than its header")]
    TooShort(usize),
    /// Longer than [`MAX_MESSAGE`].
    #[error("message of {0} bytes exceeds the limit of {MAX_MESSAGE}")]
    TooLong(usize),
    /// A number that this version does not know.
    #[error("unknown message number {0}")]
    UnknownNumber(u16),
    /// The reserved field is in use.
    #[error("reserved field of the header is not zero")]
    Reserved,
    /// The body does not decode.
    #[error("body does not decode: {0}")]
    Body(String),
    /// Bytes are left over after the body.
    #[error("{0} bytes follow the body")]
    Trailing(usize),
}

/// A numbered message enum.
pub trait Message: Sized {
    /// The number on the wire.
    fn number(&self) -> u16;
    /// Appends the body.
    ///
    /// # Errors
    /// [`CodecError::Body`] where the value cannot be encoded.
    fn encode_body(&self, out: &mut Vec<u8>) -> Result<(), CodecError>;
    /// Decodes the body of message `number`.
    ///
    /// # Errors
    /// [`CodecError`] for anything but exactly one well-formed body.
    fn decode_body(number: u16, bytes: &[u8]) -> Result<Self, CodecError>;
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<MAX_MESSAGE>()
}

/// Appends one body to `out`.
pub(crate) fn encode_body<T: Serialize>(body: &T, out: &mut Vec<u8>) -> Result<(), CodecError> {
    bincode::serde::encode_into_std_write(body, out, config())
        .map(|_| ())
        .map_err(|error| CodecError::Body(error.to_string()))
}

/// Decodes one body that fills `bytes` exactly.
pub(crate) fn decode_body<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let (body, used) = bincode::serde::decode_from_slice(bytes, config())
        .map_err(|error| CodecError::Body(error.to_string()))?;
    if used == bytes.len() { Ok(body) } else { Err(CodecError::Trailing(bytes.len() - used)) }
}

/// One frame.
///
/// # Errors
/// [`CodecError::TooLong`] beyond [`MAX_MESSAGE`], [`CodecError::Body`] where a value cannot be encoded.
pub fn encode<M: Message>(id: u32, message: &M) -> Result<Vec<u8>, CodecError> {
    let mut out = Vec::with_capacity(256);
    out.extend_from_slice(&message.number().to_le_bytes());
    out.extend_from_slice(&[0, 0]);
    out.extend_from_slice(&id.to_le_bytes());
    message.encode_body(&mut out)?;
    if out.len() > MAX_MESSAGE { Err(CodecError::TooLong(out.len())) } else { Ok(out) }
}

/// The id and message of one frame. Looks at syntax only: see [`crate::validate`] for the rest.
///
/// # Errors
/// [`CodecError`] for anything but exactly one well-formed frame.
pub fn decode<M: Message>(bytes: &[u8]) -> Result<(u32, M), CodecError> {
    if bytes.len() > MAX_MESSAGE {
        return Err(CodecError::TooLong(bytes.len()));
    }
    let Some((&[n0, n1, r0, r1, i0, i1, i2, i3], body)) = bytes.split_first_chunk::<HEADER>() else {
        return Err(CodecError::TooShort(bytes.len()));
    };
    if [r0, r1] != [0, 0] {
        return Err(CodecError::Reserved);
    }
    let message = M::decode_body(u16::from_le_bytes([n0, n1]), body)?;
    Ok((u32::from_le_bytes([i0, i1, i2, i3]), message))
}
